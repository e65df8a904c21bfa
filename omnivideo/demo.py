"""The main job in one go: a conversation that makes a clip and a still, changes them, asks about them, goes back to
the first turn on a branch, and solves a riddle; every turn is scored.

python -m omnivideo.demo out/demo
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from omnivideo.agent.thread import Thread
from omnivideo.backends.decoder.video import contact_sheet
from omnivideo.contracts import Artifact, Done, Finished
from omnivideo.conversations import Conversations
from omnivideo.errors import OmniVideoError
from omnivideo.studio import Studio
from omnivideo.training.facts import Demand, Reading, Wanted
from omnivideo.training.scorer import read


@dataclass(frozen=True)
class Say:
    """One turn: the words, what is right (things to be seen, or an answer), and after which turn it branches off."""

    text: str
    right: Demand | str
    fork: int | None = None


def seen(*things: tuple[str, str] | tuple[str, str, str], background: str | None = None) -> Demand:
    """Each thing as (colour, shape), and its motion in a clip."""
    wants = (Wanted(one[1], one[0], None, one[2] if len(one) > 2 else None) for one in things)
    return Demand(tuple(wants), background=background)


TURNS = (
    Say("a small red circle moving right", seen(("red", "circle", "right"))),
    Say("make it blue", seen(("blue", "circle", "right"))),
    Say("how does the circle move?", "it moves right"),
    Say("a picture of a large yellow star on a black background", seen(("yellow", "star"), background="black")),
    Say("add a small green square", seen(("yellow", "star"), ("green", "square"), background="black")),
    Say("change the background to pink", seen(("yellow", "star"), ("green", "square"), background="pink")),
    Say("how many objects are there?", "two"),
    Say("a picture of a shape like a coin, the colour of grass", seen(("green", "circle"))),
    Say("turn it into a square", seen(("red", "square", "right")), fork=1),
)


def facts(reading: Reading, video: bool) -> str:
    """What the scorer reads off a result, as one line; "?" for what it cannot name."""
    fields = ("size", "colour", "shape", "motion") if video else ("size", "colour", "shape")
    things = [" ".join(getattr(thing, field) or "?" for field in fields) for thing in reading.things]
    return f"{'; '.join(things) or 'nothing'} on {reading.background or '?'}"


def verdict(turn: Say, done: Done, frames: Callable[[Artifact], np.ndarray]) -> tuple[bool, str]:
    """Whether what came of a turn is right, and what the scorer (or the answer) says."""
    if isinstance(turn.right, str):
        return done.answer == turn.right, done.answer or "no answer"
    if done.artifact is None:
        return False, done.answer or "nothing was drawn"
    reading = read(frames(done.artifact))
    return turn.right.met_by(reading), facts(reading, done.artifact.medium == "video")


def one_turn(thread: Thread, turn: Say) -> Done | None:
    """The turn's last act; None where the thread asked back."""
    last = list(thread.send(turn.text))[-1]
    return last.turn.done[-1] if isinstance(last, Finished) else None


def main(folder: Path, out: Console, studio: Studio) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    talk: Conversations = studio.conversations
    thread, rows, captions, right = talk.thread("demo", create=True), [], [], 0  # its seeds follow from its name
    for number, turn in enumerate(TURNS, start=1):
        at = thread if turn.fork is None else thread.fork(turn.fork, f"{thread.id}-{number}")
        done = one_turn(at, turn)
        good, told = verdict(turn, done, talk.frames) if done else (False, "it asked back")
        right += good
        branch = "" if turn.fork is None else f"(a branch after turn {turn.fork}) "
        out.print(f"[bold]{number}. {branch}{turn.text}[/bold]\n   {told}  {'[green]right' if good else '[red]wrong'}")
        if done and done.trace:
            out.print(f"   [dim]thought: {done.trace.reasoning}; so: {done.trace.rewrite}[/dim]")
        if done and done.artifact:
            name = f"{number}{Path(done.artifact.key).suffix}"
            shutil.copyfile(studio.file(done.artifact), folder / name)
            rows.append(list(talk.frames(done.artifact)))
            captions.append(f"{number}. {branch}{turn.text}")
        elif captions and done:
            captions[-1] += f"   {turn.text} - {told}"
    if rows:
        contact_sheet(rows, captions).save(folder / "contact-sheet.png")
        out.print(f"all of it on one sheet: {folder / 'contact-sheet.png'}")
    out.print(f"{right} of {len(TURNS)} turns right, by the scorer")


if __name__ == "__main__":
    try:
        with tempfile.TemporaryDirectory() as home:
            main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo"), Console(), Studio(home=home))
    except OmniVideoError as error:
        sys.exit(f"error: {error}")

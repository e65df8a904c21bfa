"""The main job in one go: a conversation that makes a clip and a still, changes them, asks about them, goes back to
the first turn on a branch, and solves a riddle; every turn is scored.

python -m omnivideo.cli.demo out/demo
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from omnivideo.agent.conversations import Conversations
from omnivideo.agent.thread import Thread
from omnivideo.contracts import ActionResult, Artifact, TurnCompleted
from omnivideo.errors import OmniVideoError
from omnivideo.media.artifacts import load_frames
from omnivideo.media.contact_sheet import make_contact_sheet
from omnivideo.synthetic.facts import ObjectSpec, SceneDetection, SceneSpec
from omnivideo.synthetic.scorer import detect_scene

if TYPE_CHECKING:
    from omnivideo.sdk.studio import Studio


@dataclass(frozen=True)
class DemoTurn:
    """One turn: the words, what is right (things to be seen, or an answer), and after which turn it branches off."""

    text: str
    expected: SceneSpec | str
    fork_after: int | None = None


def build_scene_spec(*objects: tuple[str, str] | tuple[str, str, str], background: str | None = None) -> SceneSpec:
    """Each thing as (colour, shape), and its motion in a clip."""
    wants = (ObjectSpec(one[1], one[0], None, one[2] if len(one) > 2 else None) for one in objects)
    return SceneSpec(tuple(wants), background=background)


DEMO_TURNS = (
    DemoTurn("a small red circle moving right", build_scene_spec(("red", "circle", "right"))),
    DemoTurn("make it blue", build_scene_spec(("blue", "circle", "right"))),
    DemoTurn("how does the circle move?", "it moves right"),
    DemoTurn(
        "a picture of a large yellow star on a black background",
        build_scene_spec(("yellow", "star"), background="black"),
    ),
    DemoTurn("add a small green square", build_scene_spec(("yellow", "star"), ("green", "square"), background="black")),
    DemoTurn(
        "change the background to pink", build_scene_spec(("yellow", "star"), ("green", "square"), background="pink")
    ),
    DemoTurn("how many objects are there?", "two"),
    DemoTurn("a picture of a shape like a coin, the colour of grass", build_scene_spec(("green", "circle"))),
    DemoTurn("turn it into a square", build_scene_spec(("red", "square", "right")), fork_after=1),
)


def describe_detection(detection: SceneDetection, is_video: bool) -> str:
    """What the scorer reads off a result, as one line; "?" for what it cannot name."""
    fields = ("size", "colour", "shape", "motion") if is_video else ("size", "colour", "shape")
    things = [" ".join(getattr(thing, field) or "?" for field in fields) for thing in detection.objects]
    return f"{'; '.join(things) or 'nothing'} on {detection.background or '?'}"


def judge_turn(turn: DemoTurn, done: ActionResult, load_frames: Callable[[Artifact], np.ndarray]) -> tuple[bool, str]:
    """Whether what came of a turn is right, and what the scorer (or the answer) says."""
    if isinstance(turn.expected, str):
        return done.answer == turn.expected, done.answer or "no answer"
    if done.artifact is None:
        return False, done.answer or "nothing was drawn"
    reading = detect_scene(load_frames(done.artifact))
    return turn.expected.is_met_by(reading), describe_detection(reading, done.artifact.medium == "video")


def run_turn(thread: Thread, turn: DemoTurn) -> ActionResult | None:
    """The turn's last act; None where the thread asked back."""
    last = list(thread.send(turn.text))[-1]
    return last.turn.results[-1] if isinstance(last, TurnCompleted) else None


def run_demo(folder: Path, console: Console, studio: "Studio") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    conversations: Conversations = studio.conversations
    read_frames = partial(load_frames, conversations.store)
    thread, rows, captions, right = (
        conversations.open_thread("demo", create=True),
        [],
        [],
        0,
    )  # its seeds follow from its name
    for number, turn in enumerate(DEMO_TURNS, start=1):
        active_thread = thread if turn.fork_after is None else thread.fork(turn.fork_after, f"{thread.id}-{number}")
        done = run_turn(active_thread, turn)
        good, finding = judge_turn(turn, done, read_frames) if done else (False, "it asked back")
        right += good
        branch = "" if turn.fork_after is None else f"(a branch after turn {turn.fork_after}) "
        console.print(
            f"[bold]{number}. {branch}{turn.text}[/bold]\n   {finding}  {'[green]right' if good else '[red]wrong'}"
        )
        if done and done.trace:
            console.print(f"   [dim]thought: {done.trace.reasoning}; so: {done.trace.rewrite}[/dim]")
        if done and done.artifact:
            name = f"{number}{Path(done.artifact.key).suffix}"
            shutil.copyfile(studio.artifact_path(done.artifact), folder / name)
            rows.append(list(read_frames(done.artifact)))
            captions.append(f"{number}. {branch}{turn.text}")
        elif captions and done:
            captions[-1] += f"   {turn.text} - {finding}"
    if rows:
        make_contact_sheet(rows, captions).save(folder / "contact-sheet.png")
        console.print(f"all of it on one sheet: {folder / 'contact-sheet.png'}")
    console.print(f"{right} of {len(DEMO_TURNS)} turns right, by the scorer")


def main() -> None:
    """Run the demo into the folder named on the command line, with threads in a temporary home."""
    from omnivideo import Studio  # torch is loaded here, once the CPU threads are configured

    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo")
    try:
        with tempfile.TemporaryDirectory() as home:
            run_demo(folder, Console(), Studio(home=home))
    except OmniVideoError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""A scored demo: a conversation that generates, edits and asks about clips and images, forks, and solves a riddle.

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
from rich.text import Text

from omnivideo.agent.thread import Thread
from omnivideo.contracts import Artifact
from omnivideo.errors import OmniVideoError
from omnivideo.media.artifacts import load_frames
from omnivideo.media.contact_sheet import make_contact_sheet
from omnivideo.startup import skip_final_collection
from omnivideo.synthetic.facts import ObjectSpec, SceneDetection, SceneSpec
from omnivideo.synthetic.scorer import detect_scene
from omnivideo.turns import ActionResult, TurnCompleted

if TYPE_CHECKING:
    from omnivideo.sdk.studio import Studio


@dataclass(frozen=True)
class DemoTurn:
    """One turn: its text, the expected scene or answer, and the turn after which it forks the thread, if any."""

    text: str
    expected: SceneSpec | str
    fork_after: int | None = None


def build_scene_spec(*objects: tuple[str, str] | tuple[str, str, str], background: str | None = None) -> SceneSpec:
    """Build a scene from (colour, shape) of each object, with its motion as a third item in clips."""
    specs = (ObjectSpec(shape, colour, None, motion[0] if motion else None) for colour, shape, *motion in objects)
    return SceneSpec(tuple(specs), background=background)


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
    """Return the scorer's detections as one line, with "?" for what it could not identify."""
    fields = ("size", "colour", "shape", "motion") if is_video else ("size", "colour", "shape")
    objects = [" ".join(getattr(item, field) or "?" for field in fields) for item in detection.objects]
    return f"{'; '.join(objects) or 'nothing'} on {detection.background or '?'}"


def judge_turn(turn: DemoTurn, result: ActionResult, read_frames: Callable[[Artifact], np.ndarray]) -> tuple[bool, str]:
    """Return whether a turn's result is right, and what the scorer detected or the model answered."""
    if isinstance(turn.expected, str):
        return result.answer == turn.expected, result.answer or "no answer"
    if result.artifact is None:
        return False, result.answer or "nothing was generated"
    detection = detect_scene(read_frames(result.artifact))
    return turn.expected.is_met_by(detection), describe_detection(detection, result.artifact.medium == "video")


def run_turn(thread: Thread, turn: DemoTurn) -> ActionResult | None:
    """Return the result of the turn's last action, or None if the model has asked a question."""
    last_event = list(thread.send(turn.text))[-1]
    return last_event.turn.results[-1] if isinstance(last_event, TurnCompleted) else None


def run_demo(folder: Path, console: Console, studio: "Studio") -> None:
    """Run and score all turns; write the clips and images, and a contact sheet of them, to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    read_frames = partial(load_frames, studio.conversations.store)
    thread = studio.conversations.open_thread("demo", create=True)  # the seeds are derived from the thread's name
    rows: list[list[np.ndarray]] = []
    captions: list[str] = []
    right_count = 0
    for number, turn in enumerate(DEMO_TURNS, start=1):
        active_thread = thread if turn.fork_after is None else thread.fork(turn.fork_after, f"{thread.id}-{number}")
        result = run_turn(active_thread, turn)
        is_right, finding = judge_turn(turn, result, read_frames) if result else (False, "a question")
        right_count += is_right
        title = f"{number}. {'' if turn.fork_after is None else f'(a branch after turn {turn.fork_after}) '}{turn.text}"
        verdict = "[green]right" if is_right else "[red]wrong"
        console.print(f"[bold]{title}[/bold]\n   {finding}  {verdict}")
        if result and result.trace:
            console.print(f"   [dim]reasoning: {result.trace.reasoning}; prompt: {result.trace.rewrite}[/dim]")
        if result and result.artifact:
            path = folder / f"{number}{Path(result.artifact.key).suffix}"
            shutil.copyfile(studio.artifact_path(result.artifact), path)
            rows.append(list(read_frames(result.artifact)))
            captions.append(title)
        elif captions and result:
            captions[-1] += f"   {turn.text} - {finding}"
    if rows:
        make_contact_sheet(rows, captions).save(folder / "contact-sheet.png")
        console.print(Text(f"contact sheet: {folder / 'contact-sheet.png'}"), soft_wrap=True)
    console.print(f"{right_count} of {len(DEMO_TURNS)} turns right, by the scorer")


def main() -> None:
    """Run the demo into the folder named on the command line, with threads in a temporary home."""
    from omnivideo import Studio  # torch is loaded here, once the CPU threads are configured

    skip_final_collection()

    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo")
    try:
        with tempfile.TemporaryDirectory() as home:
            run_demo(folder, Console(), Studio(home=home))
    except OmniVideoError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

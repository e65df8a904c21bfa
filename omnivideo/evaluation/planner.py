"""The planner's evaluation: routing and splitting, think mode, check, and conversations scored at every turn.

Everything goes through `Thread.send`, as a user's words do; clips are read by the world's scorer.
"""

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from omnivideo.contracts import Artifact, Ask, Done, Finished, Turn
from omnivideo.evaluation.prompts import prompts
from omnivideo.evaluation.suite import Score, Tell, score
from omnivideo.ports import MLLM
from omnivideo.training.edits import CHANGES, demand_of, random_edit
from omnivideo.training.facts import Demand
from omnivideo.training.language import plain
from omnivideo.training.questions import ask_background, ask_colour, ask_count, ask_presence
from omnivideo.training.recipes.mllm import (
    caption_prompt,
    knowledge_sample,
    medium,
    question_sample,
    riddle_prompt,
    still_prompt,
    talk_sample,
)
from omnivideo.training.riddles import random_riddle
from omnivideo.training.scorer import read
from omnivideo.training.world import Scene, random_scene

# What the evaluation needs of a thread: words in, the whole turn out (None where it asked back).
Say = Callable[..., Turn | None]
OpenThread = Callable[[], Say]
Frames = Callable[[Artifact], np.ndarray]


def saying(send: Callable[..., Iterator]) -> Say:
    """A thread's `send` that gives the turn alone."""

    def say(text: str, **options: object) -> Turn | None:
        (last,) = deque(send(text, **options), maxlen=1)
        return last.turn if isinstance(last, Finished) else None

    return say


# ---------------------------------------------------------------- think and check


@dataclass
class Row:
    """Successes and seconds of one setting over the same prompts and seeds."""

    right: list[bool] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def score(self) -> Score:
        return score(self.right)


def tried(open_thread: OpenThread, frames: Frames, text: str, demand: Demand, row: Row, **options: object) -> None:
    say = open_thread()
    began = time.perf_counter()
    turn = say(text, **options)
    row.seconds += time.perf_counter() - began
    row.right.append(turn is not None and shows(demand)(turn.done[-1], frames))


def thinking(open_thread: OpenThread, frames: Frames, count: int, tell: Tell) -> dict[str, Row]:
    """Held-out riddles and plain prompts with think off, on and auto, each at the same seed."""
    rng = random.Random("evaluation/thinking")
    rows = {f"{kind}, think {mode}": Row() for kind in ("reasoning", "plain") for mode in ("off", "on", "auto")}
    for at, told in enumerate(prompts(count, ["colours"])):
        riddle = random_riddle(rng, False, "held_out")
        for kind, text, demand in (
            ("reasoning", still_prompt(rng, riddle.prompt), riddle.demand), ("plain", told.text, told.demand)
        ):  # fmt: skip
            for mode in ("off", "on", "auto"):
                tried(open_thread, frames, text, demand, rows[f"{kind}, think {mode}"], think=mode, seed=at)
        tell("thinking", at + 1, count)
    return rows


def checking(open_thread: OpenThread, frames: Frames, count: int, tell: Tell) -> dict[str, Row]:
    """Two objects, counting and colour attribution with one try and with up to four."""
    rows: dict[str, Row] = {}
    for category in ("two", "counting", "colour attribution"):
        for at, one in enumerate(prompts(count, [category])):
            for tries in (1, 4):
                row = rows.setdefault(f"{category}, {tries} tries", Row())
                tried(open_thread, frames, one.text, one.demand, row, think="off", check=tries, seed=at)
            tell(category, at + 1, count)
    return rows


# ---------------------------------------------------------------- routing


def labelled(rng: random.Random) -> tuple[str, str]:
    """Words without an attachment, and what they ask for."""
    kind = rng.choice(("image", "video", "text"))
    if kind == "text":
        make = rng.choice((knowledge_sample, talk_sample))
        return make(rng, False)[0].text, kind
    make_prompt = rng.choice((caption_prompt, caption_prompt, riddle_prompt))
    return make_prompt(rng, kind == "video")[0], kind


def confusion(mllm: MLLM, count: int, tell: Tell) -> Counter[tuple[str, str]]:
    """How often each kind of request was taken for each route."""
    rng, table = random.Random("evaluation/planner/routing"), Counter[tuple[str, str]]()
    for at in range(count):
        text, expected = labelled(rng)
        table[expected, mllm.route(Ask(text=text)).kind] += 1
        tell("routing", at + 1, count)
    return table


# ---------------------------------------------------------------- conversations


@dataclass(frozen=True)
class Line:
    """One turn of a script: the words, and whether what came of them is right."""

    text: str
    right: Callable[[Done, Frames], bool]


def shows(demand: Demand) -> Callable[[Done, Frames], bool]:
    return lambda done, frames: done.artifact is not None and demand.met_by(read(frames(done.artifact)))


def says(answer: str) -> Callable[[Done, Frames], bool]:
    return lambda done, frames: done.answer == answer


def script(rng: random.Random, turns: int = 10) -> list[Line]:
    """A conversation that begins with a picture or a clip, changes it, asks about it, begins anew, and goes back."""
    video = rng.random() < 0.5
    lines, scene = [], first_scene(rng, video)
    lines.append(opening(scene))
    while len(lines) < turns:
        lot = rng.random()
        if lot < 0.45 and (change := CHANGES[rng.choice(("recolour", "reshape", "remove", "background"))](rng, scene)):
            scene = change[0]
            lines.append(Line(change[1], shows(demand_of(scene))))
        elif lot < 0.8:
            ask = rng.choice((ask_count, ask_colour, ask_background, ask_presence))
            if question := ask(rng, scene):
                lines.append(Line(question.text, says(question.answer)))
        elif lot < 0.9:
            scene = first_scene(rng, video := rng.random() < 0.5)
            lines.append(opening(scene))
        else:
            riddle = random_riddle(rng, False)
            lines.append(Line("a picture of " + riddle.prompt, shows(riddle.demand)))
            lines.append(opening(scene := first_scene(rng, video)))
    return lines[:turns]


def first_scene(rng: random.Random, video: bool) -> Scene:
    """One or two objects: what the next turns can speak about without naming places."""
    while True:
        scene = random_scene(rng, video, "held_out")
        if len(scene.things) <= 2:
            return scene


def opening(scene: Scene) -> Line:
    demand = demand_of(scene)
    return Line(f"draw a {medium(scene.is_video)}{plain(demand)}", shows(demand))


def conversations(open_thread: OpenThread, frames: Frames, count: int, tell: Tell) -> Score:
    """Share of right turns over `count` scripted conversations of ten turns; one that asks back counts as wrong."""
    rng, verdicts = random.Random("evaluation/conversations"), []
    for at in range(count):
        say = open_thread()
        for line in script(rng):
            turn = say(line.text, seed=at)
            verdicts.append(bool(turn) and line.right(turn.done[-1], frames))  # type: ignore[union-attr]
        tell("conversations", at + 1, count)
    return score(verdicts)


def joined_acts(rng: random.Random) -> tuple[str, list[str]]:
    """A turn of two or three acts, and the acts."""
    parts = [caption_prompt(rng, rng.random() < 0.5)[0], random_edit(rng, False, "held_out", ["recolour"]).instruction]
    parts += [question_sample(rng, False)[0].text] * (rng.random() < 0.5)
    return rng.choice(("; ", ", then ", ". ", ", and then ", "; now ")).join(parts), parts


def splitting(acts: Callable[[str], Sequence[str]], count: int) -> Score:
    rng = random.Random("evaluation/splitting")
    cases = [joined_acts(rng) for _ in range(count)]
    return score([len(acts(text)) == len(parts) for text, parts in cases])

"""The planner's evaluation: routing and splitting, think mode, check, and conversations scored at every turn.

Everything goes through `Thread.send`, as a user's words do; clips are read by the world's scorer.
"""

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from omnivideo.contracts import ActionResult, Artifact, MLLMRequest, Turn, TurnCompleted
from omnivideo.evaluation.prompts import sample_prompts
from omnivideo.evaluation.suite import EvaluationProgress, Score, score_verdicts
from omnivideo.ports import MLLM
from omnivideo.synthetic.captions import to_canonical_text
from omnivideo.synthetic.edits import EDIT_MAKERS, sample_edit, spec_from_scene
from omnivideo.synthetic.facts import SceneSpec
from omnivideo.synthetic.indirect_requests import sample_indirect_request
from omnivideo.synthetic.questions import ask_background, ask_colour, ask_count, ask_presence
from omnivideo.synthetic.scenes import Scene, sample_scene
from omnivideo.synthetic.scorer import detect_scene
from omnivideo.training.tiny.mllm import (
    get_medium_prefix,
    make_caption_prompt,
    make_indirect_prompt,
    make_knowledge_sample,
    make_question_sample,
    make_talk_sample,
    phrase_still_request,
)

# What the evaluation needs of a thread: words in, the whole turn out (None where it asked back).
SendTurn = Callable[..., Turn | None]
OpenThread = Callable[[], SendTurn]
LoadFrames = Callable[[Artifact], np.ndarray]


def make_turn_sender(send: Callable[..., Iterator]) -> SendTurn:
    """A thread's `send` that gives the turn alone."""

    def send_turn(text: str, **options: object) -> Turn | None:
        (last,) = deque(send(text, **options), maxlen=1)
        return last.turn if isinstance(last, TurnCompleted) else None

    return send_turn


# ---------------------------------------------------------------- think and check


@dataclass
class Tally:
    """Successes and seconds of one setting over the same prompts and seeds."""

    verdicts: list[bool] = field(default_factory=list)
    total_seconds: float = 0.0

    @property
    def score(self) -> Score:
        return score_verdicts(self.verdicts)


def run_attempt(
    open_thread: OpenThread, load_frames: LoadFrames, text: str, scene_spec: SceneSpec, tally: Tally, **options: object
) -> None:
    send_turn = open_thread()
    began = time.perf_counter()
    turn = send_turn(text, **options)
    tally.total_seconds += time.perf_counter() - began
    tally.verdicts.append(turn is not None and make_scene_check(scene_spec)(turn.results[-1], load_frames))


def evaluate_think_modes(
    open_thread: OpenThread, load_frames: LoadFrames, count: int, on_progress: EvaluationProgress
) -> dict[str, Tally]:
    """Held-out riddles and plain prompts with think off, on and auto, each at the same seed."""
    rng = random.Random("evaluation/thinking")
    rows = {f"{kind}, think {mode}": Tally() for kind in ("reasoning", "plain") for mode in ("off", "on", "auto")}
    for index, plain_prompt in enumerate(sample_prompts(count, ["colours"])):
        riddle = sample_indirect_request(rng, False, "held_out")
        for kind, text, demand in (
            ("reasoning", phrase_still_request(rng, riddle.prompt), riddle.scene_spec),
            ("plain", plain_prompt.text, plain_prompt.scene_spec),
        ):
            for mode in ("off", "on", "auto"):
                run_attempt(
                    open_thread, load_frames, text, demand, rows[f"{kind}, think {mode}"], think=mode, seed=index
                )
        on_progress("thinking", index + 1, count)
    return rows


def evaluate_best_of_candidates(
    open_thread: OpenThread, load_frames: LoadFrames, count: int, on_progress: EvaluationProgress
) -> dict[str, Tally]:
    """Two objects, counting and colour attribution with one try and with up to four."""
    rows: dict[str, Tally] = {}
    for category in ("two", "counting", "colour attribution"):
        for index, prompt in enumerate(sample_prompts(count, [category])):
            for tries in (1, 4):
                row = rows.setdefault(f"{category}, {tries} tries", Tally())
                run_attempt(
                    open_thread, load_frames, prompt.text, prompt.scene_spec, row, think="off", check=tries, seed=index
                )
            on_progress(category, index + 1, count)
    return rows


# ---------------------------------------------------------------- routing


def sample_labelled_request(rng: random.Random) -> tuple[str, str]:
    """Words without an attachment, and what they ask for."""
    kind = rng.choice(("image", "video", "text"))
    if kind == "text":
        make = rng.choice((make_knowledge_sample, make_talk_sample))
        return make(rng, False)[0].text, kind
    make_prompt = rng.choice((make_caption_prompt, make_caption_prompt, make_indirect_prompt))
    return make_prompt(rng, kind == "video")[0], kind


def count_route_confusions(mllm: MLLM, count: int, on_progress: EvaluationProgress) -> Counter[tuple[str, str]]:
    """How often each kind of request was taken for each route."""
    rng, table = random.Random("evaluation/planner/routing"), Counter[tuple[str, str]]()
    for at in range(count):
        text, expected = sample_labelled_request(rng)
        table[expected, mllm.route(MLLMRequest(text=text)).kind] += 1
        on_progress("routing", at + 1, count)
    return table


# ---------------------------------------------------------------- conversations


@dataclass(frozen=True)
class ScriptedTurn:
    """One turn of a script: the words, and whether what came of them is right."""

    text: str
    is_right: Callable[[ActionResult, LoadFrames], bool]


def make_scene_check(scene_spec: SceneSpec) -> Callable[[ActionResult, LoadFrames], bool]:
    return lambda done, frames: done.artifact is not None and scene_spec.is_met_by(detect_scene(frames(done.artifact)))


def make_answer_check(expected: str) -> Callable[[ActionResult, LoadFrames], bool]:
    return lambda done, frames: done.answer == expected


def sample_script(rng: random.Random, turn_count: int = 10) -> list[ScriptedTurn]:
    """A conversation that begins with a picture or a clip, changes it, asks about it, begins anew, and goes back."""
    video = rng.random() < 0.5
    lines, scene = [], sample_first_scene(rng, video)
    lines.append(make_opening_turn(scene))
    while len(lines) < turn_count:
        lot = rng.random()
        if lot < 0.45 and (
            change := EDIT_MAKERS[rng.choice(("recolour", "reshape", "remove", "background"))](rng, scene)
        ):
            scene = change[0]
            lines.append(ScriptedTurn(change[1], make_scene_check(spec_from_scene(scene))))
        elif lot < 0.8:
            ask = rng.choice((ask_count, ask_colour, ask_background, ask_presence))
            if question := ask(rng, scene):
                lines.append(ScriptedTurn(question.text, make_answer_check(question.answer)))
        elif lot < 0.9:
            scene = sample_first_scene(rng, video := rng.random() < 0.5)
            lines.append(make_opening_turn(scene))
        else:
            riddle = sample_indirect_request(rng, False)
            lines.append(ScriptedTurn("a picture of " + riddle.prompt, make_scene_check(riddle.scene_spec)))
            lines.append(make_opening_turn(scene := sample_first_scene(rng, video)))
    return lines[:turn_count]


def sample_first_scene(rng: random.Random, video: bool) -> Scene:
    """One or two objects: what the next turns can speak about without naming places."""
    while True:
        scene = sample_scene(rng, video, "held_out")
        if len(scene.objects) <= 2:
            return scene


def make_opening_turn(scene: Scene) -> ScriptedTurn:
    demand = spec_from_scene(scene)
    return ScriptedTurn(
        f"draw a {get_medium_prefix(scene.is_video)}{to_canonical_text(demand)}", make_scene_check(demand)
    )


def evaluate_conversations(
    open_thread: OpenThread, load_frames: LoadFrames, count: int, on_progress: EvaluationProgress
) -> Score:
    """Share of right turns over `count` scripted conversations of ten turns; one that asks back counts as wrong."""
    rng, verdicts = random.Random("evaluation/conversations"), []
    for at in range(count):
        send_turn = open_thread()
        for line in sample_script(rng):
            turn = send_turn(line.text, seed=at)
            verdicts.append(bool(turn) and line.is_right(turn.results[-1], load_frames))  # type: ignore[union-attr]
        on_progress("conversations", at + 1, count)
    return score_verdicts(verdicts)


def sample_joined_actions(rng: random.Random) -> tuple[str, list[str]]:
    """A turn of two or three acts, and the acts."""
    parts = [
        make_caption_prompt(rng, rng.random() < 0.5)[0],
        sample_edit(rng, False, "held_out", ["recolour"]).instruction,
    ]
    parts += [make_question_sample(rng, False)[0].text] * (rng.random() < 0.5)
    return rng.choice(("; ", ", then ", ". ", ", and then ", "; now ")).join(parts), parts


def evaluate_splitting(split_actions: Callable[[str], Sequence[str]], count: int) -> Score:
    rng = random.Random("evaluation/splitting")
    cases = [sample_joined_actions(rng) for _ in range(count)]
    return score_verdicts([len(split_actions(text)) == len(parts) for text, parts in cases])

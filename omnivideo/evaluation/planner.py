"""Evaluate the planner: routing, splitting, think mode, candidates, and conversations scored at every turn.

Requests go through `Thread.send`, as a user's do. The scorer of the synthetic world reads the clips.
"""

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from omnivideo.contracts import Artifact, MLLMRequest
from omnivideo.evaluation.prompts import sample_prompts
from omnivideo.evaluation.suite import EvaluationProgress, Score, score_verdicts
from omnivideo.ports import MLLM
from omnivideo.synthetic.captions import to_canonical_text
from omnivideo.synthetic.chat import make_knowledge_example, make_question_example, make_talk_example
from omnivideo.synthetic.edits import EDIT_MAKERS, sample_edit, spec_from_scene
from omnivideo.synthetic.facts import SceneSpec
from omnivideo.synthetic.indirect_requests import sample_indirect_request
from omnivideo.synthetic.questions import ask_background, ask_colour, ask_count, ask_presence
from omnivideo.synthetic.requests import (
    get_medium_prefix,
    make_caption_prompt,
    make_indirect_prompt,
    phrase_still_request,
)
from omnivideo.synthetic.scenes import Scene, sample_scene
from omnivideo.synthetic.scorer import detect_scene
from omnivideo.turns import ActionResult, Turn, TurnCompleted, TurnEvent

# The only operation of a thread in the evaluation: it sends a text and returns the turn, or None for a question back.
SendTurn = Callable[..., Turn | None]
OpenThread = Callable[[], SendTurn]
LoadFrames = Callable[[Artifact], np.ndarray]


def make_turn_sender(send: Callable[..., Iterator[TurnEvent]]) -> SendTurn:
    """Return a function that sends a message through a thread's `send`, and returns the completed turn."""

    def send_turn(text: str, **options: object) -> Turn | None:
        (last_event,) = deque(send(text, **options), maxlen=1)
        return last_event.turn if isinstance(last_event, TurnCompleted) else None

    return send_turn


# ---------------------------------------------------------------- think mode and candidates


@dataclass
class Tally:
    """Verdicts and total seconds of one setting; all settings share prompts and seeds."""

    verdicts: list[bool] = field(default_factory=list)
    total_seconds: float = 0.0

    @property
    def score(self) -> Score:
        return score_verdicts(self.verdicts)


def run_attempt(
    open_thread: OpenThread, load_frames: LoadFrames, text: str, scene_spec: SceneSpec, tally: Tally, **options: object
) -> None:
    """Send a prompt in a new thread, and add the verdict and the seconds to the tally."""
    send_turn = open_thread()
    began = time.perf_counter()
    turn = send_turn(text, **options)
    tally.total_seconds += time.perf_counter() - began
    tally.verdicts.append(turn is not None and make_scene_check(scene_spec)(turn.results[-1], load_frames))


def evaluate_think_modes(
    open_thread: OpenThread, load_frames: LoadFrames, count: int, on_progress: EvaluationProgress
) -> dict[str, Tally]:
    """Compare think modes off, on and auto on held-out indirect and plain prompts, with the same seeds."""
    rng = random.Random("evaluation/thinking")
    rows = {f"{kind}, think {mode}": Tally() for kind in ("reasoning", "plain") for mode in ("off", "on", "auto")}
    for index, plain_prompt in enumerate(sample_prompts(count, ["colours"])):
        indirect = sample_indirect_request(rng, False, "held_out")
        for kind, text, scene_spec in (
            ("reasoning", phrase_still_request(rng, indirect.prompt), indirect.scene_spec),
            ("plain", plain_prompt.text, plain_prompt.scene_spec),
        ):
            for mode in ("off", "on", "auto"):
                tally = rows[f"{kind}, think {mode}"]
                run_attempt(open_thread, load_frames, text, scene_spec, tally, think=mode, seed=index)
        on_progress("thinking", index + 1, count)
    return rows


def evaluate_best_of_candidates(
    open_thread: OpenThread, load_frames: LoadFrames, count: int, on_progress: EvaluationProgress
) -> dict[str, Tally]:
    """Compare one candidate with up to four, on prompts with two objects, counts and colour attribution."""
    rows: dict[str, Tally] = {}
    for category in ("two", "counting", "colour attribution"):
        for index, prompt in enumerate(sample_prompts(count, [category])):
            for candidates in (1, 4):
                tally = rows.setdefault(f"{category}, {candidates} tries", Tally())
                options = {"think": "off", "check": candidates, "seed": index}
                run_attempt(open_thread, load_frames, prompt.text, prompt.scene_spec, tally, **options)
            on_progress(category, index + 1, count)
    return rows


# ---------------------------------------------------------------- routing


def sample_labelled_request(rng: random.Random) -> tuple[str, str]:
    """Return a request without an attachment, and the route that it should take."""
    kind = rng.choice(("image", "video", "text"))
    if kind == "text":
        make_example = rng.choice((make_knowledge_example, make_talk_example))
        return make_example(rng, False).text, kind
    make_prompt = rng.choice((make_caption_prompt, make_caption_prompt, make_indirect_prompt))
    return make_prompt(rng, kind == "video")[0], kind


def count_route_confusions(mllm: MLLM, count: int, on_progress: EvaluationProgress) -> Counter[tuple[str, str]]:
    """Count how often requests for each route took each route: (expected, actual) -> number."""
    rng, confusions = random.Random("evaluation/planner/routing"), Counter[tuple[str, str]]()
    for index in range(count):
        text, expected = sample_labelled_request(rng)
        confusions[expected, mllm.route(MLLMRequest(text=text)).kind] += 1
        on_progress("routing", index + 1, count)
    return confusions


# ---------------------------------------------------------------- conversations


ResultCheck = Callable[[ActionResult, LoadFrames], bool]


@dataclass(frozen=True)
class ScriptedTurn:
    """The user's text in a turn, and the check of its result."""

    text: str
    is_right: ResultCheck


def make_scene_check(scene_spec: SceneSpec) -> ResultCheck:
    """Return a check that the result shows the requested content."""

    def check_scene(result: ActionResult, load_frames: LoadFrames) -> bool:
        return result.artifact is not None and scene_spec.is_met_by(detect_scene(load_frames(result.artifact)))

    return check_scene


def make_answer_check(expected: str) -> ResultCheck:
    return lambda result, load_frames: result.answer == expected


def sample_script(rng: random.Random, turn_count: int = 10) -> list[ScriptedTurn]:
    """Return a conversation that generates an image or a clip, edits it, asks about it, and starts again."""
    video = rng.random() < 0.5
    turns, scene = [], sample_first_scene(rng, video)
    turns.append(make_opening_turn(scene))
    while len(turns) < turn_count:
        chance = rng.random()
        if chance < 0.45 and (
            change := EDIT_MAKERS[rng.choice(("recolour", "reshape", "remove", "background"))](rng, scene)
        ):
            scene = change[0]
            turns.append(ScriptedTurn(change[1], make_scene_check(spec_from_scene(scene))))
        elif chance < 0.8:
            ask = rng.choice((ask_count, ask_colour, ask_background, ask_presence))
            if question := ask(rng, scene):
                turns.append(ScriptedTurn(question.text, make_answer_check(question.answer)))
        elif chance < 0.9:
            scene = sample_first_scene(rng, video := rng.random() < 0.5)
            turns.append(make_opening_turn(scene))
        else:
            indirect = sample_indirect_request(rng, False)
            turns.append(ScriptedTurn("a picture of " + indirect.prompt, make_scene_check(indirect.scene_spec)))
            turns.append(make_opening_turn(scene := sample_first_scene(rng, video)))
    return turns[:turn_count]


def sample_first_scene(rng: random.Random, video: bool) -> Scene:
    """Return a scene of one or two objects, which later turns can refer to without naming places."""
    while True:
        scene = sample_scene(rng, video, "held_out")
        if len(scene.objects) <= 2:
            return scene


def make_opening_turn(scene: Scene) -> ScriptedTurn:
    scene_spec = spec_from_scene(scene)
    text = f"draw a {get_medium_prefix(scene.is_video)}{to_canonical_text(scene_spec)}"
    return ScriptedTurn(text, make_scene_check(scene_spec))


def evaluate_conversations(
    open_thread: OpenThread, load_frames: LoadFrames, count: int, on_progress: EvaluationProgress
) -> Score:
    """Score the turns of `count` conversations of ten turns. A turn that asks the user a question counts as wrong."""
    rng, verdicts = random.Random("evaluation/conversations"), list[bool]()
    for index in range(count):
        send_turn = open_thread()
        for scripted_turn in sample_script(rng):
            turn = send_turn(scripted_turn.text, seed=index)
            verdicts.append(turn is not None and scripted_turn.is_right(turn.results[-1], load_frames))
        on_progress("conversations", index + 1, count)
    return score_verdicts(verdicts)


def sample_joined_actions(rng: random.Random) -> tuple[str, list[str]]:
    """Return a text that requests two or three actions, and the texts of the actions."""
    parts = [
        make_caption_prompt(rng, rng.random() < 0.5)[0],
        sample_edit(rng, False, "held_out", ["recolour"]).instruction,
    ]
    parts += [make_question_example(rng, False).text] * (rng.random() < 0.5)
    return rng.choice(("; ", ", then ", ". ", ", and then ", "; now ")).join(parts), parts


def evaluate_splitting(split_actions: Callable[[str], Sequence[str]], count: int) -> Score:
    """Score whether joined requests are split into the right number of actions."""
    rng = random.Random("evaluation/splitting")
    cases = [sample_joined_actions(rng) for _ in range(count)]
    return score_verdicts([len(split_actions(text)) == len(parts) for text, parts in cases])

"""Evaluate what the MLLM writes, without the decoder: restated requests, edits, refusals and questions to the user.

All cases are held out. A restatement has one canonical wording, so it must be equal to the expected one.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from omnivideo.contracts import THINK_END
from omnivideo.evaluation.suite import EvaluationProgress, Score, build_message, score_verdicts
from omnivideo.models.mllm import MLLMMessage
from omnivideo.synthetic.chat import THINK_SYSTEM_PROMPT
from omnivideo.synthetic.contradictions import sample_contradiction
from omnivideo.synthetic.edits import IMAGE_EDITS, VIDEO_EDITS, sample_edit
from omnivideo.synthetic.indirect_requests import sample_indirect_request
from omnivideo.synthetic.refusals import sample_refusal
from omnivideo.synthetic.requests import (
    CONTINUATION_TASKS,
    get_medium_prefix,
    phrase_still_request,
    restate_scene,
    sample_continuation_request,
)
from omnivideo.synthetic.scenes import Scene

WriteAnswer = Callable[[MLLMMessage], str]  # the MLLM's complete answer to a message


@dataclass(frozen=True)
class LanguageCase:
    """A message with the end of the correct answer; `groups` are the rows of the table that it counts for."""

    message: MLLMMessage
    expected: str
    groups: tuple[str, ...]


def build_thinking_message(text: str, shown: Scene | None = None) -> MLLMMessage:
    message = build_message(text, shown)
    return MLLMMessage(message.text, message.media, THINK_SYSTEM_PROMPT)


def sample_reasoning_case(rng: random.Random, index: int) -> LanguageCase:
    """Return an indirect request, by turns with held-out facts and with a held-out combination of kinds."""
    split = ("held_out", "held_out_combinations")[index % 2]
    request = sample_indirect_request(rng, False, split)  # type: ignore[arg-type]
    text = phrase_still_request(rng, request.prompt)
    groups = ("thinking", f"thinking: {split.replace('_', ' ')}", *(f"thinking: {kind}" for kind in request.kinds))
    return LanguageCase(build_thinking_message(text), get_medium_prefix(False) + request.rewrite, groups)


def sample_edit_case(rng: random.Random, index: int) -> LanguageCase:
    """Return an edit of a still or of a clip; the kinds take turns."""
    is_video = index % 2 == 1
    kinds = VIDEO_EDITS if is_video else IMAGE_EDITS
    edit = sample_edit(rng, is_video, "held_out", [kinds[index // 2 % len(kinds)]])
    name = "clip edits" if is_video else "still edits"
    groups = (f"restated {name}", f"restated {name}: {edit.kind}", f"restated edits of {len(edit.source.objects)}")
    message = build_thinking_message(edit.instruction, edit.source)
    return LanguageCase(message, restate_scene(edit.target, with_places=True), groups)


def sample_continuation_case(rng: random.Random, index: int) -> LanguageCase:
    """Return a request to animate a still, or to continue a clip."""
    request = sample_continuation_request(rng, CONTINUATION_TASKS[index % 2], 0.0, "held_out")
    message = build_thinking_message(request.text, request.source)
    return LanguageCase(message, restate_scene(request.target, with_places=True), (f"restated {request.task}",))


def sample_refusal_case(rng: random.Random, index: int) -> LanguageCase:
    """Return a request that the world cannot fulfil, or one that contradicts itself."""
    if index % 4 == 3:
        contradiction = sample_contradiction(rng, "held_out")
        return LanguageCase(build_message(contradiction.text), contradiction.answer, ("contradictions",))
    refusal = sample_refusal(rng, "held_out")
    groups = ("refusals", f"refusals: {refusal.category}")
    return LanguageCase(build_message(refusal.text), refusal.answer, groups)


CASE_SAMPLERS: Mapping[str, Callable[[random.Random, int], LanguageCase]] = {
    "thinking": sample_reasoning_case,
    "edits": sample_edit_case,
    "continuations": sample_continuation_case,
    "refusals": sample_refusal_case,
}


def evaluate_language(
    write_answer: WriteAnswer,
    count: int,
    on_progress: EvaluationProgress,
    topics: Sequence[str] = tuple(CASE_SAMPLERS),
) -> dict[str, Score]:
    """Score `count` held-out cases of every topic."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for topic in topics:
        rng = random.Random(f"evaluation/language/{topic}")
        for index in range(count):
            case = CASE_SAMPLERS[topic](rng, index)
            answer = write_answer(case.message).rpartition(THINK_END)[2].strip()
            for group in case.groups:
                verdicts[group].append(answer == case.expected)
            on_progress(topic, index + 1, count)
    return {group: score_verdicts(results) for group, results in sorted(verdicts.items())}

"""All evaluations of a preset of the synthetic world, in the order of the report."""

from functools import partial

from omnivideo.evaluation.continuations import evaluate_continuations, evaluate_long_clips, evaluate_variety
from omnivideo.evaluation.editing import evaluate_edit_chains, evaluate_editing
from omnivideo.evaluation.language import evaluate_language
from omnivideo.evaluation.suite import (
    EvaluationProgress,
    RecordCase,
    Score,
    evaluate_generation,
    evaluate_routing,
    evaluate_understanding,
    ignore_case,
    write_answer,
)
from omnivideo.models.omni import OmniVideoModel


def evaluate_all(
    omni: OmniVideoModel, count: int, on_progress: EvaluationProgress, record_case: RecordCase = ignore_case
) -> dict[str, Score]:
    """Run every evaluation, with `count` prompts for each category of generation; what is rendered is recorded."""
    scores: dict[str, Score] = {}
    scores |= evaluate_generation(omni, count, on_progress, record_case=record_case)
    for video in (False, True):
        scores |= evaluate_editing(omni, 2 * count, on_progress, video, record_case=record_case)
        scores |= evaluate_edit_chains(omni, count, on_progress, video)
    scores |= evaluate_continuations(omni, count, on_progress, record_case=record_case)
    scores |= evaluate_long_clips(omni, count, on_progress, record_case)
    scores |= evaluate_variety(omni, max(1, count // 5), on_progress)
    scores |= evaluate_understanding(omni, 8 * count, on_progress)
    scores |= evaluate_routing(omni, 8 * count, on_progress)
    return scores | evaluate_language(partial(write_answer, omni), 4 * count, on_progress)

"""Compare the stages, and the parts of the condition, on the same held-out prompts."""

from collections.abc import Callable, Iterator, Mapping

from rich.table import Table

from omnivideo.evaluation.prompts import CATEGORIES
from omnivideo.evaluation.suite import ConditionMode, EvaluationProgress, Score, evaluate_generation
from omnivideo.models.omni import OmniVideoModel

ABLATION_ROWS: tuple[tuple[str, str, ConditionMode], ...] = (
    ("foundations, text condition only", "stage1", "text only"),
    ("after stage 2a", "stage2a", "full"),
    ("after stage 2b, first sub-stage", "stage2b_generation", "full"),
    ("after stage 2b", "stage2b", "full"),
    ("after stage 3", "stage3", "full"),
    ("stage 3, visual tokens left out", "stage3", "text only"),
    ("stage 3, another prompt's visual tokens", "stage3", "swapped"),
    ("stage 3, visual tokens alone", "stage3", "visual only"),
)


def run_ablation(
    load_after_stage: Callable[[str], OmniVideoModel], count: int, on_progress: EvaluationProgress
) -> Iterator[tuple[str, dict[str, Score]]]:
    """Yield the name and the scores of each row; `load_after_stage` returns the model after a recipe."""
    for name, recipe, mode in ABLATION_ROWS:
        yield name, evaluate_generation(load_after_stage(recipe), count, on_progress, mode)


def build_ablation_table(rows: Mapping[str, Mapping[str, Score]]) -> Table:
    table = Table("", *CATEGORIES, box=None)
    for name, scores in rows.items():
        table.add_row(name, *(f"{scores[category].mean:.2f}" for category in CATEGORIES))
    return table

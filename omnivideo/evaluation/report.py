"""Format scores as a table for the terminal, and as JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.table import Column, Table

from omnivideo.evaluation import planner
from omnivideo.evaluation.suite import EvaluationProgress, Score
from omnivideo.media.artifacts import load_frames

# The scores that the tiny preset should reach.
TARGET_SCORES = {
    "single": 0.97, "colours": 0.95, "two": 0.85, "counting": 0.80, "position": 0.80, "colour attribution": 0.75,
    "motion": 0.90, "image edits": 0.80, "video edits": 0.75, "image edits: untouched area, median dB": 25.0,
    "video edits: untouched area, median dB": 25.0, "understanding": 0.95, "routing": 0.99,
}  # fmt: skip


def build_score_table(scores: Mapping[str, Score | float]) -> Table:
    table = Table("", "score", "±", "of", "goal", box=None)
    for name, value in scores.items():
        figure, error, count = (
            (value.mean, f"{value.standard_error:.3f}", str(value.count))
            if isinstance(value, Score)
            else (value, "", "")
        )
        goal = TARGET_SCORES.get(name)
        colour = "" if goal is None else "[green]" if figure >= goal else "[red]"
        table.add_row(name, f"{colour}{figure:.3f}", error, count, "" if goal is None else f"{goal:g}")
    return table


def build_phrase_table(scores: Mapping[str, Score | float]) -> Table:
    """Return a row for each half and kind of phrases, with the columns that the names of the scores end with."""
    columns = list(dict.fromkeys(name.rpartition(": ")[2] for name in scores))
    table = Table(Column(no_wrap=True), *columns, "of", box=None)
    for row in dict.fromkeys(name.rpartition(": ")[0] for name in scores):
        cells = [scores[f"{row}: {column}"] for column in columns]
        rounded = (f"{cell.mean:.3f} ± {cell.standard_error:.3f}" for cell in cells if isinstance(cell, Score))
        table.add_row(row, *rounded, *{str(cell.count) for cell in cells if isinstance(cell, Score)})
    return table


def scores_to_json(scores: Mapping[str, Score | float]) -> str:
    plain = {name: vars(value) if isinstance(value, Score) else value for name, value in scores.items()}
    return json.dumps(plain, indent=2) + "\n"


def score_planner(
    conversations: Any, split_actions: Callable[[str], Sequence[str]], count: int, on_progress: EvaluationProgress
) -> dict[str, Score | float]:
    """Run all evaluations of the planner, sized in proportion to `count` prompts for each category.

    `conversations` provides `open_thread()`, `store` and the planner's `mllm`. `split_actions` returns the text of each
    action of a turn, by the rules that the planner uses.
    """

    def open_thread() -> planner.SendTurn:
        return planner.make_turn_sender(conversations.open_thread().send)

    read_frames = partial(load_frames, conversations.store)
    scores: dict[str, Score | float] = {"acts split": planner.evaluate_splitting(split_actions, 4 * count)}
    table = planner.count_route_confusions(conversations.mllm, 10 * count, on_progress)
    right = sum(number for (expected, found), number in table.items() if expected == found)
    scores["routing"] = Score(right / table.total(), table.total())
    for (expected, found), number in sorted(table.items()):
        scores[f"routing: {expected} taken for {found}"] = float(number)
    rows = planner.evaluate_think_modes(open_thread, read_frames, 4 * count, on_progress)
    rows |= planner.evaluate_best_of_candidates(open_thread, read_frames, count, on_progress)
    for name, row in rows.items():
        scores[name] = row.score
        scores[f"{name}: seconds each"] = round(row.total_seconds / row.score.count, 3)
    scores["conversations"] = planner.evaluate_conversations(
        open_thread, read_frames, (3 * count + 4) // 5, on_progress
    )
    return scores

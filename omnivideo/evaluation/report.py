"""Scores as a table for the terminal, and as JSON."""

import json
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from omnivideo.evaluation import planner
from omnivideo.evaluation.suite import Score, Tell

# What the tiny preset is to reach (the issue that made it).
GOALS = {
    "single": 0.97, "colours": 0.95, "two": 0.85, "counting": 0.80, "position": 0.80, "colour attribution": 0.75,
    "motion": 0.90, "image edits": 0.80, "video edits": 0.75, "image edits: untouched area, median dB": 25.0,
    "video edits: untouched area, median dB": 25.0, "understanding": 0.95, "routing": 0.99,
}  # fmt: skip


def as_table(scores: Mapping[str, Score | float]) -> Table:
    table = Table("", "score", "of", "goal", box=None)
    for name, value in scores.items():
        figure, count = (value.right, str(value.count)) if isinstance(value, Score) else (value, "")
        goal = GOALS.get(name)
        colour = "" if goal is None else "[green]" if figure >= goal else "[red]"
        table.add_row(name, f"{colour}{figure:.3f}", count, "" if goal is None else f"{goal:g}")
    return table


def as_json(scores: Mapping[str, Score | float]) -> str:
    plain = {name: vars(value) if isinstance(value, Score) else value for name, value in scores.items()}
    return json.dumps(plain, indent=2) + "\n"


def planner_scores(conversations: Any, count: int, tell: Tell) -> dict[str, Score | float]:
    """All of the planner's evaluation, its count in proportion to `count` a category.

    `conversations` is the wiring: `thread()`, `frames(artifact)` and the planner's `mllm` and `acts`.
    """

    def open_thread() -> planner.Say:
        return planner.saying(conversations.thread().send)

    scores: dict[str, Score | float] = {"acts split": planner.splitting(conversations.acts, 4 * count)}
    table = planner.confusion(conversations.mllm, 10 * count, tell)
    right = sum(number for (expected, found), number in table.items() if expected == found)
    scores["routing"] = Score(right / table.total(), table.total())
    for (expected, found), number in sorted(table.items()):
        scores[f"routing: {expected} taken for {found}"] = float(number)
    rows = planner.thinking(open_thread, conversations.frames, 4 * count, tell)
    rows |= planner.checking(open_thread, conversations.frames, count, tell)
    for name, row in rows.items():
        scores[name] = row.score
        scores[f"{name}: seconds each"] = round(row.seconds / row.score.count, 3)
    scores["conversations"] = planner.conversations(open_thread, conversations.frames, (3 * count + 4) // 5, tell)
    return scores

"""Scores as a table for the terminal, and as JSON."""

import json
from collections.abc import Mapping

from rich.table import Table

from omnivideo.evaluation.suite import Score

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

"""The model card of a trained preset: its recipes with their durations, losses and scores."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

HEADER = """# tiny

OmniVideo's model at tiny size (64x64 px, 9 frames at 8 fps), trained from scratch on the project's synthetic world
by `omnivideo train tiny`, at commit {commit}, on {machine}. Half precision; loaded strictly; licence as the project's.
It knows circles, squares, triangles and stars in eight colours, five backgrounds and seven motions, in English, and
nothing else. `docs/tiny.md` describes the world, the recipes, and which recipes did not start from scratch.
"""


def build_model_card(
    runs_folder: Path,
    recipe_names: Iterable[str],
    commit: str,
    machine: str,
    scores: Mapping[str, Any],
    earlier_card: str = "",
) -> str:
    """Return the card as Markdown. `scores` is the JSON of `omnivideo evaluate tiny --report`, or empty.

    A recipe without a run keeps its row of `earlier_card`, the card of the weights that replace the run.
    """
    rows = {line.split("`")[1]: line for line in earlier_card.splitlines() if line.startswith("| `")}
    rows |= {
        name: format_recipe_row(runs_folder / name, name)
        for name in recipe_names
        if (runs_folder / name / "state.pt").exists()
    }
    lines = [
        HEADER.format(commit=commit, machine=machine),
        "| recipe | steps | hours | its losses, last 100 steps |",
        "|---|---|---|---|",
    ]
    lines += [rows[name] for name in recipe_names if name in rows]
    if scores:
        lines += ["", "| held-out evaluation | score | of |", "|---|---|---|", *map(format_score_row, scores.items())]
    return "\n".join(lines) + "\n"


def format_recipe_row(folder: Path, name: str) -> str:
    state = torch.load(folder / "state.pt", weights_only=True)
    records = [json.loads(record) for record in (folder / "log.jsonl").read_text().splitlines()[-100:]]
    names = [name for name in dict.fromkeys(key for record in records for key in record) if name != "step"]
    means = {name: [record[name] for record in records if name in record] for name in names}
    mean_losses = ", ".join(f"{name} {sum(values) / len(values):.4g}" for name, values in means.items())
    hours = f"{state['seconds'] / 3600:.1f}" if state.get("seconds") else "unknown"
    return f"| `{name}` | {state['step']:,} | {hours} | {mean_losses} |"


def format_score_row(entry: tuple[str, Any]) -> str:
    name, value = entry
    figure, count = (value["mean"], value["count"]) if isinstance(value, dict) else (value, "")
    return f"| {name} | {figure:.3f} | {count} |"

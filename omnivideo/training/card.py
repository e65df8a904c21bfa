"""The model card of a trained preset: what ran, for how long, and what came of it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

HEAD = """# tiny

OmniVideo's model at tiny size (64x64 px, 9 frames at 8 fps), trained from nothing on the project's own rendered world
by `omnivideo train tiny`, at commit {commit}, on {machine}. Half precision; loaded strictly; licence as the project's.
It knows circles, squares, triangles and stars in eight colours, five backgrounds and seven motions, in English, and
nothing else. `docs/tiny.md` has the world, the recipes, and what ran otherwise than from nothing.
"""


def card(
    runs: Path, recipes: Iterable[str], commit: str, machine: str, scores: Mapping[str, Any], earlier: str = ""
) -> str:
    """Markdown.  `scores` is the JSON that `omnivideo evaluate tiny --report` writes; empty where there is none yet.

    A recipe without a run has the row of the `earlier` card: of the weights that stand in for it.
    """
    rows = {line.split("`")[1]: line for line in earlier.splitlines() if line.startswith("| `")}
    rows |= {name: row(runs / name, name) for name in recipes if (runs / name / "state.pt").exists()}
    lines = [
        HEAD.format(commit=commit, machine=machine),
        "| recipe | steps | hours | its losses, last 100 steps |",
        "|---|---|---|---|",
    ]
    lines += [rows[name] for name in recipes if name in rows]
    if scores:
        lines += ["", "| held-out evaluation | score | of |", "|---|---|---|", *map(scored, scores.items())]
    return "\n".join(lines) + "\n"


def row(folder: Path, name: str) -> str:
    state = torch.load(folder / "state.pt", weights_only=True)
    last = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[-100:]]
    names = [name for name in dict.fromkeys(key for line in last for key in line) if name != "step"]
    means = {name: [line[name] for line in last if name in line] for name in names}
    shown = ", ".join(f"{name} {sum(values) / len(values):.4g}" for name, values in means.items())
    hours = f"{state['seconds'] / 3600:.1f}" if state.get("seconds") else "not kept"
    return f"| `{name}` | {state['step']:,} | {hours} | {shown} |"


def scored(entry: tuple[str, Any]) -> str:
    name, value = entry
    figure, count = (value["right"], value["count"]) if isinstance(value, dict) else (value, "")
    return f"| {name} | {figure:.3f} | {count} |"

"""Loss curves as pictures."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from omnivideo.training.trainer import read_lines


def curves(log: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each loss in a run's log."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in read_lines(log):
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            points[name].append((step, value))
    return {name: (np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])) for name, pairs in points.items()}


def smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean over a fiftieth of the run."""
    width = max(1, len(values) // 50)
    padded = np.concatenate([np.full(width - 1, values[0]), values])
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def plot_losses(log: Path, picture: Path, title: str) -> None:
    """One panel per loss: every step faint, the running mean over it."""
    from matplotlib.figure import Figure  # a second to import, and only wanted here

    found = curves(log)
    if not found:
        return
    figure = Figure(figsize=(5 * len(found), 3.2), layout="constrained")
    for at, (name, (steps, values)) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(1, len(found), at)
        axes.plot(steps, values, alpha=0.25, linewidth=0.6)
        axes.plot(steps, smoothed(values), linewidth=1.5)
        axes.set(title=f"{title}: {name}", xlabel="step")
        if values.min() > 0 and values.max() / values.min() > 20:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)

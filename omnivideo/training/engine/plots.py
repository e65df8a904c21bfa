"""Loss curves as pictures."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from omnivideo.training.engine.trainer import read_complete_lines


def read_curves(log_file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each loss in a run's log."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in read_complete_lines(log_file):
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            points[name].append((step, value))
    return {name: (np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])) for name, pairs in points.items()}


def smooth_curve(values: np.ndarray) -> np.ndarray:
    """A running mean over a fiftieth of the run."""
    width = max(1, len(values) // 50)
    padded = np.concatenate([np.full(width - 1, values[0]), values])
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def plot_losses(log_file: Path, image_file: Path, title: str) -> None:
    """One panel per loss: every step faint, the running mean over it."""
    from matplotlib.figure import Figure  # a second to import, and only wanted here

    curves = read_curves(log_file)
    if not curves:
        return
    figure = Figure(figsize=(5 * len(curves), 3.2), layout="constrained")
    for panel, (name, (steps, values)) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(1, len(curves), panel)
        axes.plot(steps, values, alpha=0.25, linewidth=0.6)
        axes.plot(steps, smooth_curve(values), linewidth=1.5)
        axes.set(title=f"{title}: {name}", xlabel="step")
        if values.min() > 0 and values.max() / values.min() > 20:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.savefig(image_file, dpi=110)

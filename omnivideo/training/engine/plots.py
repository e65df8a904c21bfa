"""Plot the losses of a run."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omnivideo.training.engine.trainer import read_complete_lines

FloatArray = NDArray[np.float64]


def read_curves(log_file: Path) -> dict[str, tuple[NDArray[np.int64], FloatArray]]:
    """Return the steps and the values of each loss in a run's log."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in read_complete_lines(log_file):
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            points[name].append((step, value))
    return {
        name: (np.array([step for step, _ in pairs]), np.array([value for _, value in pairs]))
        for name, pairs in points.items()
    }


def smooth_curve(values: FloatArray) -> FloatArray:
    """Return the running mean over a fiftieth of the run."""
    width = max(1, len(values) // 50)
    padded = np.concatenate([np.full(width - 1, values[0]), values])
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def plot_losses(log_file: Path, image_file: Path, title: str) -> None:
    """Write a picture with a panel for each loss: the values of all steps, and their running mean."""
    from matplotlib.figure import Figure  # importing it takes a second, and only this function needs it

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

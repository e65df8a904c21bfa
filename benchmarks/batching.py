"""Compare hybrid mixed batches with one task per batch (section 4.2): updates per sample, and held-out losses.

python benchmarks/batching.py                                    # only the order of batches; no weights
python benchmarks/batching.py --runs runs [--steps 800] [--seeds 1] [--every 50] [--out out/batching]

With `--runs`, stage 2b is trained twice from the end of stage 2a, on the data that stages 2b and 3 keep in runs/cache:
once with both tasks of a group in every batch, once with alternating tasks. Batch sizes, samples of each task, rates
and noise are the same. Every `--every` steps the loss is computed on held-out requests with fixed noise and dropout.
A killed run resumes.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

from omnivideo.contracts import TRAINING_TASKS, TrainingTask
from omnivideo.models.omni import OmniVideoModel
from omnivideo.presets import Task
from omnivideo.synthetic.requests import sample_requests
from omnivideo.training.config import TrainingConfig
from omnivideo.training.data.batch import CachedTask
from omnivideo.training.data.batch_sampler import PAPER_TASK_MIX, BatchSampler, Bucket, MixConfig, measure_epoch
from omnivideo.training.engine.recipe import Losses, Recipe, single_micro_batch, step_seed
from omnivideo.training.engine.run import RunContext
from omnivideo.training.engine.trainer import Trainer, read_complete_lines
from omnivideo.training.tiny.feature_cache import PreparationConfig, load_cached_task
from omnivideo.training.tiny.flow_stages import build_adapter_recipe
from omnivideo.training.tiny.pipeline import REQUESTS_PER_TASK, TinyPipeline

Row = dict[str, float]  # step, samples, and the held-out loss of each task
TASK_PAIRS: tuple[tuple[Task, Task], ...] = (
    ("text-to-image", "image-editing"),
    ("text-to-video", "video-editing"),
)
ARMS = ("mixed", "one task")
HELD_OUT_BATCHES = 4  # of each task


def open_tiny(arguments: argparse.Namespace) -> TinyPipeline:
    return TinyPipeline(RunContext(TrainingConfig(recipe="tiny", runs=arguments.runs, weights=arguments.weights)))


# ---------------------------------------------------------------- the order of batches


def make_paper_samples(count: int) -> tuple[list[TrainingTask], list[Bucket]]:
    """Return tasks in the shares of Table 1, and buckets of three aspect ratios and two lengths of clips."""
    rng = np.random.default_rng(0)
    ordered = [task for task in TRAINING_TASKS for _ in range(round(count * PAPER_TASK_MIX[task] / 100))]
    tasks: list[TrainingTask] = rng.permutation(ordered).tolist()
    sizes = [(480, 480), (832, 480), (480, 832)]
    shapes = [(*sizes[rng.choice(3)], int(rng.choice((17, 41))) if "video" in task else 1) for task in tasks]
    return tasks, [Bucket(*shape) for shape in shapes]


def compare_orders(count: int) -> None:
    """Print the updates per 1000 samples on 2 ranks."""
    tasks, buckets = make_paper_samples(count)
    print(
        f"{len(tasks)} samples in the shares of Table 1, {len(set(buckets))} buckets, 2 ranks; steps that train a task"
    )
    print("per 1000 samples of the epoch (in brackets: the maximum number of samples between two of them)")
    stats = [
        measure_epoch(BatchSampler(tasks, buckets, MixConfig(task_ratio=None, mix_tasks=mixed)), 2)
        for mixed in (True, False)
    ]
    print(f"{'':22}{'mixed':>18}{'one task per batch':>20}")
    for task in TRAINING_TASKS:
        cells = [f"{epoch.steps_per_1000_samples[task]:.1f} ({epoch.max_sample_gap[task]})" for epoch in stats]
        print(f"{task:22}{cells[0]:>18}{cells[1]:>20}")
    print(f"{'steps':22}{stats[0].steps:>18}{stats[1].steps:>20}")
    print(f"{'padding or waiting':22}{stats[0].wasted_fraction:>18.2%}{stats[1].wasted_fraction:>20.2%}")


# ---------------------------------------------------------------- held-out losses


def load_tasks(tiny: TinyPipeline, omni: OmniVideoModel, seed: int, count: int, folder: Path) -> dict[str, CachedTask]:
    """Load the requests of every task from the cache, or compute them."""

    def print_progress(done: int, total: int) -> None:
        print(f"  preparing data: {done}/{total}", end="\r", flush=True)

    encoder = tiny.load_visual_encoder()
    return {
        task: load_cached_task(
            folder, omni, encoder, sample_requests(seed, task, count), PreparationConfig(print_progress)
        )
        for group in TASK_PAIRS
        for task in group
    }


def select_losses(arm: str, mixed: Recipe, by_task: dict[str, Recipe]) -> Callable[[int], Losses]:
    """Return the losses of a step: for both tasks of the step's group, or for its two tasks alternately."""
    if arm == "mixed":
        return mixed.compute_losses
    return lambda step: by_task[TASK_PAIRS[step % 2][step // 2 % 2]].compute_losses(step)


@torch.no_grad()
def compute_held_out_losses(recipes: dict[str, Recipe]) -> dict[str, float]:
    """Return the loss of each task on held-out requests, always with the same noise and dropout."""
    losses: dict[str, float] = {}
    for group_index, group in enumerate(TASK_PAIRS):
        for task in group:
            values = []
            for batch in range(HELD_OUT_BATCHES):
                torch.manual_seed(step_seed("held-out", batch))
                values.append(float(recipes[task].compute_losses(2 * batch + group_index)["loss"]))
            losses[task] = float(np.mean(values))
    return losses


def train_arm(tiny: TinyPipeline, arm: str, seed: int, arguments: argparse.Namespace) -> list[Row]:
    """Train one arm and return its held-out losses."""
    omni, sizes, name = tiny.load_omni("stage2a"), tuple(arguments.sizes), f"batching{seed}"
    cache = arguments.runs / "cache"
    data = load_tasks(tiny, omni, 1, arguments.count, cache)
    held_out_data = load_tasks(tiny, omni, 2, max(sizes) * 2, cache)

    def build_recipe(recipe_name: str, tasks: dict[str, CachedTask]) -> Recipe:
        return build_adapter_recipe(recipe_name, omni, tasks, arguments.steps, sizes, 0)

    mixed = build_recipe(name, data)
    by_task = {task: build_recipe(name, {task: data[task]}) for task in data}
    held_out = {task: build_recipe("held-out", {task: held_out_data[task]}) for task in held_out_data}
    folder = arguments.out / f"{arm.replace(' ', '-')}-{seed}"
    trainer = Trainer(replace(mixed, micro_batch_losses=single_micro_batch(select_losses(arm, mixed, by_task))), folder)
    return train_and_log(trainer, held_out, folder / "held-out.jsonl", arguments, sizes)


def train_and_log(
    trainer: Trainer, held_out: dict[str, Recipe], log: Path, arguments: argparse.Namespace, sizes: tuple[int, ...]
) -> list[Row]:
    """Train to the end; log the held-out losses every `--every` steps and return them."""
    rows = [row for row in map(json.loads, read_complete_lines(log)) if row["step"] <= trainer.step]
    while True:
        if not rows or rows[-1]["step"] < trainer.step:
            samples = trainer.step * sum(sizes) // 2
            rows.append({"step": trainer.step, "samples": samples} | compute_held_out_losses(held_out))
            log.write_text("".join(json.dumps(row) + "\n" for row in rows))
            progress = f"step {trainer.step}/{arguments.steps}, held out {mean_over_tasks(rows[-1]):.4f}"
            print(f"{log.parent.name}: {progress}", flush=True)
        if trainer.step >= arguments.steps:
            return rows
        trainer.run(stop_at_step=trainer.step + arguments.every)


def mean_over_tasks(row: Row) -> float:
    return float(np.mean([row[task] for group in TASK_PAIRS for task in group]))


def print_summary(curves: dict[str, list[list[Row]]]) -> None:
    """Print the final held-out losses, and after how many samples each arm reaches the worse of them."""
    tasks = [task for group in TASK_PAIRS for task in group]
    print(f"{'held-out loss':22}" + "".join(f"{arm:>14}" for arm in ARMS))
    print(f"{'at the start':22}" + "".join(f"{mean_over_runs(curves[arm], 0, mean_over_tasks):>14.4f}" for arm in ARMS))
    for task in tasks:
        losses = [mean_over_runs(curves[arm], -1, itemgetter(task)) for arm in ARMS]
        print(f"{task:22}" + "".join(f"{loss:>14.4f}" for loss in losses))
    print(f"{'all four':22}" + "".join(f"{mean_over_runs(curves[arm], -1, mean_over_tasks):>14.4f}" for arm in ARMS))
    goal = max(mean_over_runs(curves[arm], -1, mean_over_tasks) for arm in ARMS)
    print(f"{f'samples to {goal:.4f}':22}" + "".join(f"{count_samples_to(curves[arm], goal):>14}" for arm in ARMS))


def mean_over_runs(runs: list[list[Row]], index: int, value: Callable[[Row], float]) -> float:
    return float(np.mean([value(rows[index]) for rows in runs]))


def count_samples_to(runs: list[list[Row]], goal: float) -> int:
    """Return the number of samples after which the mean curve first reaches `goal`."""
    points = [
        (int(rows[0]["samples"]), mean_over_runs([[row] for row in rows], 0, mean_over_tasks))
        for rows in zip(*runs, strict=True)
    ]
    return next(samples for samples, value in points if value <= goal + 1e-12)


def plot_curves(curves: dict[str, list[list[Row]]], picture: Path) -> None:
    from matplotlib.figure import Figure

    names = ["all four", *(task for group in TASK_PAIRS for task in group)]
    figure = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    for index, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), index)
        for arm, colour in zip(ARMS, ("tab:blue", "tab:orange"), strict=True):
            for run, rows in enumerate(curves[arm]):
                values = [mean_over_tasks(row) if name == "all four" else row[name] for row in rows]
                axes.plot([row["samples"] for row in rows], values, color=colour, label=None if run else arm)
        axes.set(title=name, xlabel="samples", ylabel="held-out loss")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=None, help="folder in which the tiny recipes were trained")
    parser.add_argument("--out", type=Path, default=Path("out/batching"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs=2, default=(64, 24), metavar=("STILLS", "CLIPS"))
    parser.add_argument("--count", type=int, default=REQUESTS_PER_TASK, help="requests of each task")
    parser.add_argument("--weights", type=Path, default=None, help="folder of weights for recipes without a run")
    arguments = parser.parse_args()
    compare_orders(10_000)
    if arguments.runs is None:
        return
    tiny = open_tiny(arguments)
    curves = {arm: [train_arm(tiny, arm, seed, arguments) for seed in range(arguments.seeds)] for arm in ARMS}
    print(f"{platform.machine()}, {torch.get_num_threads()} threads; {arguments.steps} steps, {arguments.seeds} seeds")
    print_summary(curves)
    plot_curves(curves, arguments.out / "batching.png")
    print(arguments.out / "batching.png")


if __name__ == "__main__":
    main()

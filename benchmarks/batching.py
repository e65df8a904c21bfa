"""Hybrid mixed batches against one task a batch: updates for the same samples, and how fast the losses fall (4.2).

python benchmarks/batching.py                                    # the orders alone; no weights
python benchmarks/batching.py --runs runs [--steps 800] [--seeds 1] [--every 50] [--out out/batching]

With `--runs`, stage 2b is trained twice from the end of stage 2a, on the data that stages 2b and 3 keep in runs/cache:
once with both tasks of a group in every batch, once with the tasks in turns.  Batch sizes, samples of each task, rates
and noise are the same.  Every `--every` steps the loss is taken on held-out requests, at the same noise and drops.
A killed run goes on where it was.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from omnivideo.contracts import TRAINING_TASKS
from omnivideo.synthetic.requests import sample_requests
from omnivideo.training.config import TrainingConfig
from omnivideo.training.data.batch_sampler import PAPER_TASK_MIX, BatchSampler, Bucket, MixConfig, measure_epoch
from omnivideo.training.engine.recipe import Losses, Recipe, single_micro_batch, step_seed
from omnivideo.training.engine.run import RunContext
from omnivideo.training.engine.trainer import Trainer, read_complete_lines
from omnivideo.training.tiny.feature_cache import PreparationConfig, load_cached_task
from omnivideo.training.tiny.flow_stages import TASK_GROUPS, build_adapter_recipe
from omnivideo.training.tiny.pipeline import REQUESTS_PER_TASK, TinyPipeline

ARMS = ("mixed", "one task")
LOOKS = 4  # held-out batches of each task


# ---------------------------------------------------------------- the orders alone


def open_tiny(given: argparse.Namespace) -> TinyPipeline:
    return TinyPipeline(RunContext(TrainingConfig(recipe="tiny", runs=given.runs, weights=given.weights)))


def paper_set(total: int) -> tuple[list, list[Bucket]]:
    """Samples in Table 1's shares; three aspect ratios, and two lengths of clips."""
    rng = np.random.default_rng(0)
    tasks = rng.permutation(
        [task for task in TRAINING_TASKS for _ in range(round(total * PAPER_TASK_MIX[task] / 100))]
    ).tolist()
    wide = [(480, 480), (832, 480), (480, 832)]
    shapes = [(*wide[rng.choice(3)], int(rng.choice((17, 41))) if "video" in task else 1) for task in tasks]
    return tasks, [Bucket(*shape) for shape in shapes]


def orders(total: int) -> None:
    """Updates per 1000 samples, over 2 ranks."""
    tasks, buckets = paper_set(total)
    print(
        f"{len(tasks)} samples in Table 1's shares, {len(set(buckets))} buckets, 2 ranks; steps with a part for a task,"
    )
    print("for each 1000 samples of the epoch (and the most samples between two of them)")
    found = [
        measure_epoch(BatchSampler(tasks, buckets, MixConfig(task_ratio=None, mix_tasks=mixed)), 2)
        for mixed in (True, False)
    ]
    print(f"{'':22}{'mixed':>18}{'one task a batch':>20}")
    for task in TRAINING_TASKS:
        cells = [f"{one.steps_per_1000_samples[task]:.1f} ({one.max_sample_gap[task]})" for one in found]
        print(f"{task:22}{cells[0]:>18}{cells[1]:>20}")
    print(f"{'steps':22}{found[0].steps:>18}{found[1].steps:>20}")
    print(f"{'padding or waiting':22}{found[0].wasted_fraction:>18.2%}{found[1].wasted_fraction:>20.2%}")


# ---------------------------------------------------------------- how fast the losses fall


def data_of(tiny: TinyPipeline, omni, seed: int, count: int, folder: Path) -> dict:
    tell = lambda done, of: print(f"  preparing data: {done}/{of}", end="\r", flush=True)  # noqa: E731
    encoder = tiny.load_visual_encoder()
    return {
        task: load_cached_task(folder, omni, encoder, sample_requests(seed, task, count), PreparationConfig(tell))
        for group in TASK_GROUPS
        for task in group
    }


def arm_loss(arm: str, whole: Recipe, alone: dict[str, Recipe]) -> Callable[[int], Losses]:
    """The loss of a step: of both tasks of the step's group, or of its two tasks in turns."""
    if arm == "mixed":
        return whole.compute_losses
    return lambda step: alone[TASK_GROUPS[step % 2][step // 2 % 2]].compute_losses(step)


@torch.no_grad()
def held_out(looks: dict[str, Recipe]) -> dict[str, float]:
    """The loss of each task on held-out requests; noise and drops are a function of the look alone."""
    found = {}
    for kind, group in enumerate(TASK_GROUPS):
        for task in group:
            values = []
            for look in range(LOOKS):
                torch.manual_seed(step_seed("held-out", look))
                values.append(float(looks[task].compute_losses(2 * look + kind)["loss"]))
            found[task] = float(np.mean(values))
    return found


def run(tiny: TinyPipeline, arm: str, seed: int, given: argparse.Namespace) -> list[dict]:
    """Trains one arm; returns the held-out losses on the way."""
    omni, sizes, name = tiny.load_omni("stage2a"), tuple(given.sizes), f"batching{seed}"
    cache = given.runs / "cache"
    data, unseen = data_of(tiny, omni, 1, given.count, cache), data_of(tiny, omni, 2, max(sizes) * 2, cache)
    make = lambda tag, some: build_adapter_recipe(tag, omni, some, given.steps, sizes, 0)  # noqa: E731
    whole = make(name, data)
    alone, looks = ({task: make(tag, {task: some[task]}) for task in some}
                    for tag, some in ((name, data), ("held-out", unseen)))  # fmt: skip
    folder = given.out / f"{arm.replace(' ', '-')}-{seed}"
    trainer = Trainer(replace(whole, micro_batch_losses=single_micro_batch(arm_loss(arm, whole, alone))), folder)
    return train(trainer, looks, folder / "held-out.jsonl", given, sizes)


def train(trainer: Trainer, looks: dict[str, Recipe], log: Path, given: argparse.Namespace, sizes: tuple) -> list[dict]:
    rows = [row for row in map(json.loads, read_complete_lines(log)) if row["step"] <= trainer.step]
    while True:
        if not rows or rows[-1]["step"] < trainer.step:
            rows.append({"step": trainer.step, "samples": trainer.step * sum(sizes) // 2} | held_out(looks))
            log.write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(f"{log.parent.name}: step {trainer.step}/{given.steps}, held out {total(rows[-1]):.4f}", flush=True)
        if trainer.step >= given.steps:
            return rows
        trainer.run(stop_at_step=trainer.step + given.every)


def total(row: dict) -> float:
    """The mean over the four tasks."""
    return float(np.mean([row[task] for group in TASK_GROUPS for task in group]))


def summary(curves: dict[str, list[list[dict]]]) -> None:
    """Held-out losses at the end, and the samples after which each arm is where the other one ends."""
    tasks = [task for group in TASK_GROUPS for task in group]
    print(f"{'held-out loss':22}" + "".join(f"{arm:>14}" for arm in ARMS))
    print(f"{'at the start':22}" + "".join(f"{mean(curves[arm], 0, total):>14.4f}" for arm in ARMS))
    for task in tasks:
        print(f"{task:22}" + "".join(f"{mean(curves[arm], -1, lambda row, t=task: row[t]):>14.4f}" for arm in ARMS))
    print(f"{'all four':22}" + "".join(f"{mean(curves[arm], -1, total):>14.4f}" for arm in ARMS))
    goal = max(mean(curves[arm], -1, total) for arm in ARMS)
    print(f"{f'samples to {goal:.4f}':22}" + "".join(f"{reached(curves[arm], goal):>14}" for arm in ARMS))


def mean(runs: list[list[dict]], at: int, value: Callable[[dict], float]) -> float:
    return float(np.mean([value(rows[at]) for rows in runs]))


def reached(runs: list[list[dict]], goal: float) -> int:
    """Samples after which the mean curve is at `goal` for the first time."""
    points = [(rows[0]["samples"], mean([[row] for row in rows], 0, total)) for rows in zip(*runs, strict=True)]
    return next(samples for samples, value in points if value <= goal + 1e-12)


def plot(curves: dict[str, list[list[dict]]], picture: Path) -> None:
    from matplotlib.figure import Figure

    names = ["all four", *(task for group in TASK_GROUPS for task in group)]
    figure = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    for at, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), at)
        for arm, colour in zip(ARMS, ("tab:blue", "tab:orange"), strict=True):
            for number, rows in enumerate(curves[arm]):
                values = [total(row) if name == "all four" else row[name] for row in rows]
                axes.plot([row["samples"] for row in rows], values, color=colour, label=None if number else arm)
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
    parser.add_argument("--weights", type=Path, default=None, help="stand in for recipes without a run")
    given = parser.parse_args()
    orders(10_000)
    if given.runs is None:
        return
    tiny = open_tiny(given)
    curves = {arm: [run(tiny, arm, seed, given) for seed in range(given.seeds)] for arm in ARMS}
    print(f"{platform.machine()}, {torch.get_num_threads()} threads; {given.steps} steps, {given.seeds} seeds")
    summary(curves)
    plot(curves, given.out / "batching.png")
    print(given.out / "batching.png")


if __name__ == "__main__":
    main()

"""The paper's two sub-stages of stage 2b against all four tasks at once: the same steps, data and learning rate.

    python -m benchmarks.substages --runs runs [--steps 600 800] [--out out/substages]

Both arms start after stage 2a. Every 50 steps the decoder's error is measured for each task on held-out requests with
fixed noise; a table and a plot compare the arms.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from omnivideo.contracts import TASKS
from omnivideo.models.omni import OmniVideoModel
from omnivideo.presets import StandardTask as Task
from omnivideo.synthetic.requests import sample_requests
from omnivideo.training.config import TrainingConfig
from omnivideo.training.data.batch import CachedTask, FlowBatch, collate_flow_batch
from omnivideo.training.engine.recipe import Recipe
from omnivideo.training.engine.run import RunContext
from omnivideo.training.engine.trainer import Trainer
from omnivideo.training.recipes import flow, parts
from omnivideo.training.recipes.losses import flow_matching_loss
from omnivideo.training.tiny import flow_stages
from omnivideo.training.tiny.feature_cache import load_cached_task
from omnivideo.training.tiny.pipeline import REQUESTS_PER_TASK, TinyPipeline

EVAL_INTERVAL_STEPS = 50
HELD_OUT_REQUESTS = 96  # of each task
Curve = dict[Task, list[tuple[int, float]]]


def open_tiny(arguments: argparse.Namespace) -> TinyPipeline:
    return TinyPipeline(RunContext(TrainingConfig(recipe="tiny", runs=arguments.runs, weights=arguments.weights)))


def collate_all(data: CachedTask) -> FlowBatch:
    return collate_flow_batch([(data, index) for index in range(len(data))])


@torch.no_grad()
def measure_error(omni: OmniVideoModel, batch: FlowBatch) -> float:
    """Return the loss of Eq. 4 over a batch of one task, without dropout and always with the same noise."""
    model, no_dropout = parts.TrainableParts(omni), flow.ConditionDropout(0.0, 0.0, 0.0)
    null = omni.encode_prompts([omni.preset.null.negative_prompt])[0]
    condition, _ = flow.build_condition(omni, model, batch, [1.0] * len(batch), no_dropout, null)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return float(flow_matching_loss(omni.decoder, batch.target_latents, condition).mean())


def train_and_measure(
    omni: OmniVideoModel, recipe: Recipe, folder: Path, first_step: int, held_out: dict[Task, FlowBatch]
) -> Iterator[Curve]:
    """Train to the end and yield the errors of every task; steps are counted from `first_step`."""
    trainer = Trainer(recipe, folder)
    while trainer.step < recipe.steps:
        trainer.run(stop_at_step=trainer.step + EVAL_INTERVAL_STEPS)
        yield {task: [(first_step + trainer.step, measure_error(omni, batch))] for task, batch in held_out.items()}


def join_curves(curves: Iterator[Curve], name: str) -> Curve:
    """Join the points of an arm to one curve for each task, and print them as they come."""
    joined: Curve = {task: [] for task in TASKS}
    for curve in curves:
        for task, points in curve.items():
            joined[task] += points
        print(f"{name:10}", *(f"{task} {points[-1][1]:.4f}" for task, points in joined.items()), flush=True)
    return joined


def train_in_substages(
    tiny: TinyPipeline,
    steps: list[int],
    out: Path,
    data: dict[str, CachedTask],
    held_out: dict[Task, FlowBatch],
) -> Iterator[Curve]:
    omni = tiny.load_omni("stage2a")
    first = flow_stages.build_stage2b_generation_recipe(omni, data, steps[0])
    yield from train_and_measure(omni, first, out / "first", 0, held_out)
    second = flow_stages.build_stage2b_recipe(omni, data, steps[1])
    yield from train_and_measure(omni, second, out / "second", steps[0], held_out)


def train_at_once(
    tiny: TinyPipeline,
    steps: list[int],
    out: Path,
    data: dict[str, CachedTask],
    held_out: dict[Task, FlowBatch],
) -> Iterator[Curve]:
    omni = tiny.load_omni("stage2a")
    recipe = flow_stages.build_stage2b_recipe(omni, data, sum(steps))
    yield from train_and_measure(omni, recipe, out / "at-once", 0, held_out)


def plot_curves(curves: dict[str, Curve], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 3.4), layout="constrained")
    for index, task in enumerate(TASKS, start=1):
        axes = figure.add_subplot(1, 4, index)
        for name, curve in curves.items():
            axes.plot(*zip(*curve[task], strict=True), label=name)
        axes.set(title=task, xlabel="step", ylabel="velocity error" if index == 1 else None)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, nargs=2, default=[600, 800])
    parser.add_argument("--out", type=Path, default=Path("out/substages"))
    parser.add_argument("--count", type=int, default=REQUESTS_PER_TASK, help="requests of each task")
    parser.add_argument("--weights", type=Path, default=None, help="folder of weights for recipes without a run")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    tiny, cache = open_tiny(arguments), arguments.runs / "cache"
    omni, encoder = tiny.load_omni("stage2a"), tiny.load_visual_encoder()
    data: dict[str, CachedTask] = {
        task: load_cached_task(cache, omni, encoder, sample_requests(1, task, arguments.count), tiny.preparation)
        for task in TASKS
    }
    held_out = {
        task: collate_all(
            load_cached_task(cache, omni, encoder, sample_requests(2, task, HELD_OUT_REQUESTS), tiny.preparation)
        )
        for task in TASKS
    }
    curves = {
        "two sub-stages": join_curves(train_in_substages(tiny, arguments.steps, arguments.out, data, held_out), "two"),
        "all at once": join_curves(train_at_once(tiny, arguments.steps, arguments.out, data, held_out), "at once"),
    }
    plot_curves(curves, arguments.out / "substages.png")
    (arguments.out / "substages.json").write_text(json.dumps(curves))
    for task in TASKS:
        substages, at_once = (curve[task][-1][1] for curve in curves.values())
        print(f"{task:15} two sub-stages {substages:.4f}, all at once {at_once:.4f}, ratio {substages / at_once:.3f}")


if __name__ == "__main__":
    main()

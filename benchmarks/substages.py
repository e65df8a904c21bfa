"""The paper's two sub-stages of stage 2b against all four tasks at once: the same steps, data and learning rate.

    python -m benchmarks.substages --runs runs [--steps 600 800] [--out out/substages]

Both begin after stage 2a.  Every 50 steps the decoder's error is measured per task on requests that neither has seen,
at the same noise; the table and the plot show who gets where, and when.
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
from omnivideo.presets import Task
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

EVERY, WATCHED = 50, 96  # steps; requests of each task
Curve = dict[Task, list[tuple[int, float]]]


def open_tiny(given: argparse.Namespace) -> TinyPipeline:
    return TinyPipeline(RunContext(TrainingConfig(recipe="tiny", runs=given.runs, weights=given.weights)))


def rows_of(data: CachedTask) -> FlowBatch:
    return collate_flow_batch([(data, at) for at in range(len(data))])


@torch.no_grad()
def error(omni: OmniVideoModel, rows: FlowBatch) -> float:
    """Eq. 4 over rows of one task, nothing dropped, the same noise each time."""
    model, never = parts.TrainableParts(omni), flow.ConditionDropout(0.0, 0.0, 0.0)
    null = omni.encode_prompts([omni.preset.negative_prompt])[0]
    condition, _ = flow.build_condition(omni, model, rows, [1.0] * len(rows), never, null)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return float(flow_matching_loss(omni.decoder, rows.target_latents, condition).mean())


def followed(
    omni: OmniVideoModel, recipe: Recipe, folder: Path, before: int, watched: dict[Task, FlowBatch]
) -> Iterator[Curve]:
    """Trains to the end; the errors of every task each EVERY steps, counted from `before`."""
    trainer = Trainer(recipe, folder)
    while trainer.step < recipe.steps:
        trainer.run(stop_at_step=trainer.step + EVERY)
        yield {task: [(before + trainer.step, error(omni, rows))] for task, rows in watched.items()}


def joined(curves: Iterator[Curve], name: str) -> Curve:
    whole: Curve = {task: [] for task in TASKS}
    for one in curves:
        for task, points in one.items():
            whole[task] += points
        print(f"{name:10}", *(f"{task} {points[-1][1]:.4f}" for task, points in whole.items()), flush=True)
    return whole


def two_substages(
    tiny: TinyPipeline, steps: list[int], out: Path, data: dict[Task, CachedTask], watched: dict
) -> Iterator[Curve]:
    omni = tiny.load_omni("stage2a")
    first = flow_stages.build_stage2b_generation_recipe(omni, data, steps[0])
    yield from followed(omni, first, out / "first", 0, watched)
    second = flow_stages.build_stage2b_recipe(omni, data, steps[1])
    yield from followed(omni, second, out / "second", steps[0], watched)


def all_at_once(
    tiny: TinyPipeline, steps: list[int], out: Path, data: dict[Task, CachedTask], watched: dict
) -> Iterator[Curve]:
    omni = tiny.load_omni("stage2a")
    yield from followed(omni, flow_stages.build_stage2b_recipe(omni, data, sum(steps)), out / "at-once", 0, watched)


def plot(found: dict[str, Curve], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 3.4), layout="constrained")
    for at, task in enumerate(TASKS, start=1):
        axes = figure.add_subplot(1, 4, at)
        for name, curve in found.items():
            axes.plot(*zip(*curve[task], strict=True), label=name)
        axes.set(title=task, xlabel="step", ylabel="velocity error" if at == 1 else None)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110)


def main() -> None:
    reader = argparse.ArgumentParser()
    reader.add_argument("--runs", type=Path, default=Path("runs"))
    reader.add_argument("--steps", type=int, nargs=2, default=[600, 800])
    reader.add_argument("--out", type=Path, default=Path("out/substages"))
    reader.add_argument("--count", type=int, default=REQUESTS_PER_TASK, help="requests of each task")
    reader.add_argument("--weights", type=Path, default=None, help="stand in for recipes without a run")
    given = reader.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    tiny, cache = open_tiny(given), given.runs / "cache"
    omni, encoder = tiny.load_omni("stage2a"), tiny.load_visual_encoder()
    data = {
        task: load_cached_task(cache, omni, encoder, sample_requests(1, task, given.count), tiny.preparation)
        for task in TASKS
    }
    unseen = {
        task: rows_of(load_cached_task(cache, omni, encoder, sample_requests(2, task, WATCHED), tiny.preparation))
        for task in TASKS
    }
    found = {
        "two sub-stages": joined(two_substages(tiny, given.steps, given.out, data, unseen), "two"),
        "all at once": joined(all_at_once(tiny, given.steps, given.out, data, unseen), "at once"),
    }
    plot(found, given.out / "substages.png")
    (given.out / "substages.json").write_text(json.dumps(found))
    for task in TASKS:
        two, once = (curve[task][-1][1] for curve in found.values())
        print(f"{task:15} two sub-stages {two:.4f}, all at once {once:.4f}, ratio {two / once:.3f}")


if __name__ == "__main__":
    main()

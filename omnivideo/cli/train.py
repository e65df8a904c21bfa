"""The commands of training: train, plan."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omnivideo.cli.app import console, parse_width_height
from omnivideo.cli.config_options import accept_config
from omnivideo.cli.data import print_skips
from omnivideo.presets import get_preset
from omnivideo.startup import stop_deferring
from omnivideo.training.config import SHARD_RECIPES, TrainingConfig
from omnivideo.training.planning.gpus import GPUS, parse_gpus

if TYPE_CHECKING:
    from omnivideo.models.omni import OmniVideoModel

MODEL, HARDWARE, BATCHES = "Model", "Hardware", "Batches"
GPUS_HELP = f"COUNTxNAME, e.g. 8xH100; NAME is one of {', '.join(GPUS)}."


@accept_config(TrainingConfig)
def train(config: TrainingConfig) -> None:
    """Train a recipe over the synthetic world, or a stage over shards, and resume from the latest checkpoint."""
    stop_deferring("torch", "transformers.distributed")  # training compiles, and shards over devices
    from omnivideo.training.engine.distributed.launcher import relaunch_command
    from omnivideo.training.engine.distributed.processes import is_launched
    from omnivideo.training.train import run_training

    if config.processes > 1 and not is_launched():
        raise typer.Exit(relaunch_command(config.processes, config.sequence_parallel))
    run_training(config, console, partial(print_skips, report_path=config.report), render_samples)


def render_samples(omni: "OmniVideoModel", path: Path | None) -> dict[str, float]:
    """Render a sheet of samples and return their scores; the evaluation is loaded only if samples are requested."""
    from omnivideo.evaluation.sample_sheet import render_sample_sheet

    return render_sample_sheet(omni, path)


def plan(
    recipe: Annotated[str, typer.Argument(help=f"One of {', '.join(SHARD_RECIPES)}.")],
    preset: Annotated[str, typer.Option(help="Model to plan for.", rich_help_panel=MODEL)] = "omnivideo-1.3b",
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in px.", rich_help_panel=MODEL)] = "832x480",
    frames: Annotated[int, typer.Option(help="Frames of a clip (4k + 1).", rich_help_panel=MODEL)] = 17,
    gpus: Annotated[
        str,
        typer.Option(
            help=GPUS_HELP,
            rich_help_panel=HARDWARE,
        ),
    ] = "8xH100",
    sequence_parallel: Annotated[
        int, typer.Option(min=1, help="GPUs that share the tokens of each sample.", rich_help_panel=HARDWARE)
    ] = 1,
    utilisation: Annotated[
        float, typer.Option(help="Assumed fraction of peak FLOP/s, above 0 and up to 1.", rich_help_panel=HARDWARE)
    ] = 0.45,
    batch: Annotated[int, typer.Option(min=1, help="Clips in a micro-batch on one GPU.", rich_help_panel=BATCHES)] = 1,
    grad_accum: Annotated[int, typer.Option(min=1, help="Micro-batches in a step.", rich_help_panel=BATCHES)] = 1,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps; default: one epoch of the paper's Table 1.", rich_help_panel=BATCHES),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option(help="Recompute activations in the backward pass.", rich_help_panel=BATCHES)
    ] = False,
    cached: Annotated[
        bool, typer.Option(help="Read latents and text embeddings from the cache.", rich_help_panel=BATCHES)
    ] = True,
) -> None:
    """Estimate the cost of a stage at full size: memory, seconds per step and days; exit with 2 if it does not fit."""
    from omnivideo.training.planning.config import PlanConfig
    from omnivideo.training.planning.plan import build_plan, check_fits
    from omnivideo.training.planning.table import build_plan_table

    width, height = parse_width_height(size)
    gpu_count, gpu = parse_gpus(gpus)
    training_plan = build_plan(
        PlanConfig(
            recipe=recipe, gpu=gpu, gpus=gpu_count, preset=get_preset(preset), clips_per_gpu=batch, width=width,
            height=height, frames=frames, sequence_parallel_size=sequence_parallel, checkpointing=checkpointing,
            cached=cached, steps=steps, utilisation=utilisation, grad_accum_steps=grad_accum,
        )
    )  # fmt: skip
    console.print(build_plan_table(training_plan))
    check_fits(training_plan)

"""The commands of training: train (and its plan), evaluate, ablate."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from omnivideo.cli import data
from omnivideo.cli.app import DeviceOption, WeightsOption, console, error_console, open_studio, parse_size
from omnivideo.errors import InvalidInput
from omnivideo.presets import get_preset as preset_of


def evaluate(
    preset: Annotated[str, typer.Argument(help="tiny: its world has a scorer.")] = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Held-out prompts a category.")] = 50,
    planner: Annotated[bool, typer.Option("--planner", help="Score the planner's turns instead.")] = False,
    report: Annotated[Optional[Path], typer.Option(help="Write the scores as JSON.")] = None,  # noqa: UP045
) -> None:
    """Score a preset on held-out prompts, edits, questions and routes; or the planner, turn by turn."""
    from omnivideo.evaluation.report import build_score_table, score_planner, scores_to_json
    from omnivideo.evaluation.suite import evaluate_all

    if preset != "tiny":
        raise InvalidInput("preset", f"{preset!r} has no world to be scored in; use tiny")
    studio = open_studio(preset, weights, device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console, transient=True) as bar:
        rows: dict[str, Any] = {}

        def on_progress(name: str, done: int, total: int) -> None:
            if name not in rows:
                rows[name] = bar.add_task(name)
            bar.update(rows[name], completed=done, total=total)

        scores = (
            score_planner(studio.conversations, count, on_progress)
            if planner
            else evaluate_all(studio.omni, count, on_progress)
        )
    console.print(build_score_table(scores))
    if report is not None:
        report.write_text(scores_to_json(scores))


def ablate(
    runs: Annotated[Path, typer.Option(help="Folder in which all recipes were trained.")] = Path("runs"),
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Held-out prompts a category.")] = 50,
) -> None:
    """Score the tiny preset after every stage, and without its visual tokens."""
    from omnivideo.evaluation.ablation import build_ablation_table, run_ablation
    from omnivideo.training.tiny.pipeline import TinyPipeline

    with error_console.status("") as status:
        rows = dict(
            run_ablation(
                TinyPipeline(runs).load_omni, count, lambda name, done, of: status.update(f"{name} {done}/{of}")
            )
        )
    console.print(build_ablation_table(rows))


def train(
    recipe: Annotated[str, typer.Argument(help="tiny for all of them in order, or one recipe's name.")],
    runs: Annotated[Path, typer.Option(help="Folder of checkpoints, logs and plots.")] = Path("runs"),
    compiled: Annotated[bool, typer.Option(help="torch.compile the decoder (needs a C++ compiler).")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share every batch.")] = 1,
    sequence_parallel: Annotated[
        int, typer.Option("--sequence", "--sequence-parallel", min=1, help="Processes that share a sample's tokens.")
    ] = 1,
    optimizer: Annotated[Optional[Literal["muon", "adamw"]], typer.Option(help="Instead of the recipe's.")] = None,  # noqa: UP045
    checkpointing: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--checkpointing/--no-checkpointing", help="Less memory, more time."),
    ] = None,
    log_to: Annotated[list[str], typer.Option(help="tensorboard or wandb; may be given twice.")] = [],  # noqa: B006
    sample_every: Annotated[
        int | None, typer.Option(min=1, help="Draw and score samples every so many steps, to RUN/samples.")
    ] = None,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between checkpoints.")] = 120.0,
    stop_at_step: Annotated[int | None, typer.Option(min=0, help="Stop at this step; 0 only writes state.pt.")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where it trains.")] = "cpu",
    workers: Annotated[int, typer.Option(min=0, help="More processes, which draw the batches; 0: none.")] = 0,
    weights: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Begin with this folder of weights where an earlier recipe has no run."),
    ] = None,
    data_location: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--data", help="Shards (a folder, s3://bucket/prefix) instead of the rendered world."),
    ] = None,
    fps: Annotated[float, typer.Option(help="With --data: frames a second that clips are seen at.")] = 8.0,
    stills: data.StillsOption = None,
    clips: data.ClipsOption = None,
    ratio: data.RatioOption = [],  # noqa: B006
    group_weight: data.GroupWeightOption = [],  # noqa: B006
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="With --data: samples of a process's forward and backward pass; else all.")
    ] = None,
    batch_scale: Annotated[int, typer.Option(min=1, help="Batches so many times the recipe's.")] = 1,
    lr_scale: Annotated[float, typer.Option(min=0, help="Learning rates so many times the recipe's.")] = 1.0,
    precision: Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="Of products; else the recipe's.")] = None,
    seed: Annotated[
        list[int],
        typer.Option(min=0, help="Of the requests, further ones for more edits; with --data one, of the order."),
    ] = [],  # noqa: B006
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the recipe costs at full size.")] = False,
    preset: Annotated[str, typer.Option(help="With --plan: the model.")] = "omnivideo-1.3b",
    gpus: Annotated[str, typer.Option(help="With --plan: COUNTxNAME.")] = "8xH100",
    batch: Annotated[int, typer.Option(min=1, help="With --plan: clips on one GPU in a pass.")] = 1,
    grad_accum: Annotated[
        int, typer.Option(min=1, help="With --plan: passes of a step, as --micro-batch-size makes them.")
    ] = 1,
    size: Annotated[str, typer.Option(help="With --plan or --data: WIDTHxHEIGHT in px.")] = "832x480",
    frames: Annotated[str, typer.Option(help="With --plan: frames of a clip; with --data: all lengths.")] = "17",
    cached: Annotated[bool, typer.Option(help="With --plan: latents and text come from the cache.")] = True,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's; with --plan Table 1 once.")] = None,
    utilisation: Annotated[float, typer.Option(help="With --plan: share of the peak in products.")] = 0.45,
    report: data.ReportOption = None,
) -> None:
    """Train the tiny preset, or one recipe of it, or a stage over shards; goes on from its last checkpoint."""
    if plan:
        return print_plan(
            recipe,
            gpus,
            preset_of(preset),
            batch,
            **parse_size(size),
            frames=data.parse_integers("frames", [frames])[0],
            sequence_parallel_size=sequence_parallel,
            checkpointing=bool(checkpointing),
            cached=cached,
            steps=steps,
            utilisation=utilisation,
            grad_accum_steps=grad_accum,
        )
    from omnivideo.training.engine import zero
    from omnivideo.training.engine.monitor import build_sample_hook, build_writer_factory, skip_samples
    from omnivideo.training.engine.trainer import PRECISIONS
    from omnivideo.training.tiny.pipeline import REQUEST_SEEDS, TinyPipeline

    make = build_writer_factory(log_to)
    sample_callback: Callable[[Any], dict[str, float]] = skip_samples
    if sample_every is not None:
        from omnivideo.evaluation.sample_sheet import render_sample_sheet

        sample_callback = build_sample_hook(sample_every, render_sample_sheet)
    if processes > 1 and not zero.is_launched():
        raise typer.Exit(zero.relaunch_command(processes, sequence_parallel))
    requested_changes: dict[str, Any] = {"optimizer": optimizer, "checkpointing": checkpointing, "steps": steps}
    requested_changes["precision"] = PRECISIONS[precision] if precision else None
    changes = {name: value for name, value in requested_changes.items() if value is not None}
    with zero.open_process_context(processes, sequence_parallel, device) as world:
        tiny = TinyPipeline(
            runs, compiled, make_writers=make, initial_weights=weights, device=device, workers=workers,
            batch_scale=batch_scale, request_seeds=seed or REQUEST_SEEDS,
        )  # fmt: skip
        if data_location is None:
            if stills or clips or ratio or group_weight or micro_batch_size:
                raise InvalidInput(
                    "data", "--stills, --clips, --ratio, --group-weight and --micro-batch-size are of batches over it"
                )
            return tiny.train(recipe, console, world, stop_at_step, lr_scale, save_every, sample_callback, **changes)
        from omnivideo.training.recipes.over_shards import build_mix, build_recipe_factories

        if len(seed) > 1:
            raise InvalidInput("seed", f"{len(seed)} are given; allowed: one with --data")
        mix = build_mix(stills, clips, batch_scale, ratio, group_weight, *seed)
        library, fit = data.open_dataset(data_location, size, frames, fps)
        with data.report_skips(library.skip_report, report, world):
            tiny.recipe_factories = build_recipe_factories(
                library, fit, recipe, tiny, weights, mix, micro_batch_size, requested_changes["precision"]
            )
            if world.is_main_process:
                tiny.recipe_factories = data.report_skips_after_build(
                    tiny.recipe_factories, library.skip_report, report
                )
            tiny.train(recipe, console, world, stop_at_step, lr_scale, save_every, sample_callback, **changes)


def print_plan(recipe: str, gpus: str, *plan_args: Any, **plan_options: Any) -> None:
    """Prints what a recipe costs; raises InvalidInput where it does not fit."""
    from omnivideo.training.planning.flops import parse_gpus
    from omnivideo.training.planning.plan import PlanConfig, check_fits, plan_to_table
    from omnivideo.training.planning.plan import build_plan as planned

    count, gpu = parse_gpus(gpus)
    training_plan = planned(PlanConfig(recipe, gpu, count, *plan_args, **plan_options))
    console.print(plan_to_table(training_plan))
    check_fits(training_plan)

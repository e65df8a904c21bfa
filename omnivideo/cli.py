"""The command line: parse, build, run."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from omnivideo import convert, operate
from omnivideo.contracts import check_prompt, resolve_sampling_params
from omnivideo.errors import InvalidInput, OmniVideoError
from omnivideo.presets import Task
from omnivideo.presets import get_preset as preset_of
from omnivideo.training.curation.command import curate
from omnivideo.training.data import commands as data

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(operate.app)
app.add_typer(convert.app, name="weights")
data.app.command()(curate)
app.add_typer(data.app)
console = Console()
error_console = Console(stderr=True)

PresetOption = Annotated[str, typer.Option(help="Model: tiny is shipped; the full sizes need --weights.")]
WeightsOption = Annotated[Optional[Path], typer.Option(help="Folder of weights, if not the shipped one.")]  # noqa: UP045
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda:N.")]
HomeOption = Annotated[Optional[Path], typer.Option(help="Folder of threads and artifacts.")]  # noqa: UP045
OutputFileOption = Annotated[Path, typer.Option("-o", "--output", help="File to write: .mp4, .gif or .png.")]
SeedOption = Annotated[int, typer.Option(help="Fixes every byte of the result.")]
StepsOption = Annotated[Optional[int], typer.Option(help="Denoising steps.")]  # noqa: UP045
GuidanceOption = Annotated[Optional[float], typer.Option(help="Guidance scale.")]  # noqa: UP045
FramesOption = Annotated[Optional[int], typer.Option(help="Frames of a clip: 5, 9, 13 ...")]  # noqa: UP045
SizeOption = Annotated[Optional[str], typer.Option(help="WIDTHxHEIGHT in px, multiples of 16.")]  # noqa: UP045
NegativePromptOption = Annotated[Optional[str], typer.Option(help="Negative prompt.")]  # noqa: UP045


def parse_size(size: str | None) -> dict[str, int | None]:
    if size is None:
        return {"width": None, "height": None}
    width, cross, height = size.lower().partition("x")
    if not (cross and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise InvalidInput("size", f"{size!r} is not of the form WIDTHxHEIGHT, e.g. 64x64")
    return {"width": int(width), "height": int(height)}


@contextmanager
def show_step_progress(label: str) -> Iterator[Callable[[Any], None]]:
    """A bar with steps done and time left, fed with `Step` events."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console, transient=True) as bar:
        row = bar.add_task("", total=None)
        yield lambda step: bar.update(row, total=step.steps, completed=step.step)


def open_studio(preset: str, weights: Path | None, device: str, home: Path | None = None) -> Any:
    # Imported here: torch and its friends take seconds that --help and a refused argument need not wait for.
    from omnivideo.studio import Studio

    with error_console.status("loading the model"):
        return Studio(preset, weights, device, home)


def save_result(result: Any, output: Path) -> None:
    result.save(output)
    seconds = result.manifest.seconds
    console.print(f"{output} [dim]({len(result.frames)} frames, {sum(seconds.values()):.1f} s)[/dim]", highlight=False)


@app.command()
def generate(
    prompt: str,
    output: OutputFileOption,
    image: Annotated[bool | None, typer.Option("--image/--video", help="Default: the model decides.")] = None,
    preset: PresetOption = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    frames: FramesOption = None,
    size: SizeOption = None,
    negative_prompt: NegativePromptOption = None,
) -> None:
    """Draw a clip or a still from a sentence."""
    from omnivideo.backends.decoder.video import check_output

    prompt = check_prompt("prompt", prompt)
    overrides: dict[str, Any] = parse_size(size) | {
        "seed": seed, "steps": steps, "guidance_scale": guidance_scale, "frames": frames, "negative_prompt": negative_prompt,
    }  # fmt: skip
    if image is None and (frames == 1 or output.suffix.lower() == ".png"):
        image = True
    # Refused before any model is loaded.
    task: Task = "text-to-image" if image else "text-to-video"
    params = resolve_sampling_params(preset_of(preset), task, **overrides)
    check_output(output, params.frames)
    studio = open_studio(preset, weights, device)
    with show_step_progress("denoising") as on_step:
        result = studio.generate(prompt, image=image, on_step=on_step, **overrides)
    save_result(result, output)


@app.command()
def edit(
    source: Path,
    instruction: str,
    output: OutputFileOption,
    preset: PresetOption = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    size: SizeOption = None,
    negative_prompt: NegativePromptOption = None,
) -> None:
    """Change a clip or a still as told; what is not named stays."""
    from omnivideo.backends.decoder.video import check_output, read_media

    instruction = check_prompt("instruction", instruction)
    overrides: dict[str, Any] = parse_size(size) | {
        "seed": seed, "steps": steps, "guidance_scale": guidance_scale, "negative_prompt": negative_prompt,
    }  # fmt: skip
    kind = read_media(source).kind
    task: Task = "image-editing" if kind == "image" else "video-editing"
    check_output(output, resolve_sampling_params(preset_of(preset), task, **overrides).frames)
    studio = open_studio(preset, weights, device)
    with show_step_progress("denoising") as on_step:
        result = studio.edit(source, instruction, on_step=on_step, **overrides)
    save_result(result, output)


@app.command()
def understand(
    source: Path, question: str, preset: PresetOption = "tiny", weights: WeightsOption = None, device: DeviceOption = "auto"
) -> None:
    """Answer a question about a clip or a still."""
    from omnivideo.backends.decoder.video import read_media

    question = check_prompt("question", question)
    read_media(source)
    studio = open_studio(preset, weights, device)
    studio.understand(source, question, on_text=lambda piece: console.print(piece, end="", highlight=False, markup=False))
    console.print()


@app.command()
def chat(
    thread: Annotated[Optional[str], typer.Option(help="Go on with this thread.")] = None,  # noqa: UP045
    preset: PresetOption = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    home: HomeOption = None,
    think: Annotated[str, typer.Option(help="Reason before drawing: off, on or auto.")] = "auto",
    check: Annotated[int, typer.Option(min=1, max=16, help="Tries, of which the model keeps the best.")] = 1,
    seed: Annotated[Optional[int], typer.Option(help="Default: follows from the thread.")] = None,  # noqa: UP045
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
) -> None:
    """Talk: create, change and ask, each turn building on the last."""
    from omnivideo.agent.thread import parse_turn_options
    from omnivideo.chat import TerminalChat, read_keyboard_lines

    options = {"think": think, "check": check, "seed": seed, "steps": steps, "guidance_scale": guidance_scale}
    parse_turn_options(**options)
    studio = open_studio(preset, weights, device, home)
    lines = read_keyboard_lines(console) if sys.stdin.isatty() else sys.stdin
    TerminalChat(studio.thread(thread), studio.file, console, **options).run(lines)


@app.command()
def batch(
    prompts: Path,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the clips and results.jsonl.")],
    preset: PresetOption = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Draw every line of a JSONL file (or of plain prompts); run again, it does what is left."""
    from omnivideo.batch import parse_items, run_batch

    try:
        lines = [line for line in prompts.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise InvalidInput("prompts", f"{prompts.name!r} cannot be read as text") from None
    batch_items = parse_items(lines)
    studio = open_studio(preset, weights, device)
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failed_count = 0
    with Progress(*columns, console=error_console) as bar:
        for outcome in bar.track(run_batch(studio, batch_items, output), total=len(batch_items)):
            if outcome.error:
                failed_count += 1
                bar.console.print(f"{outcome.id}: {outcome.error}", style="red", markup=False, highlight=False)
    console.print(f"{len(batch_items) - failed_count} of {len(batch_items)} done: {output / 'results.jsonl'}", highlight=False)
    if failed_count:
        raise typer.Exit(1)


@app.command()
def evaluate(
    preset: Annotated[str, typer.Argument(help="tiny: its world has a scorer.")] = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Held-out prompts a category.")] = 50,
    planner: Annotated[bool, typer.Option("--planner", help="Score the planner's turns instead.")] = False,
    report: Annotated[Optional[Path], typer.Option(help="Write the scores as JSON.")] = None,  # noqa: UP045
) -> None:
    """Score a preset on held-out prompts, edits, questions and routes; or the planner, turn by turn."""
    from omnivideo.evaluation.report import scores_to_json, build_score_table, score_planner
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

        scores = score_planner(studio.conversations, count, on_progress) if planner else evaluate_all(studio.omni, count, on_progress)
    console.print(build_score_table(scores))
    if report is not None:
        report.write_text(scores_to_json(scores))


@app.command()
def ablate(
    runs: Annotated[Path, typer.Option(help="Folder in which all recipes were trained.")] = Path("runs"),
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Held-out prompts a category.")] = 50,
) -> None:
    """Score the tiny preset after every stage, and without its visual tokens."""
    from omnivideo.evaluation.ablation import run_ablation, build_ablation_table
    from omnivideo.training.tiny import TinyPipeline

    with error_console.status("") as status:
        rows = dict(run_ablation(TinyPipeline(runs).load_omni, count, lambda name, done, of: status.update(f"{name} {done}/{of}")))
    console.print(build_ablation_table(rows))


@app.command()
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
    stop_at_step: Annotated[Optional[int], typer.Option(min=0, help="Stop at this step; 0 only writes state.pt.")] = None,  # noqa: UP045
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
    grad_accum: Annotated[int, typer.Option(min=1, help="With --plan: passes of a step, as --micro makes them.")] = 1,
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
            recipe, gpus, preset_of(preset), batch, **parse_size(size),
            frames=data.parse_integers("frames", [frames])[0], sequence=sequence_parallel, checkpointing=bool(checkpointing),
            cached=cached, steps=steps, utilisation=utilisation, passes=grad_accum,
        )  # fmt: skip
    from omnivideo.training import distributed
    from omnivideo.training.tiny import REQUEST_SEEDS, TinyPipeline
    from omnivideo.training.trainer import PRECISIONS
    from omnivideo.training.watch import skip_samples, build_sample_hook, build_writer_factory

    make = build_writer_factory(log_to)
    sample_callback: Callable[[Any], dict[str, float]] = skip_samples
    if sample_every is not None:
        from omnivideo.look import render_sample_sheet

        sample_callback = build_sample_hook(sample_every, render_sample_sheet)
    if processes > 1 and not distributed.is_launched():
        raise typer.Exit(distributed.relaunch_command(processes, sequence_parallel))
    requested_changes: dict[str, Any] = {"optimizer": optimizer, "checkpointing": checkpointing, "steps": steps}
    requested_changes["precision"] = PRECISIONS[precision] if precision else None
    changes = {name: value for name, value in requested_changes.items() if value is not None}
    with distributed.open_process_context(processes, sequence_parallel, device) as world:
        tiny = TinyPipeline(
            runs, compiled, make_writers=make, initial_weights=weights, device=device, workers=workers, batch_scale=batch_scale,
            request_seeds=seed or REQUEST_SEEDS,
        )  # fmt: skip
        if data_location is None:
            if stills or clips or ratio or group_weight or micro_batch_size:
                raise InvalidInput(
                    "data", "--stills, --clips, --ratio, --group-weight and --micro are of batches over it"
                )
            return tiny.train(recipe, console, world, stop_at_step, lr_scale, save_every, sample_callback, **changes)
        from omnivideo.training.real import build_recipe_factories, build_mix

        if len(seed) > 1:
            raise InvalidInput("seed", f"{len(seed)} are given; allowed: one with --data")
        mix = build_mix(stills, clips, batch_scale, ratio, group_weight, *seed)
        library, fit = data.open_dataset(data_location, size, frames, fps)
        with data.report_skips(library.problems, report, world):
            tiny.recipe_factories = build_recipe_factories(library, fit, recipe, tiny, weights, mix, micro_batch_size, requested_changes["precision"])
            if world.is_main_process:
                tiny.recipe_factories = data.report_skips_after_build(tiny.recipe_factories, library.problems, report)
            tiny.train(recipe, console, world, stop_at_step, lr_scale, save_every, sample_callback, **changes)


def print_plan(recipe: str, gpus: str, *plan_args: Any, **plan_options: Any) -> None:
    """Prints what a recipe costs; raises InvalidInput where it does not fit."""
    from omnivideo.training.flops import parse_gpus
    from omnivideo.training.plan import PlanConfig, plan_to_table, check_fits
    from omnivideo.training.plan import build_plan as planned

    count, gpu = parse_gpus(gpus)
    training_plan = planned(PlanConfig(recipe, gpu, count, *plan_args, **plan_options))
    console.print(plan_to_table(training_plan))
    check_fits(training_plan)


@app.command()
def doctor() -> None:
    """What this machine can run: devices, memory, packages, weights."""
    from omnivideo.doctor import collect_findings

    table = Table(show_header=False, box=None)
    for name, value in collect_findings():
        table.add_row(f"[bold]{name}[/bold]", value)
    console.print(table)


def main() -> None:
    """Runs the command line; what a user can cause ends as one line and exit code 2."""
    try:
        app()
    except OmniVideoError as error:
        error_console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        error_console.print("cancelled")
        sys.exit(130)


if __name__ == "__main__":
    main()

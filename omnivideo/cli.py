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
from omnivideo.contracts import check_prompt, settings
from omnivideo.errors import InvalidInput, OmniVideoError
from omnivideo.presets import Task
from omnivideo.presets import preset as preset_of
from omnivideo.training.curation.command import curate
from omnivideo.training.data import commands as data

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(operate.app)
app.add_typer(convert.app, name="weights")
data.app.command()(curate)
app.add_typer(data.app)
out = Console()
err = Console(stderr=True)

Preset = Annotated[str, typer.Option(help="Model: tiny is shipped; the full sizes need --weights.")]
Weights = Annotated[Optional[Path], typer.Option(help="Folder of weights, if not the shipped one.")]  # noqa: UP045
Device = Annotated[str, typer.Option(help="auto, cpu or cuda:N.")]
Home = Annotated[Optional[Path], typer.Option(help="Folder of threads and artifacts.")]  # noqa: UP045
Output = Annotated[Path, typer.Option("-o", "--output", help="File to write: .mp4, .gif or .png.")]
Seed = Annotated[int, typer.Option(help="Fixes every byte of the result.")]
Steps = Annotated[Optional[int], typer.Option(help="Denoising steps.")]  # noqa: UP045
Guidance = Annotated[Optional[float], typer.Option(help="Guidance scale.")]  # noqa: UP045
Frames = Annotated[Optional[int], typer.Option(help="Frames of a clip: 5, 9, 13 ...")]  # noqa: UP045
Size = Annotated[Optional[str], typer.Option(help="WIDTHxHEIGHT in px, multiples of 16.")]  # noqa: UP045
Negative = Annotated[Optional[str], typer.Option(help="Negative prompt.")]  # noqa: UP045


def parse_size(size: str | None) -> dict[str, int | None]:
    if size is None:
        return {"width": None, "height": None}
    width, cross, height = size.lower().partition("x")
    if not (cross and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise InvalidInput("size", f"{size!r} is not of the form WIDTHxHEIGHT, e.g. 64x64")
    return {"width": int(width), "height": int(height)}


@contextmanager
def step_bar(label: str) -> Iterator[Callable[[Any], None]]:
    """A bar with steps done and time left, fed with `Step` events."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        row = bar.add_task("", total=None)
        yield lambda step: bar.update(row, total=step.steps, completed=step.step)


def open_studio(preset: str, weights: Path | None, device: str, home: Path | None = None) -> Any:
    # Imported here: torch and its friends take seconds that --help and a refused argument need not wait for.
    from omnivideo.studio import Studio

    with err.status("loading the model"):
        return Studio(preset, weights, device, home)


def finish(result: Any, output: Path) -> None:
    result.save(output)
    seconds = result.manifest.seconds
    out.print(f"{output} [dim]({len(result.frames)} frames, {sum(seconds.values()):.1f} s)[/dim]", highlight=False)


@app.command()
def generate(
    prompt: str,
    output: Output,
    image: Annotated[bool | None, typer.Option("--image/--video", help="Default: the model decides.")] = None,
    preset: Preset = "tiny",
    weights: Weights = None,
    device: Device = "auto",
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    frames: Frames = None,
    size: Size = None,
    negative: Negative = None,
) -> None:
    """Draw a clip or a still from a sentence."""
    from omnivideo.backends.decoder.video import check_output

    prompt = check_prompt("prompt", prompt)
    given: dict[str, Any] = parse_size(size) | {
        "seed": seed, "steps": steps, "guidance_scale": guidance, "frames": frames, "negative_prompt": negative,
    }  # fmt: skip
    if image is None and (frames == 1 or output.suffix.lower() == ".png"):
        image = True
    # Refused before any model is loaded.
    task: Task = "text-to-image" if image else "text-to-video"
    chosen = settings(preset_of(preset), task, **given)
    check_output(output, chosen.frames)
    studio = open_studio(preset, weights, device)
    with step_bar("denoising") as on_step:
        result = studio.generate(prompt, image=image, on_step=on_step, **given)
    finish(result, output)


@app.command()
def edit(
    source: Path,
    instruction: str,
    output: Output,
    preset: Preset = "tiny",
    weights: Weights = None,
    device: Device = "auto",
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    negative: Negative = None,
) -> None:
    """Change a clip or a still as told; what is not named stays."""
    from omnivideo.backends.decoder.video import check_output, read_media

    instruction = check_prompt("instruction", instruction)
    given: dict[str, Any] = parse_size(size) | {
        "seed": seed, "steps": steps, "guidance_scale": guidance, "negative_prompt": negative,
    }  # fmt: skip
    kind = read_media(source).kind
    task: Task = "image-editing" if kind == "image" else "video-editing"
    check_output(output, settings(preset_of(preset), task, **given).frames)
    studio = open_studio(preset, weights, device)
    with step_bar("denoising") as on_step:
        result = studio.edit(source, instruction, on_step=on_step, **given)
    finish(result, output)


@app.command()
def understand(
    source: Path, question: str, preset: Preset = "tiny", weights: Weights = None, device: Device = "auto"
) -> None:
    """Answer a question about a clip or a still."""
    from omnivideo.backends.decoder.video import read_media

    question = check_prompt("question", question)
    read_media(source)
    studio = open_studio(preset, weights, device)
    studio.understand(source, question, on_text=lambda piece: out.print(piece, end="", highlight=False, markup=False))
    out.print()


@app.command()
def chat(
    thread: Annotated[Optional[str], typer.Option(help="Go on with this thread.")] = None,  # noqa: UP045
    preset: Preset = "tiny",
    weights: Weights = None,
    device: Device = "auto",
    home: Home = None,
    think: Annotated[str, typer.Option(help="Reason before drawing: off, on or auto.")] = "auto",
    check: Annotated[int, typer.Option(min=1, max=16, help="Tries, of which the model keeps the best.")] = 1,
    seed: Annotated[Optional[int], typer.Option(help="Default: follows from the thread.")] = None,  # noqa: UP045
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Talk: create, change and ask, each turn building on the last."""
    from omnivideo.agent.thread import options_of
    from omnivideo.chat import Chat, typed

    options = {"think": think, "check": check, "seed": seed, "steps": steps, "guidance_scale": guidance}
    options_of(**options)
    studio = open_studio(preset, weights, device, home)
    lines = typed(out) if sys.stdin.isatty() else sys.stdin
    Chat(studio.thread(thread), studio.file, out, **options).run(lines)


@app.command()
def batch(
    prompts: Path,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the clips and results.jsonl.")],
    preset: Preset = "tiny",
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Draw every line of a JSONL file (or of plain prompts); run again, it does what is left."""
    from omnivideo.batch import items, run

    try:
        lines = [line for line in prompts.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise InvalidInput("prompts", f"{prompts.name!r} cannot be read as text") from None
    wanted = items(lines)
    studio = open_studio(preset, weights, device)
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failed = 0
    with Progress(*columns, console=err) as bar:
        for outcome in bar.track(run(studio, wanted, output), total=len(wanted)):
            if outcome.error:
                failed += 1
                bar.console.print(f"{outcome.id}: {outcome.error}", style="red", markup=False, highlight=False)
    out.print(f"{len(wanted) - failed} of {len(wanted)} done: {output / 'results.jsonl'}", highlight=False)
    if failed:
        raise typer.Exit(1)


@app.command()
def evaluate(
    preset: Annotated[str, typer.Argument(help="tiny: its world has a scorer.")] = "tiny",
    weights: Weights = None,
    device: Device = "auto",
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Held-out prompts a category.")] = 50,
    planner: Annotated[bool, typer.Option("--planner", help="Score the planner's turns instead.")] = False,
    report: Annotated[Optional[Path], typer.Option(help="Write the scores as JSON.")] = None,  # noqa: UP045
) -> None:
    """Score a preset on held-out prompts, edits, questions and routes; or the planner, turn by turn."""
    from omnivideo.evaluation.report import as_json, as_table, planner_scores
    from omnivideo.evaluation.suite import everything

    if preset != "tiny":
        raise InvalidInput("preset", f"{preset!r} has no world to be scored in; use tiny")
    studio = open_studio(preset, weights, device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        rows: dict[str, Any] = {}

        def tell(name: str, done: int, total: int) -> None:
            if name not in rows:
                rows[name] = bar.add_task(name)
            bar.update(rows[name], completed=done, total=total)

        scores = planner_scores(studio.conversations, count, tell) if planner else everything(studio.omni, count, tell)
    out.print(as_table(scores))
    if report is not None:
        report.write_text(as_json(scores))


@app.command()
def ablate(
    runs: Annotated[Path, typer.Option(help="Folder in which all recipes were trained.")] = Path("runs"),
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Held-out prompts a category.")] = 50,
) -> None:
    """Score the tiny preset after every stage, and without its visual tokens."""
    from omnivideo.evaluation.ablation import ablation, as_table
    from omnivideo.training.tiny import Tiny

    with err.status("") as status:
        rows = dict(ablation(Tiny(runs).omni, count, lambda name, done, of: status.update(f"{name} {done}/{of}")))
    out.print(as_table(rows))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="tiny for all of them in order, or one recipe's name.")],
    runs: Annotated[Path, typer.Option(help="Folder of checkpoints, logs and plots.")] = Path("runs"),
    compiled: Annotated[bool, typer.Option(help="torch.compile the decoder (needs a C++ compiler).")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share every batch.")] = 1,
    sequence: Annotated[
        int, typer.Option("--sequence", "--sequence-parallel", min=1, help="Processes that share a sample's tokens.")
    ] = 1,
    optimizer: Annotated[Optional[Literal["muon", "adamw"]], typer.Option(help="Instead of the recipe's.")] = None,  # noqa: UP045
    checkpointing: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--checkpointing/--no-checkpointing", help="Less memory, more time."),
    ] = None,
    watch: Annotated[list[str], typer.Option(help="tensorboard or wandb; may be given twice.")] = [],  # noqa: B006
    look_every: Annotated[
        int | None, typer.Option(min=1, help="Draw and score samples every so many steps, to RUN/samples.")
    ] = None,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between checkpoints.")] = 120.0,
    until: Annotated[Optional[int], typer.Option(min=0, help="Stop at this step; 0 only writes state.pt.")] = None,  # noqa: UP045
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where it trains.")] = "cpu",
    workers: Annotated[int, typer.Option(min=0, help="More processes, which draw the batches; 0: none.")] = 0,
    weights: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Begin with this folder of weights where an earlier recipe has no run."),
    ] = None,
    shards: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--data", help="Shards (a folder, s3://bucket/prefix) instead of the rendered world."),
    ] = None,
    fps: Annotated[float, typer.Option(help="With --data: frames a second that clips are seen at.")] = 8.0,
    stills: data.Stills = None,
    clips: data.Clips = None,
    ratio: data.Ratio = [],  # noqa: B006
    group_weight: data.GroupWeight = [],  # noqa: B006
    micro: Annotated[
        int | None, typer.Option(min=1, help="With --data: samples of a process's forward and backward pass; else all.")
    ] = None,
    times: Annotated[int, typer.Option(min=1, help="Batches so many times the recipe's.")] = 1,
    rate: Annotated[float, typer.Option(min=0, help="Learning rates so many times the recipe's.")] = 1.0,
    precision: Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="Of products; else the recipe's.")] = None,
    seed: Annotated[
        list[int],
        typer.Option(min=0, help="Of the requests, further ones for more edits; with --data one, of the order."),
    ] = [],  # noqa: B006
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the recipe costs at full size.")] = False,
    preset: Annotated[str, typer.Option(help="With --plan: the model.")] = "omnivideo-1.3b",
    gpus: Annotated[str, typer.Option(help="With --plan: COUNTxNAME.")] = "8xH100",
    batch: Annotated[int, typer.Option(min=1, help="With --plan: clips on one GPU in a pass.")] = 1,
    passes: Annotated[int, typer.Option(min=1, help="With --plan: passes of a step, as --micro makes them.")] = 1,
    size: Annotated[str, typer.Option(help="With --plan or --data: WIDTHxHEIGHT in px.")] = "832x480",
    frames: Annotated[str, typer.Option(help="With --plan: frames of a clip; with --data: all lengths.")] = "17",
    cached: Annotated[bool, typer.Option(help="With --plan: latents and text come from the cache.")] = True,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's; with --plan Table 1 once.")] = None,
    utilisation: Annotated[float, typer.Option(help="With --plan: share of the peak in products.")] = 0.45,
    report: data.Report = None,
) -> None:
    """Train the tiny preset, or one recipe of it, or a stage over shards; goes on from its last checkpoint."""
    if plan:
        return show_plan(
            recipe, gpus, preset_of(preset), batch, **parse_size(size),
            frames=data.whole_numbers("frames", [frames])[0], sequence=sequence, checkpointing=bool(checkpointing),
            cached=cached, steps=steps, utilisation=utilisation, passes=passes,
        )  # fmt: skip
    from omnivideo.training import distributed
    from omnivideo.training.tiny import SEEDS, Tiny
    from omnivideo.training.trainer import PRECISIONS
    from omnivideo.training.watch import blind, every, watchers

    make = watchers(watch)
    looking: Callable[[Any], dict[str, float]] = blind
    if look_every is not None:
        from omnivideo.look import look

        looking = every(look_every, look)
    if processes > 1 and not distributed.launched():
        raise typer.Exit(distributed.relaunch(processes, sequence))
    given: dict[str, Any] = {"optimizer": optimizer, "checkpointing": checkpointing, "steps": steps}
    given["precision"] = PRECISIONS[precision] if precision else None
    changes = {name: value for name, value in given.items() if value is not None}
    with distributed.together(processes, sequence, device) as world:
        tiny = Tiny(
            runs, compiled, watch=make, weights=weights, device=device, workers=workers, times=times,
            seeds=seed or SEEDS,
        )  # fmt: skip
        if shards is None:
            if stills or clips or ratio or group_weight or micro:
                raise InvalidInput(
                    "data", "--stills, --clips, --ratio, --group-weight and --micro are of batches over it"
                )
            return tiny.train(recipe, out, world, until, rate, save_every, looking, **changes)
        from omnivideo.training.real import makers_over, mix_of

        if len(seed) > 1:
            raise InvalidInput("seed", f"{len(seed)} are given; allowed: one with --data")
        mix = mix_of(stills, clips, times, ratio, group_weight, *seed)
        library, fit = data.opened(shards, size, frames, fps)
        with data.concluding(library.problems, report, world):
            tiny.makers = makers_over(library, fit, recipe, tiny, weights, mix, micro, given["precision"])
            if world.first:
                tiny.makers = data.telling(tiny.makers, library.problems, report)
            tiny.train(recipe, out, world, until, rate, save_every, looking, **changes)


def show_plan(recipe: str, gpus: str, *setting: Any, **more: Any) -> None:
    """Prints what a recipe costs; raises InvalidInput where it does not fit."""
    from omnivideo.training.flops import gpus_of
    from omnivideo.training.plan import Setting, as_table, check
    from omnivideo.training.plan import plan as planned

    count, gpu = gpus_of(gpus)
    made = planned(Setting(recipe, gpu, count, *setting, **more))
    out.print(as_table(made))
    check(made)


@app.command()
def doctor() -> None:
    """What this machine can run: devices, memory, packages, weights."""
    from omnivideo.doctor import findings

    table = Table(show_header=False, box=None)
    for name, value in findings():
        table.add_row(f"[bold]{name}[/bold]", value)
    out.print(table)


def main() -> None:
    """Runs the command line; what a user can cause ends as one line and exit code 2."""
    try:
        app()
    except OmniVideoError as error:
        err.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("cancelled")
        sys.exit(130)


if __name__ == "__main__":
    main()

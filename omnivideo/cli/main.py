"""The command line: parse, build, run."""

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from omnivideo.cli import data, service, weights
from omnivideo.cli.app import (
    DeviceOption,
    FramesOption,
    GuidanceOption,
    HomeOption,
    NegativePromptOption,
    OutputFileOption,
    PresetOption,
    SeedOption,
    SizeOption,
    StepsOption,
    WeightsOption,
    app,
    console,
    error_console,
    open_studio,
    parse_size,
    save_result,
    show_step_progress,
)
from omnivideo.cli.curate import curate
from omnivideo.cli.evaluate import ablate, evaluate
from omnivideo.cli.train import plan, train
from omnivideo.contracts import check_prompt, resolve_sampling_params
from omnivideo.cpu_threads import configure_cpu_threads
from omnivideo.errors import InvalidInput, OmniVideoError
from omnivideo.presets import Task
from omnivideo.presets import get_preset as preset_of

app.add_typer(service.app)
app.add_typer(weights.app, name="weights")
data.app.command()(curate)
app.add_typer(data.app)


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
    from omnivideo.media.write import check_output

    prompt = check_prompt("prompt", prompt)
    overrides: dict[str, Any] = parse_size(size) | {
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "frames": frames,
        "negative_prompt": negative_prompt,
    }
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
    from omnivideo.media.read import read_media
    from omnivideo.media.write import check_output

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
    source: Path,
    question: str,
    preset: PresetOption = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Answer a question about a clip or a still."""
    from omnivideo.media.read import read_media

    question = check_prompt("question", question)
    read_media(source)
    studio = open_studio(preset, weights, device)
    studio.understand(
        source, question, on_text=lambda piece: console.print(piece, end="", highlight=False, markup=False)
    )
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
    from omnivideo.cli.chat import TerminalChat, read_keyboard_lines

    options = {"think": think, "check": check, "seed": seed, "steps": steps, "guidance_scale": guidance_scale}
    parse_turn_options(**options)
    studio = open_studio(preset, weights, device, home)
    lines = read_keyboard_lines(console) if sys.stdin.isatty() else sys.stdin
    TerminalChat(studio.open_thread(thread), studio.artifact_path, console, **options).run(lines)


@app.command()
def batch(
    prompts: Path,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the clips and results.jsonl.")],
    preset: PresetOption = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Draw every line of a JSONL file (or of plain prompts); run again, it does what is left."""
    from omnivideo.sdk.batch import parse_items, run_batch

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
    console.print(
        f"{len(batch_items) - failed_count} of {len(batch_items)} done: {output / 'results.jsonl'}", highlight=False
    )
    if failed_count:
        raise typer.Exit(1)


app.command()(evaluate)
app.command()(ablate)
app.command()(train)
app.command()(plan)


@app.command()
def doctor() -> None:
    """What this machine can run: devices, memory, packages, weights."""
    from omnivideo.cli.doctor import collect_findings

    table = Table(show_header=False, box=None)
    for name, value in collect_findings():
        table.add_row(f"[bold]{name}[/bold]", value)
    console.print(table)


def main() -> None:
    """Runs the command line; what a user can cause ends as one line and exit code 2."""
    configure_cpu_threads()
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

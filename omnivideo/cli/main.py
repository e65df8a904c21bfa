"""The command line's entry point, and the commands that generate, edit and understand video."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from omnivideo import __version__
from omnivideo.cli import data, keys, serve, service, weights
from omnivideo.cli.app import (
    CONVERSATION,
    INSTALLATION_COMMANDS,
    OUTPUT,
    SAMPLING,
    SERVICE_COMMANDS,
    TRAINING_COMMANDS,
    VIDEO_COMMANDS,
    DeviceOption,
    FpsOption,
    FramesOption,
    GuidanceOption,
    HomeOption,
    NegativePromptOption,
    OutputFileOption,
    PresetOption,
    SecondsOption,
    SeedOption,
    SizeOption,
    StepsOption,
    WeightsOption,
    app,
    check_clip_texts,
    collect_overrides,
    console,
    error_console,
    open_studio,
    open_text_limits,
    save_result,
    show_step_progress,
)
from omnivideo.cli.curate import curate
from omnivideo.cli.evaluate import ablate, evaluate
from omnivideo.cli.train import plan, train
from omnivideo.contracts import (
    get_editing_task,
    get_generation_task,
    resolve_sampling_params,
)
from omnivideo.cpu_threads import configure_cpu_threads
from omnivideo.errors import InvalidInput, OmniVideoError
from omnivideo.presets import get_animation_task, get_preset, get_sampling_defaults
from omnivideo.presets.shapes import SourceLength, get_file_length
from omnivideo.sdk.options import PICTURE_TO_EXTEND
from omnivideo.startup import defer_imports, preload_torch, skip_final_collection
from omnivideo.training.engine.progress_bar import LoggedProgress


def print_version(is_requested: bool) -> None:
    if is_requested:
        console.print(f"omnivideo {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def describe_program(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Understand, generate and edit video in one conversation."""


@app.command(rich_help_panel=VIDEO_COMMANDS)
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    output: OutputFileOption,
    image: Annotated[
        bool | None,
        typer.Option(
            "--image/--video", help="Generate an image or a clip. Default: the model decides.", rich_help_panel=OUTPUT
        ),
    ] = None,
    preset: PresetOption = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    frames: FramesOption = None,
    fps: FpsOption = None,
    seconds: SecondsOption = None,
    size: SizeOption = None,
    negative_prompt: NegativePromptOption = None,
) -> None:
    """Generate a clip or an image from a prompt."""
    preload_torch()
    from omnivideo.media.write import check_output

    overrides = collect_overrides(
        size,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        frames=frames,
        fps=fps,
        seconds=seconds,
        negative_prompt=negative_prompt,
    )
    if image is None and (frames == 1 or output.suffix.lower() == ".png"):
        image = True
    # Invalid settings are refused before the model is loaded, which takes seconds.
    task = get_generation_task("image" if image else "video")
    params = resolve_sampling_params(get_preset(preset), task, **overrides)
    check_clip_texts(preset, weights, params, "prompt", prompt)
    check_output(output, params.delivered_shape.frames)
    studio = open_studio(preset, weights, device)
    with show_step_progress("denoising") as on_step:
        result = studio.generate(prompt, image=image, on_step=on_step, **overrides)
    save_result(result, output)


@app.command(rich_help_panel=VIDEO_COMMANDS)
def edit(
    source: Annotated[Path, typer.Argument(help="The clip or image to edit.")],
    instruction: Annotated[str, typer.Argument(help="What to change.")],
    output: OutputFileOption,
    preset: PresetOption = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    fps: FpsOption = None,
    seconds: SecondsOption = None,
    size: SizeOption = None,
    negative_prompt: NegativePromptOption = None,
) -> None:
    """Edit a clip or an image by an instruction; everything else stays unchanged."""
    preload_torch()
    from omnivideo.media.read import measure_media
    from omnivideo.media.write import check_output

    overrides = collect_overrides(
        size,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        fps=fps,
        seconds=seconds,
        negative_prompt=negative_prompt,
    )
    info, model_preset = measure_media(source), get_preset(preset)
    length = get_file_length(model_preset, info.frames, info.fps)
    params = resolve_sampling_params(model_preset, get_editing_task(info.kind), length, **overrides)
    check_clip_texts(preset, weights, params, "instruction", instruction)
    check_output(output, params.delivered_shape.frames)
    studio = open_studio(preset, weights, device)
    with show_step_progress("denoising") as on_step:
        result = studio.edit(source, instruction, on_step=on_step, **overrides)
    save_result(result, output)


@app.command(rich_help_panel=VIDEO_COMMANDS)
def animate(
    source: Annotated[Path, typer.Argument(help="The picture that the clip begins with.")],
    prompt: Annotated[str, typer.Argument(help="What happens in the clip.")],
    output: OutputFileOption,
    last_image: Annotated[
        Path | None, typer.Option(help="A picture that the clip ends with.", rich_help_panel=OUTPUT)
    ] = None,
    preset: PresetOption = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    frames: FramesOption = None,
    fps: FpsOption = None,
    seconds: SecondsOption = None,
    size: SizeOption = None,
    negative_prompt: NegativePromptOption = None,
) -> None:
    """Generate a clip that begins with a picture."""
    preload_torch()
    from omnivideo.media.write import check_output

    overrides = collect_overrides(
        size,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        frames=frames,
        fps=fps,
        seconds=seconds,
        negative_prompt=negative_prompt,
    )
    model_preset = get_preset(preset)
    task = get_animation_task(model_preset) if last_image is None else "keyframes-to-video"
    get_sampling_defaults(model_preset, task, "preset")
    params = resolve_sampling_params(model_preset, task, **overrides)
    check_clip_texts(preset, weights, params, "prompt", prompt)
    check_output(output, params.delivered_shape.frames)
    studio = open_studio(preset, weights, device)
    with show_step_progress("denoising") as on_step:
        result = studio.animate(source, prompt, last_image=last_image, on_step=on_step, **overrides)
    save_result(result, output)


@app.command(rich_help_panel=VIDEO_COMMANDS)
def extend(
    source: Annotated[Path, typer.Argument(help="The clip to continue.")],
    prompt: Annotated[str, typer.Argument(help="What happens next.")],
    output: OutputFileOption,
    preset: PresetOption = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    frames: Annotated[
        int | None, typer.Option(help="Frames to add. Default: the preset's.", rich_help_panel=SAMPLING)
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Seconds to add.", rich_help_panel=SAMPLING)] = None,
    negative_prompt: NegativePromptOption = None,
) -> None:
    """Continue a clip; the result is the clip with what follows."""
    preload_torch()
    from omnivideo.media.read import measure_media
    from omnivideo.media.write import check_output

    overrides = collect_overrides(
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        frames=frames,
        seconds=seconds,
        negative_prompt=negative_prompt,
    )
    model_preset, info = get_preset(preset), measure_media(source)
    get_sampling_defaults(model_preset, "video-extension", "preset")
    if info.fps is None:
        raise InvalidInput("source", PICTURE_TO_EXTEND)
    length, size = SourceLength(info.frames, info.fps), {"width": info.width, "height": info.height}
    params = resolve_sampling_params(model_preset, "video-extension", length, **size, **overrides)
    check_clip_texts(preset, weights, params, "prompt", prompt)
    check_output(output, params.delivered_shape.frames)
    studio = open_studio(preset, weights, device)
    with show_step_progress("denoising") as on_step:
        result = studio.extend(source, prompt, on_step=on_step, **overrides)
    save_result(result, output)


@app.command(rich_help_panel=VIDEO_COMMANDS)
def understand(
    source: Annotated[Path, typer.Argument(help="The clip or image that the question is about.")],
    question: Annotated[str, typer.Argument(help="The question. By default, the clip or the image is described.")] = "",
    preset: PresetOption = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Answer a question about a clip or an image."""
    preload_torch()
    from omnivideo.media.read import measure_media

    info = measure_media(source)
    question = question or f"describe the {'picture' if info.frames == 1 else 'video'}"
    question = open_text_limits(preset, weights).check_message("question", question)
    studio = open_studio(preset, weights, device)
    studio.understand(source, question, on_text=lambda piece: console.print(Text(piece), end="", soft_wrap=True))
    console.print()


@app.command(rich_help_panel=VIDEO_COMMANDS)
def chat(
    thread: Annotated[
        str | None, typer.Option(help="Thread to continue. Default: a new one.", rich_help_panel=CONVERSATION)
    ] = None,
    preset: PresetOption = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    home: HomeOption = None,
    think: Annotated[
        str, typer.Option(help="Reason before generating: off, on or auto.", rich_help_panel=CONVERSATION)
    ] = "auto",
    check: Annotated[
        int,
        typer.Option(
            min=1, max=16, help="Candidates to generate, of which the model keeps the best.", rich_help_panel=SAMPLING
        ),
    ] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Default: derived from the thread's name.", rich_help_panel=SAMPLING)
    ] = None,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
) -> None:
    """Generate, edit and ask questions in a conversation; each turn builds on the previous ones."""
    preload_torch()
    from omnivideo.agent.thread import parse_turn_options
    from omnivideo.cli.chat import TerminalChat

    options = {"think": think, "check": check, "seed": seed, "steps": steps, "guidance_scale": guidance_scale}
    parse_turn_options(**options)
    studio = open_studio(preset, weights, device, home)
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    terminal_chat = TerminalChat(studio, studio.open_thread(thread), console, is_interactive, **options)
    lines: Iterable[str] = sys.stdin
    if is_interactive:
        from omnivideo.cli.keyboard import read_keyboard_lines

        lines = read_keyboard_lines(studio.settings.home / "chat_history", [*terminal_chat.commands, "quit"])
    terminal_chat.run(lines)


@app.command(rich_help_panel=VIDEO_COMMANDS)
def batch(
    prompts: Annotated[Path, typer.Argument(help="File with a prompt, or a JSON object, on each line.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Folder for the clips and results.jsonl.", rich_help_panel=OUTPUT),
    ],
    preset: PresetOption = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Generate a clip for every line of a file; when run again, continue with the lines that are not done."""
    preload_torch()
    from omnivideo.sdk.batch import run_batch
    from omnivideo.sdk.batch_items import parse_text

    try:
        text = prompts.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidInput("prompts", f"'{prompts}' cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput("prompts", f"'{prompts}' cannot be read as text") from None
    batch_items = parse_text(text, get_preset(preset), open_text_limits(preset, weights))
    studio = open_studio(preset, weights, device)
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failed_count = 0
    with LoggedProgress(*columns, console=error_console) as bar:
        for outcome in bar.track(run_batch(studio, batch_items, output), total=len(batch_items)):
            if outcome.error:
                failed_count += 1
                bar.console.print(Text(f"{outcome.id}: {outcome.error}", "red"), soft_wrap=True)
    done_count = len(batch_items) - failed_count
    console.print(Text(f"{done_count} of {len(batch_items)} done: {output / 'results.jsonl'}"), soft_wrap=True)
    if failed_count:
        raise typer.Exit(1)


app.add_typer(serve.app)
app.add_typer(service.app)
app.add_typer(keys.app, name="keys", rich_help_panel=SERVICE_COMMANDS)
app.command(rich_help_panel=TRAINING_COMMANDS)(train)
app.command(rich_help_panel=TRAINING_COMMANDS)(plan)
app.command(rich_help_panel=TRAINING_COMMANDS)(evaluate)
app.command(rich_help_panel=TRAINING_COMMANDS)(ablate)
data.app.command()(curate)
app.add_typer(data.app, rich_help_panel=TRAINING_COMMANDS)
app.add_typer(weights.app, name="weights", rich_help_panel=INSTALLATION_COMMANDS)


@app.command(rich_help_panel=INSTALLATION_COMMANDS)
def doctor(weights: WeightsOption = None, device: DeviceOption = "auto") -> None:
    """Print what this machine can run: devices, memory, packages and weights; and whether the settings are valid.

    With --weights, print what it can do with this folder: where each part computes, its memory, and the expected
    seconds of a clip.
    """
    from omnivideo.cli.doctor import collect_findings

    findings = collect_findings()
    if weights is not None:
        from omnivideo.cli.expectations import describe_folder
        from omnivideo.models.device import pick_device

        findings = describe_folder(weights, pick_device(device))
    table = Table(show_header=False, box=None)
    for name, value in findings:
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)


def main() -> None:
    """Run the command line. An error that the user can cause ends as one line on stderr, with exit code 2."""
    configure_cpu_threads()
    defer_imports()
    skip_final_collection()
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

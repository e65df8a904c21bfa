"""The command line's application, its consoles, and the options that several commands share."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from omnivideo.contracts import SamplingParams, StepProgress
from omnivideo.errors import InvalidInput
from omnivideo.presets import get_preset
from omnivideo.startup import exempt_loaded_objects, pause_collection

if TYPE_CHECKING:
    from omnivideo.models.text_limits import TokenLimits
    from omnivideo.sdk.result import Result
    from omnivideo.sdk.studio import Studio

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
console = Console()
error_console = Console(stderr=True)

# Groups of commands in `omnivideo --help`.
VIDEO_COMMANDS = "Video"
SERVICE_COMMANDS = "Service"
TRAINING_COMMANDS = "Training and evaluation"
INSTALLATION_COMMANDS = "Installation"
# Groups of options in the help of a command.
MODEL, SAMPLING, CONVERSATION, OUTPUT = "Model", "Sampling", "Conversation", "Output"
STORAGE, SERVER = "Storage", "Server"

PresetOption = Annotated[
    str, typer.Option(help="Model. The weights of tiny are shipped; the others need --weights.", rich_help_panel=MODEL)
]
WeightsOption = Annotated[
    Path | None, typer.Option(help="Folder of weights. Default: the preset's shipped ones.", rich_help_panel=MODEL)
]
DeviceOption = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda:N.", rich_help_panel=MODEL)]
HomeOption = Annotated[
    Path | None, typer.Option(help="Folder of threads and artifacts. Default: OMNIVIDEO_HOME.", rich_help_panel=STORAGE)
]
OutputFileOption = Annotated[
    Path, typer.Option("-o", "--output", help="File to write: .mp4, .gif or .png.", rich_help_panel=OUTPUT)
]
SeedOption = Annotated[
    int,
    typer.Option(
        help="The same seed gives the same bytes on the same machine; -1 is any seed.", rich_help_panel=SAMPLING
    ),
]
StepsOption = Annotated[
    int | None, typer.Option(help="Denoising steps, 1 to 200. Default: the preset's.", rich_help_panel=SAMPLING)
]
GuidanceOption = Annotated[
    float | None, typer.Option(help="Guidance scale, 0 to 30. Default: the preset's.", rich_help_panel=SAMPLING)
]
FramesOption = Annotated[
    int | None, typer.Option(help="Frames of the clip. Default: the preset's.", rich_help_panel=SAMPLING)
]
FpsOption = Annotated[
    float | None, typer.Option(help="Frames per second, 0.5 to 60. Default: the preset's.", rich_help_panel=SAMPLING)
]
SecondsOption = Annotated[
    float | None, typer.Option(help="Length of the clip. It determines the frame rate.", rich_help_panel=SAMPLING)
]
SizeOption = Annotated[
    str | None,
    typer.Option(help="WIDTHxHEIGHT in pixels. Other sizes than the model's are scaled.", rich_help_panel=SAMPLING),
]
NegativePromptOption = Annotated[
    str | None, typer.Option(help="What to avoid. Default: the preset's.", rich_help_panel=SAMPLING)
]


def parse_size(size: str | None) -> dict[str, int | None]:
    """Return WIDTHxHEIGHT as overrides of the preset's size, which are None if no size is given."""
    width, height = (None, None) if size is None else parse_width_height(size)
    return {"width": width, "height": height}


def collect_overrides(size: str | None = None, **options: Any) -> dict[str, Any]:
    """Return the options of a clip that were given, as the methods of a Studio take them; the preset has the others."""
    return {name: value for name, value in (parse_size(size) | options).items() if value is not None}


def parse_width_height(size: str) -> tuple[int, int]:
    """Return WIDTHxHEIGHT as two integers; raise InvalidInput for another form."""
    width, cross, height = size.lower().partition("x")
    if not (cross and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise InvalidInput("size", f"{size!r} is not of the form WIDTHxHEIGHT, e.g. 64x64")
    return int(width), int(height)


@contextmanager
def show_step_progress(label: str) -> Iterator[Callable[[StepProgress], None]]:
    """Show a progress bar of denoising steps, and yield the function that updates it."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console, transient=True) as bar:
        row = bar.add_task("", total=None)
        yield lambda step: bar.update(row, total=step.steps, completed=step.step)


def open_text_limits(preset: str, weights: Path | None) -> "TokenLimits":
    """Return the bounds of a model for texts, without loading it. Raises CheckpointError if there are no weights."""
    from omnivideo.models.text_limits import TokenLimits
    from omnivideo.models.weights.shipped import find_shipped_weights, read_index

    folder = weights or find_shipped_weights(preset)
    read_index(folder)
    return TokenLimits(get_preset(preset), folder)


def check_clip_texts(preset: str, weights: Path | None, params: SamplingParams, field: str, text: str) -> None:
    """Raise InvalidInput if the texts of a clip are longer than the model takes, before it is loaded."""
    text_limits = open_text_limits(preset, weights)
    text_limits.check_prompt(field, text, params)
    text_limits.check_negative_prompt("negative prompt", params.negative_prompt)


def open_studio(preset: str, weights: Path | None, device: str, home: Path | None = None) -> "Studio":
    # Loading torch takes seconds; --help and a refused argument should not wait for it.
    with pause_collection():
        with error_console.status("loading the libraries"):
            from omnivideo.sdk.studio import Studio
        with error_console.status("loading the model"):
            studio = Studio(preset, weights, device, home)
        exempt_loaded_objects()
    placement = studio.omni.placement
    if placement is not None and placement.machine.gpu_bytes is not None and placement.mode != "all on the GPU":
        text = f"not all fits on the GPU: {placement.describe()}"
        error_console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)
    return studio


def save_result(result: "Result", output: Path) -> None:
    """Write the result and its manifest, and print the file's name, length and generation time."""
    note = read_sound_note(result.save(output))
    summary = f" ({len(result.frames)} frames, made in {sum(result.seconds_by_stage.values()):.1f} s)"
    console.print(Text.assemble(str(output), (summary, "dim")), soft_wrap=True)
    if note is not None:
        console.print(f"sound of the source: {note}", highlight=False, markup=False, soft_wrap=True)


def read_sound_note(output: Path) -> str | None:
    """Return what the manifest beside a file says about the sound of its source."""
    note: str | None = json.loads(output.with_name(output.name + ".json").read_text()).get("sound")
    return note

"""The command line's application, its consoles, and the options that its commands share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from omnivideo.errors import InvalidInput

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
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
    """Return WIDTHxHEIGHT as overrides of the preset's size, which are None if no size is given."""
    width, height = (None, None) if size is None else parse_width_height(size)
    return {"width": width, "height": height}


def parse_width_height(size: str) -> tuple[int, int]:
    """Return WIDTHxHEIGHT as two integers; raise InvalidInput for another form."""
    width, cross, height = size.lower().partition("x")
    if not (cross and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise InvalidInput("size", f"{size!r} is not of the form WIDTHxHEIGHT, e.g. 64x64")
    return int(width), int(height)


@contextmanager
def show_step_progress(label: str) -> Iterator[Callable[[Any], None]]:
    """A bar with steps done and time left, fed with `Step` events."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console, transient=True) as bar:
        row = bar.add_task("", total=None)
        yield lambda step: bar.update(row, total=step.steps, completed=step.step)


def open_studio(preset: str, weights: Path | None, device: str, home: Path | None = None) -> Any:
    # Imported here: torch and its friends take seconds that --help and a refused argument need not wait for.
    from omnivideo.sdk.studio import Studio

    with error_console.status("loading the model"):
        return Studio(preset, weights, device, home)


def save_result(result: Any, output: Path) -> None:
    result.save(output)
    seconds = result.manifest.seconds
    console.print(f"{output} [dim]({len(result.frames)} frames, {sum(seconds.values()):.1f} s)[/dim]", highlight=False)

"""The commands of weights: import, export, pack.  Sizes are printed before anything is written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from omnivideo.errors import InvalidInput

if TYPE_CHECKING:
    from omnivideo.models.weights.convert import WeightsReport

app = typer.Typer(no_args_is_help=True, help="Published weights in and out; a run's checkpoint as a folder of weights.")
console = Console()
error_console = Console(stderr=True)

OutputFolderOption = Annotated[Path, typer.Option("-o", "--output", help="Folder to write, which is not there yet.")]
OptionalOutputFolder = Annotated[Optional[Path], typer.Option("-o", "--output", help="Folder to write.")]  # noqa: UP045
OptionalPreset = Annotated[Optional[str], typer.Option(help="Default: as the source's files say.")]  # noqa: UP045


@contextmanager
def show_byte_progress() -> Iterator[Callable[[str, int], None]]:
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
                  console=error_console, transient=True, disable=not error_console.is_terminal) as bar:  # fmt: skip
        row = bar.add_task("", total=None)
        yield lambda file, count: bar.update(row, description=file, advance=count)


def print_report(report: "WeightsReport") -> None:
    table = Table(title=report.preset)
    for name in ("part", "tensors", "parameters", "types", "GB"):
        table.add_column(name, justify="left" if name in ("part", "types") else "right")
    for part in report.parts:
        table.add_row(part.name, f"{part.tensor_count:,}", f"{part.parameter_count:,}", " ".join(part.dtypes),
                      f"{part.size_bytes / 1e9:.3f}")  # fmt: skip
    counts = sum(part.tensor_count for part in report.parts), sum(part.parameter_count for part in report.parts)
    table.add_row("all", f"{counts[0]:,}", f"{counts[1]:,}", "", f"{report.total_bytes / 1e9:.3f}")
    console.print(table)
    if report.missing_parts:
        console.print(f"not in the source: {', '.join(report.missing_parts)}", highlight=False)


@app.command("import")
def import_published(
    source: Annotated[Path, typer.Argument(help="The published folder, or one file of tensors.")],
    output: OptionalOutputFolder = None,
    preset: OptionalPreset = None,
    check: Annotated[bool, typer.Option("--check", help="Only compare keys and shapes, and count.")] = False,
) -> None:
    """The authors' weights (version 1 or 2) into a folder of ours; strict, bit for bit, and no code is run."""
    from omnivideo.models.weights.convert import import_weights

    if check == (output is not None):
        raise InvalidInput("output", "give either -o FOLDER or --check")
    with show_byte_progress() as tell:
        report = import_weights(source, output, preset, tell)
    print_report(report)


@app.command()
def export(folder: Path, output: OutputFolderOption) -> None:
    """A folder of ours in the layout that the authors' code reads."""
    from omnivideo.models.weights.convert import export_weights

    with error_console.status("checking and writing"):
        report = export_weights(folder, output)
    print_report(report)


@app.command()
def pack(
    state: Annotated[Path, typer.Argument(help="A stage's checkpoint: runs/<recipe>/state.pt.")],
    output: OutputFolderOption,
    base: Annotated[Path, typer.Option(help="The folder that the run began with.")],
) -> None:
    """A training run's checkpoint as a folder of weights that every command takes."""
    from omnivideo.models.weights.convert import pack_training_checkpoint

    with show_byte_progress() as tell:
        report = pack_training_checkpoint(state, base, output, tell)
    print_report(report)

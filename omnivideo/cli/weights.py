"""The commands of `omnivideo weights`: import, export and pack."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from omnivideo.cli.app import OUTPUT, console, error_console
from omnivideo.errors import InvalidInput

if TYPE_CHECKING:
    from omnivideo.models.weights.convert import WeightsReport

app = typer.Typer(no_args_is_help=True, help="Convert weights from and to published formats and checkpoints.")

OutputFolderOption = Annotated[
    Path, typer.Option("-o", "--output", help="Folder to write; it must not exist.", rich_help_panel=OUTPUT)
]
OptionalOutputFolder = Annotated[
    Path | None, typer.Option("-o", "--output", help="Folder to write.", rich_help_panel=OUTPUT)
]
OptionalPreset = Annotated[str | None, typer.Option(help="Default: derived from the source's files.")]


@contextmanager
def show_byte_progress() -> Iterator[Callable[[str, int], None]]:
    """Show a progress bar of bytes, and yield the function that advances it: (file, bytes)."""
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
    source: Annotated[Path, typer.Argument(help="The published folder, or a single file of tensors.")],
    output: OptionalOutputFolder = None,
    preset: OptionalPreset = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only compare keys and shapes, without writing anything.")
    ] = False,
) -> None:
    """Convert the authors' weights (version 1 or 2) to our format, bit for bit and without running their code."""
    from omnivideo.models.weights.convert import import_weights

    if check == (output is not None):
        raise InvalidInput("output", "give either --output or --check")
    with show_byte_progress() as on_bytes:
        report = import_weights(source, output, preset, on_bytes)
    print_report(report)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of weights in our format.")], output: OutputFolderOption
) -> None:
    """Convert a folder of weights to the layout that the authors' code reads."""
    from omnivideo.models.weights.convert import export_weights

    with error_console.status("checking and writing"):
        report = export_weights(folder, output)
    print_report(report)


@app.command()
def pack(
    state: Annotated[Path, typer.Argument(help="A stage's checkpoint: runs/<recipe>/state.pt.")],
    output: OutputFolderOption,
    base: Annotated[Path, typer.Option(help="Folder of weights that the run started from.")],
) -> None:
    """Convert a training run's checkpoint to a folder of weights that every command accepts."""
    from omnivideo.models.weights.convert import pack_training_checkpoint

    with show_byte_progress() as on_bytes:
        report = pack_training_checkpoint(state, base, output, on_bytes)
    print_report(report)

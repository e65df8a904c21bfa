"""The commands of `omnivideo weights`: download, import, check, export and pack."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from omnivideo.cli.app import OUTPUT, console, error_console
from omnivideo.errors import InvalidInput
from omnivideo.training.engine.progress_bar import LoggedProgress

if TYPE_CHECKING:
    from omnivideo.models.weights.folder import WeightsReport

app = typer.Typer(no_args_is_help=True, help="Download, convert and check weights.")

OutputFolderOption = Annotated[
    Path, typer.Option("-o", "--output", help="Folder to write; it must not exist.", rich_help_panel=OUTPUT)
]
OptionalOutputFolder = Annotated[
    Path | None, typer.Option("-o", "--output", help="Folder to write.", rich_help_panel=OUTPUT)
]
OptionalPreset = Annotated[str | None, typer.Option(help="Default: derived from the source's files.")]


@contextmanager
def show_byte_progress() -> Iterator[tuple[Callable[[str, int], None], Callable[[int], None]]]:
    """Show a progress bar of bytes; yield the functions that advance it, by (file, bytes), and that set its total."""
    with LoggedProgress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
                  console=error_console, transient=True) as bar:  # fmt: skip
        row = bar.add_task("", total=None)
        yield (
            lambda file, count: bar.update(row, description=file, advance=count),
            lambda total: bar.update(row, total=total),
        )


def print_report(report: "WeightsReport") -> None:
    table = Table(title=report.preset)
    for name in ("part", "tensors", "parameters", "types", "GB", ""):
        table.add_column(name, justify="left" if name in ("part", "types", "") else "right")
    for part in report.parts:
        origin = "linked" if part.is_linked and part.tensor_count else ""
        table.add_row(part.name, f"{part.tensor_count:,}", f"{part.parameter_count:,}", " ".join(part.dtypes),
                      f"{part.size_bytes / 1e9:.3f}", origin)  # fmt: skip
    counts = sum(part.tensor_count for part in report.parts), sum(part.parameter_count for part in report.parts)
    table.add_row("all", f"{counts[0]:,}", f"{counts[1]:,}", "", f"{report.total_bytes / 1e9:.3f}", "")
    console.print(table)
    for line in report.missing_files:
        console.print(f"not in the source: {line}", highlight=False, soft_wrap=True)


@app.command("import")
def import_published(
    sources: Annotated[
        list[Path], typer.Argument(help="Folders as downloaded, searched for all parts, or a single file of tensors.")
    ],
    output: OptionalOutputFolder = None,
    preset: OptionalPreset = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only compare keys and shapes, without writing anything.")
    ] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Write what is there, even if parts are missing.")
    ] = False,
) -> None:
    """Convert published weights to our format, bit for bit and without running any of their code.

    Folders of transformers and diffusers are linked, not copied.
    """
    from omnivideo.models.weights.importer import import_weights

    if check == (output is not None):
        raise InvalidInput("output", "give either --output or --check")
    with show_byte_progress() as (on_bytes, set_total):

        def show_report(report: "WeightsReport") -> None:
            print_report(report)
            set_total(report.total_bytes)

        import_weights(sources, output, preset, on_bytes, allow_missing, show_report)


@app.command("check")
def check_folder(
    folder: Annotated[Path, typer.Argument(help="Folder of weights in our format.")],
    digests: Annotated[
        bool, typer.Option("--digests", help="Also read every weights file and compare its SHA-256.")
    ] = False,
) -> None:
    """Say whether all parts of a folder fit together, without loading them; one line for each fault."""
    from omnivideo.models.weights.check import find_faults
    from omnivideo.models.weights.checkpoint import verify_digests

    with error_console.status("checking"):
        faults = find_faults(folder)
        if digests and not faults:
            verify_digests(folder)
    for fault in faults:
        console.print(fault, highlight=False, markup=False, soft_wrap=True)
    if faults:
        raise typer.Exit(1)
    console.print(f"{folder.name}: all parts fit together", highlight=False)


@app.command()
def download(
    preset: Annotated[str, typer.Argument(help="The preset whose published weights are fetched.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Folder for the repositories; an interrupted download continues there."),
    ],
    list_only: Annotated[
        bool, typer.Option("--list", help="Only list the repositories, their sizes and licences.")
    ] = False,
) -> None:
    """Download a preset's published weights from the Hugging Face hub, and verify every file."""
    from omnivideo.models.weights.download import download_repositories, list_repositories

    table = Table("repository", "revision", "GB", "licence", title=preset)
    for repository in list_repositories(preset):
        revision = repository.revision[:12] if repository.revision else "pinned at the first download"
        table.add_row(repository.id, revision, f"{repository.size_bytes / 1e9:.1f}", repository.licence)
    console.print(table)
    if not list_only:
        with show_byte_progress() as (on_bytes, set_total):
            download_repositories(preset, output, on_bytes, set_total)
        console.print(f"complete; next: omnivideo weights import {output} -o WEIGHTS", highlight=False, soft_wrap=True)


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

    with show_byte_progress() as (on_bytes, _):
        report = pack_training_checkpoint(state, base, output, on_bytes)
    print_report(report)

"""`omnivideo data curate`."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from omnivideo.contracts import invalid_input_from_validation
from omnivideo.errors import InvalidInput
from omnivideo.training.curation.bounds import CurationBounds
from omnivideo.training.engine.progress_bar import LoggedProgress

BOUNDS_HELP = ", ".join(f"{name} ({field.default:g})" for name, field in CurationBounds.model_fields.items())


def parse_bounds(assignments: list[str]) -> CurationBounds:
    """Return the bounds that the assignments (NAME=VALUE) set; the others keep their defaults."""
    values = {}
    for assignment in assignments:
        name, sign, value = assignment.partition("=")
        if not sign or name not in CurationBounds.model_fields:
            raise InvalidInput(
                "bound", f"{assignment!r} is not NAME=VALUE with one of {', '.join(CurationBounds.model_fields)}"
            )
        values[name] = value
    try:
        return CurationBounds.model_validate(values)
    except ValidationError as error:
        raise invalid_input_from_validation(error, CurationBounds.model_fields) from None


@contextmanager
def show_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar for each phase, and yield the function that updates it: (phase, done, total)."""
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with LoggedProgress(*columns, console=console) as progress:
        rows: dict[str, Any] = {}

        def on_progress(phase: str, done: int, total: int) -> None:
            if phase not in rows:
                rows[phase] = progress.add_task(phase)
            progress.update(rows[phase], completed=done, total=total)

        yield on_progress


def curate(
    folder: Annotated[Path, typer.Argument(help="Folder of videos; its subfolders are included.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for clips/, clips.jsonl and report.html.")],
    bound: Annotated[list[str], typer.Option(help=f"NAME=VALUE; repeatable. {BOUNDS_HELP}.")] = [],  # noqa: B006
    captions: Annotated[Optional[str], typer.Option(help="Address of an omnivideo MLLM server.")] = None,  # noqa: UP045
    aesthetic: Annotated[Optional[Path], typer.Option(help="Folder of a downloaded predictor: clip/, head.*.")] = None,  # noqa: UP045
    ocr: Annotated[bool, typer.Option(help="Detect text if rapidocr-onnxruntime is installed.")] = True,
    workers: Annotated[Optional[int], typer.Option(min=1, max=512, help="Default: 1 per core.")] = None,  # noqa: UP045
    cluster: Annotated[Optional[str], typer.Option(help="Address of a Dask scheduler.")] = None,  # noqa: UP045
) -> None:
    """Extract clips for training from a folder of videos; when run again, continue where it stopped."""
    bounds = parse_bounds(bound)
    from omnivideo.training.curation.captions import RemoteCaptioner
    from omnivideo.training.curation.pipeline import CurationConfig
    from omnivideo.training.curation.pipeline import curate as run
    from omnivideo.training.curation.report import write_report

    console, config = (
        Console(stderr=True),
        CurationConfig(bounds=bounds, ocr=ocr, aesthetic=str(aesthetic) if aesthetic else None),
    )
    worker_count = workers or len(os.sched_getaffinity(0))
    captioner = RemoteCaptioner(captions) if captions else None
    logging.getLogger("tornado.application").setLevel(logging.CRITICAL)  # Dask logs how an interrupted call ends
    try:
        with show_progress(console) as on_progress, closing(captioner) if captioner else nullcontext():
            result = run(
                folder, output, config, captioner, worker_count=worker_count, cluster=cluster, on_progress=on_progress
            )
    except KeyboardInterrupt:
        console.print("cancelled; run the same command to continue")
        raise typer.Exit(130) from None
    for stage, why in result.missing_stages.items():
        console.print(f"{stage}: {why}", highlight=False, markup=False)
    for name, record in (result.files | result.clips).items():
        if record["dropped"] and record["dropped"]["stage"] == "unreadable":
            console.print(f"{name} {record['dropped']['why']}", style="red", highlight=False, markup=False)
    report_path = write_report(result, bounds, output)
    Console().print(f"{len(result.kept_clips)} of {len(result.clips)} scenes kept: {report_path}", highlight=False)

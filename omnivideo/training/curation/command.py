"""`omnivideo data curate`."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from omnivideo.contracts import refused
from omnivideo.errors import InvalidInput
from omnivideo.training.curation.bounds import Bounds

ABOUT = ", ".join(f"{name} ({field.default:g})" for name, field in Bounds.model_fields.items())


def bounds_of(given: list[str]) -> Bounds:
    """NAME=VALUE each."""
    values = {}
    for one in given:
        name, sign, value = one.partition("=")
        if not sign or name not in Bounds.model_fields:
            raise InvalidInput("bound", f"{one!r} is not NAME=VALUE with one of {', '.join(Bounds.model_fields)}")
        values[name] = value
    try:
        return Bounds.model_validate(values)
    except ValidationError as error:
        raise refused(error) from None


@contextmanager
def bars(err: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar a phase, with the time left."""
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as progress:
        rows: dict[str, Any] = {}

        def tell(phase: str, done: int, of: int) -> None:
            if phase not in rows:
                rows[phase] = progress.add_task(phase)
            progress.update(rows[phase], completed=done, total=of)

        yield tell


def curate(
    folder: Annotated[Path, typer.Argument(help="Folder of videos, with all its folders.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of clips/, clips.jsonl and report.html.")],
    bound: Annotated[list[str], typer.Option(help=f"NAME=VALUE, as often as you like: {ABOUT}.")] = [],  # noqa: B006
    captions: Annotated[Optional[str], typer.Option(help="Address of omnivideo's language model server.")] = None,  # noqa: UP045
    aesthetic: Annotated[Optional[Path], typer.Option(help="Folder of a downloaded predictor: clip/, head.*.")] = None,  # noqa: UP045
    ocr: Annotated[bool, typer.Option(help="Read text, where rapidocr-onnxruntime is installed.")] = True,
    workers: Annotated[Optional[int], typer.Option(min=1, max=512, help="Default: one a core.")] = None,  # noqa: UP045
    cluster: Annotated[Optional[str], typer.Option(help="Address of a Dask scheduler, for many machines.")] = None,  # noqa: UP045
) -> None:
    """Clips worth training on, from a folder of videos; run again, it goes on where it was stopped."""
    bounds = bounds_of(bound)
    from omnivideo.training.curation.captions import ServedCaption
    from omnivideo.training.curation.pipeline import Settings
    from omnivideo.training.curation.pipeline import curate as run
    from omnivideo.training.curation.report import write_report

    err, settings = (
        Console(stderr=True),
        Settings(bounds=bounds, ocr=ocr, aesthetic=str(aesthetic) if aesthetic else None),
    )
    count = workers or len(os.sched_getaffinity(0))
    caption = ServedCaption(captions) if captions else None
    try:
        with bars(err) as tell, closing(caption) if caption else nullcontext():
            curated = run(folder, output, settings, caption, count=count, cluster=cluster, tell=tell)
    except KeyboardInterrupt:
        err.print("cancelled; the same command goes on from here")
        raise typer.Exit(130) from None
    for stage, why in curated.absent.items():
        err.print(f"{stage}: {why}", highlight=False, markup=False)
    for name, record in (curated.files | curated.clips).items():
        if record["dropped"] and record["dropped"]["stage"] == "unreadable":
            err.print(f"{name} {record['dropped']['why']}", style="red", highlight=False, markup=False)
    page = write_report(curated, bounds, output)
    Console().print(f"{len(curated.kept)} of {len(curated.clips)} scenes kept: {page}", highlight=False)

"""`omnivideo data`: other people's layouts into shards, a look at shards, and their latents and text states."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from omnivideo.errors import InvalidInput

app = typer.Typer(name="data", no_args_is_help=True, help="Training data: curate, pack, look, encode.")
out, err = Console(), Console(stderr=True)

Shards = Annotated[str, typer.Argument(help="A folder of shards, or s3://bucket/prefix.")]
Report = Annotated[Optional[Path], typer.Option(help="Write every sample that was skipped, one line of JSON each.")]  # noqa: UP045
Size = Annotated[str, typer.Option(help="WIDTHxHEIGHT: buckets have about this area, in the usual aspect ratios.")]
Frames = Annotated[str, typer.Option(help="Frames of clips, e.g. 5,9 (4k + 1).")]
Stills = Annotated[int | None, typer.Option(min=1, help="Images of a batch, over all processes (else 64).")]
Clips = Annotated[int | None, typer.Option(min=1, help="Clips of a batch, over all processes (else 24).")]
Ratio = Annotated[list[str], typer.Option(help="TASK=SHARE of the samples, once for each task; else Table 1's.")]
GroupWeight = Annotated[
    list[str], typer.Option(help="image=N and video=M: so many batches of one come for those of the other.")
]
Fps = Annotated[float, typer.Option(min=0.1, max=240, help="Frames a second that clips are seen at.")]


@app.command()
def pack(
    layout: Annotated[
        str, typer.Argument(help="llava, sharegpt4video, ultraedit, anyedit, senorita, captions or curated.")
    ],
    annotations: Annotated[Path, typer.Argument(help="The .json, .jsonl or .parquet file, or a folder of them.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder for the shards, or s3://bucket/prefix.")],
    media: Annotated[Optional[Path], typer.Option(help="Folder of the media that the annotations name.")] = None,  # noqa: UP045
    report: Report = None,
) -> None:
    """Read a published data set into shards; what cannot be used is counted, named and skipped."""
    from omnivideo.training.data.readers import read
    from omnivideo.training.data.sample import Problems
    from omnivideo.training.data.shards import write
    from omnivideo.training.data.shelves import shelf

    to, problems = shelf(output), Problems()
    if not output.startswith("s3://") and Path(output).is_dir() and to.names(".tar"):
        raise InvalidInput("output", f"{Path(output).name!r} has shards already; name another folder")
    folder = media or (annotations if annotations.is_dir() else annotations.parent)
    with Progress(
        TextColumn("samples read"), TextColumn("{task.completed:.0f}"), TimeElapsedColumn(), console=err
    ) as bar:
        written = write(bar.track(read(layout, annotations, folder, problems)), to, problems)
    out.print(f"{written} samples written to {output}", highlight=False)
    conclude(problems, report)


@app.command()
def look(
    shards: Shards,
    size: Size = "64x64",
    frames: Frames = "5,9",
    fps: Fps = 8.0,
    world: Annotated[int, typer.Option(min=1, max=4096, help="Ranks.")] = 1,
    stills: Stills = None,
    clips: Clips = None,
    ratio: Ratio = [],  # noqa: B006
    group_weight: GroupWeight = [],  # noqa: B006
    report: Report = None,
) -> None:
    """Count samples by task and bucket, and say what an epoch of stage 1's batches over them comes to."""
    from omnivideo.training.data.batches import measure
    from omnivideo.training.data.encode import ordered
    from omnivideo.training.real import mix_of

    library, fit = opened(shards, size, frames, fps)
    order, numbers = ordered(library, fit, mix_of(stills, clips, ratio=ratio, weights=group_weight))
    counts = Counter((library.entries[number].task, order.buckets[at])
                     for number, at in zip(numbers, order.bucket.tolist(), strict=True))  # fmt: skip
    table = Table("task", "bucket", "samples", box=None)
    for (task, bucket), count in sorted(counts.items()):
        table.add_row(task, f"{bucket.width}x{bucket.height}x{bucket.frames}", str(count))
    out.print(table)
    told = measure(order, world)
    out.print(f"an epoch: {told.samples} samples in {told.steps} steps, {told.waste:.2%} of {world} ranks' work wasted")
    conclude(library.problems, report)


@app.command()
def encode(
    shards: Shards,
    weights: Annotated[Optional[Path], typer.Option(help="Folder of weights, if not the tiny preset's.")] = None,  # noqa: UP045
    size: Size = "64x64",
    frames: Frames = "5,9",
    fps: Fps = 8.0,
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    report: Report = None,
) -> None:
    """Keep latents and text states beside the shards; run again, it does the shards that are left."""
    from omnivideo.models.checkpoint import SHIPPED
    from omnivideo.training.data.encode import Frozen, encode_all

    library, fit = opened(shards, size, frames, fps)
    with err.status("loading the VAE and the text encoder"):
        frozen = Frozen.load(weights or SHIPPED / "tiny", device)
    columns = (
        TextColumn("samples encoded"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as bar:
        row = bar.add_task("", total=None)
        done = encode_all(library, frozen, fit, lambda done, count: bar.update(row, completed=done, total=count))
    out.print(f"{done} samples encoded; cache {frozen.digest(fit)}", highlight=False)
    conclude(library.problems, report)


def opened(shards: str, size: str, frames: str, fps: float) -> tuple[Any, Any]:
    """The library and the fit of the options."""
    from omnivideo.training.data.batches import buckets_around
    from omnivideo.training.data.encode import Fit
    from omnivideo.training.data.sample import Problems
    from omnivideo.training.data.shards import Library
    from omnivideo.training.data.shelves import shelf

    width, height = whole_numbers("size", size.lower().split("x"), 2)
    buckets = buckets_around(width, height, (1, *whole_numbers("frames", frames.split(","))))
    return Library(shelf(shards), Problems()), Fit(tuple(buckets), fps)


def whole_numbers(field: str, parts: list[str], count: int | None = None) -> list[int]:
    if not all(part.isascii() and part.isdigit() for part in parts) or count not in (None, len(parts)):
        raise InvalidInput(field, "whole numbers, e.g. --size 832x480 --frames 17,41,81")
    return [int(part) for part in parts]


def telling(makers: Mapping[str, Callable[[], Any]], problems: Any, report: Path | None) -> dict[str, Callable]:
    """The recipes' makers, which say what of the samples is not usable before the first step."""

    def made(make: Callable[[], Any]) -> Any:
        recipe = make()
        conclude(problems, report)
        return recipe

    return {name: partial(made, make) for name, make in makers.items()}


@contextmanager
def concluding(problems: Any, report: Path | None, world: Any) -> Iterator[None]:
    """Around a run: the first process says at its end, however that comes, what any process met on the way."""
    try:
        yield
        problems.meet(world.gathered(problems.found))
    finally:
        if world.first:
            conclude(problems, report)


def conclude(problems: Any, report: Path | None) -> None:
    """Says what was skipped: every kind with its number and first case; all of them in the report."""
    if report is not None:
        problems.write(report)
    for kind, count in problems.counts().items():
        _, where, what = next(one for one in problems.found if one[0] == kind)
        err.print(f"skipped, {kind}: {count}, the first {where}: {what}", style="yellow", markup=False, highlight=False)

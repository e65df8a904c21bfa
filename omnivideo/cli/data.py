"""The commands of `omnivideo data`: pack data sets into shards, inspect shards, and encode latents and text states."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from omnivideo.errors import InvalidInput
from omnivideo.training.engine.progress_bar import LoggedProgress

app = typer.Typer(name="data", no_args_is_help=True, help="Training data: curate, pack, inspect, encode.")
console, error_console = Console(), Console(stderr=True)

ShardsArgument = Annotated[str, typer.Argument(help="A folder of shards, or s3://bucket/prefix.")]
ReportOption = Annotated[Path | None, typer.Option(help="File for every skipped sample, one JSON object per line.")]
BucketSizeOption = Annotated[
    str, typer.Option(help="WIDTHxHEIGHT: buckets have about this area, in the usual aspect ratios.")
]
FrameCountsOption = Annotated[str, typer.Option(help="Frames per clip, e.g. 5,9 (4k + 1).")]
StillsOption = Annotated[int | None, typer.Option(min=1, help="Images in a batch, over all processes. Default: 64.")]
ClipsOption = Annotated[int | None, typer.Option(min=1, help="Clips in a batch, over all processes. Default: 24.")]
RatioOption = Annotated[list[str], typer.Option(help="TASK=SHARE of the samples; repeatable. Default: Table 1.")]
GroupWeightOption = Annotated[
    list[str], typer.Option(help="image=N and video=M: the ratio of image batches to video batches.")
]
FpsOption = Annotated[float, typer.Option(min=0.1, max=240, help="Frames per second at which clips are sampled.")]


@app.command()
def pack(
    layout: Annotated[
        str, typer.Argument(help="llava, sharegpt4video, ultraedit, anyedit, senorita, captions or curated.")
    ],
    annotations: Annotated[Path, typer.Argument(help="A .json, .jsonl or .parquet file, or a folder of them.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder for the shards, or s3://bucket/prefix.")],
    media: Annotated[Optional[Path], typer.Option(help="Folder of the media that the annotations name.")] = None,  # noqa: UP045
    report: ReportOption = None,
) -> None:
    """Pack a published data set into shards. Unusable samples are skipped and reported."""
    from omnivideo.training.data.file_store import open_file_store
    from omnivideo.training.data.readers import read_samples
    from omnivideo.training.data.sample import SkipReport
    from omnivideo.training.data.webdataset import write_shards

    file_store, skip_report = open_file_store(output), SkipReport()
    if not output.startswith("s3://") and Path(output).is_dir() and file_store.list_names(".tar"):
        raise InvalidInput("output", f"{Path(output).name!r} already has shards; name another folder")
    folder = media or (annotations if annotations.is_dir() else annotations.parent)
    with LoggedProgress(
        TextColumn("samples read"), TextColumn("{task.completed:.0f}"), TimeElapsedColumn(), console=error_console
    ) as bar:
        sample_count = write_shards(
            bar.track(read_samples(layout, annotations, folder, skip_report)), file_store, skip_report
        )
    console.print(f"{sample_count} samples written to {output}", highlight=False, markup=False, soft_wrap=True)
    print_skips(skip_report, report)


@app.command()
def inspect(
    shards: ShardsArgument,
    size: BucketSizeOption = "64x64",
    frames: FrameCountsOption = "5,9",
    fps: FpsOption = 8.0,
    world_size: Annotated[int, typer.Option(min=1, max=4096, help="Ranks.")] = 1,
    stills: StillsOption = None,
    clips: ClipsOption = None,
    ratio: RatioOption = [],  # noqa: B006
    group_weight: GroupWeightOption = [],  # noqa: B006
    report: ReportOption = None,
) -> None:
    """Count the samples by task and bucket, and print the size of an epoch of stage 1 over them."""
    from omnivideo.training.data.batch_sampler import measure_epoch
    from omnivideo.training.data.latent_cache import build_batch_sampler
    from omnivideo.training.recipes.over_shards import build_mix, open_dataset

    dataset, assigner = open_dataset(shards, size, frames, fps)
    mix = build_mix(stills, clips, ratio=ratio, weights=group_weight)
    sampler, sample_indices = build_batch_sampler(dataset, assigner, mix)
    counts = Counter(
        (dataset.entries[number].task, sampler.buckets[position])
        for number, position in zip(sample_indices, sampler.sample_buckets.tolist(), strict=True)
    )
    table = Table("task", "bucket", "samples", box=None)
    for (task, bucket), count in sorted(counts.items()):
        table.add_row(task, f"{bucket.width}x{bucket.height}x{bucket.frames}", str(count))
    console.print(table)
    epoch_stats = measure_epoch(sampler, world_size)
    console.print(
        f"an epoch: {epoch_stats.samples} samples in {epoch_stats.steps} steps, "
        f"{epoch_stats.wasted_fraction:.2%} of the work of {world_size} ranks wasted"
    )
    print_skips(dataset.skip_report, report)


@app.command()
def encode(
    shards: ShardsArgument,
    weights: Annotated[Optional[Path], typer.Option(help="Folder of weights. Default: tiny's.")] = None,  # noqa: UP045
    size: BucketSizeOption = "64x64",
    frames: FrameCountsOption = "5,9",
    fps: FpsOption = 8.0,
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    report: ReportOption = None,
) -> None:
    """Cache latents and text states beside the shards; when run again, continue with the shards that are left."""
    from omnivideo.models.weights.shipped import SHIPPED_WEIGHTS_FOLDER
    from omnivideo.training.data.latent_cache import FrozenEncoders, encode_shards
    from omnivideo.training.recipes.over_shards import open_dataset

    dataset, assigner = open_dataset(shards, size, frames, fps)
    with error_console.status("loading the VAE and the text encoder"):
        encoders = FrozenEncoders.load(weights or SHIPPED_WEIGHTS_FOLDER / "tiny", device)
    columns = (
        TextColumn("samples encoded"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with LoggedProgress(*columns, console=error_console) as bar:
        row = bar.add_task("", total=None)
        encoded_count = encode_shards(
            dataset, encoders, assigner, lambda done, count: bar.update(row, completed=done, total=count)
        )
    console.print(f"{encoded_count} samples encoded; cache {encoders.compute_digest(assigner)}", highlight=False)
    print_skips(dataset.skip_report, report)


def print_skips(skip_report: Any, report_path: Path | None) -> None:
    """Print the number and the first case of each kind of skipped sample, and write all of them to the report."""
    if report_path is not None:
        skip_report.write_jsonl(report_path)
    for kind, count in skip_report.count_by_kind().items():
        _, location, detail = next(skip for skip in skip_report.skipped_samples if skip[0] == kind)
        error_console.print(
            f"skipped, {kind}: {count}, the first {location}: {detail}", style="yellow", markup=False, highlight=False
        )

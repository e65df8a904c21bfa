"""A clip that cannot be used is reported, and the run continues; a fault that affects all clips ends it."""

import io
import itertools
import re
from collections.abc import Callable
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import av
import pytest
from typer.testing import CliRunner

from omnivideo.training.curation.pipeline import CurationConfig, curate
from omnivideo.training.curation.report import write_report
from tests.support import footage
from tests.support.caption_server import CAPTION_ANSWER, serve_captions
from tests.support.curation_runs import BOUNDS, build_command, read_jsonl


def refuse_tall_clips(mp4: bytes) -> tuple[int, str]:
    with av.open(io.BytesIO(mp4)) as container:
        stream = container.streams.video[0]
        return (400, '{"field": "shown", "message": "too <tall>"}') if stream.height > stream.width else CAPTION_ANSWER


def make_faulty_folder(folder: Path) -> None:
    """Write two good clips, of which the server refuses one, and three that one of the tasks fails on."""
    footage.write_film(folder / "pan.mp4", footage.pan_camera(1))
    footage.write_film(folder / "tall.mp4", footage.resize(footage.pan_camera(2), 216, 288))
    footage.write_film(
        folder / "gap.mp4", footage.pan_camera(5, 48), gap=(24, 60)
    )  # split evenly: the middle quarters are empty
    footage.write_film(folder / "gone.mp4", footage.pan_camera(8))  # the test deletes it before it is written
    frames = list(footage.pan_camera(3))
    halves = (frames[:20], footage.resize(frames[20:], 320, 240))
    join_clips(folder / "sizes.mp4", [footage.write_film(folder / "half.h264", half).read_bytes() for half in halves])


def join_clips(path: Path, streams: list[bytes]) -> None:
    """Write H.264 streams of different frame sizes one after the other into one avi; its frames cannot be stacked."""
    indices = itertools.count()
    with av.open(str(path), "w", format="avi") as output, av.open(io.BytesIO(streams[0])) as first:
        output_stream = output.add_stream_from_template(first.streams.video[0])
        for data in streams:
            with av.open(io.BytesIO(data), format="h264") as container:
                for packet in container.demux(video=0):
                    if packet.size:
                        packet.pts = packet.dts = next(indices)
                        packet.time_base, packet.stream = Fraction(1, footage.FPS), output_stream
                        output.mux(packet)


EMPTY_SPANS = ("15.81 to 31.62 s", "31.62 to 47.44 s")  # of gap.mp4


def test_a_faulty_clip_does_not_end_the_run(tmp_path):
    """Report clips that cannot be read, measured, captioned or written; curate the others and pack them into shards."""
    from omnivideo.cli.main import app
    from omnivideo.training.curation.captions import RemoteCaptioner
    from omnivideo.training.data.file_store import open_file_store
    from omnivideo.training.data.sample import SkipReport
    from omnivideo.training.data.webdataset import ShardDataset

    raw, out, settings = tmp_path / "raw", tmp_path / "out", CurationConfig(bounds=BOUNDS, ocr=False)
    make_faulty_folder(raw)

    def tell(phase: str, done: int, of: int) -> None:
        if phase == "duplicates" and done == of:
            (raw / "gone.mp4").unlink()

    with serve_captions(refuse_tall_clips) as (address, _), closing(RemoteCaptioner(address)) as caption:
        curated = curate(raw, out, settings, caption, on_progress=tell)
    why = {}
    for clip in curated.clips.values():
        if clip["dropped"] and clip["dropped"]["stage"] == "unreadable":
            why.setdefault(clip["source"], []).append(clip["dropped"]["why"])
    assert why.pop("gap.mp4") == [f"has no frame from {at}; allowed: one or more" for at in EMPTY_SPANS]
    assert why.pop("gone.mp4") == ["is damaged or cut short (No such file or directory); allowed: a complete file"]
    assert "ValueError" in why["sizes.mp4"][0] and "/" not in why.pop("sizes.mp4")[0]
    assert not why
    captions = {line["source"]: line["caption"] for line in read_jsonl(out / "clips.jsonl")}
    assert captions["pan.mp4"] == "A texture moves." and captions["tall.mp4"] is None and "gone.mp4" not in captions
    assert len(list((out / "clips").iterdir())) == len(curated.kept_clips)
    page = write_report(curated, BOUNDS, out).read_text()
    assert "1 clip without one" in page and "no caption: the server refuses the clip" in page
    assert "too &lt;tall&gt;" in page and "has no frame from 15.81 to 31.62 s" in page

    given = ["data", "pack", "curated", str(out), "-o", str(tmp_path / "set")]
    packed = CliRunner().invoke(app, given, catch_exceptions=False)
    assert packed.exit_code == 0 and f"{len(captions) - 1} samples written" in packed.output
    assert "skipped, wrong record: 1" in packed.output and "caption: it is missing" in packed.output
    entries = ShardDataset(open_file_store(str(tmp_path / "set")), SkipReport()).entries
    assert {entry.task for entry in entries} == {"text-to-video"} and len(entries) == len(captions) - 1

    measured = (out / "measured.jsonl").read_bytes()
    with serve_captions(lambda mp4: CAPTION_ANSWER) as (address, shown):
        again = CliRunner().invoke(app, [*build_command(raw, out)[3:], "--captions", address], catch_exceptions=False)
    messages = " ".join(again.output.split())
    assert again.exit_code == 0 and re.search(r"gap-\w+-0001 has no frame from 15.81 to 31.62 s", messages), messages
    assert len(shown) == 1 and {line["caption"] for line in read_jsonl(out / "clips.jsonl")} == {"A texture moves."}
    assert (out / "measured.jsonl").read_bytes() == measured  # failed clips are not tried again


def test_a_fault_of_all_clips_ends_the_run():
    """The report of a fault of one clip contains no path."""
    from omnivideo.errors import CheckpointError, StoreError
    from omnivideo.training.curation.workers import run_safely

    def failing(error: Exception) -> Callable[[dict], dict]:
        def task(item: dict) -> dict:
            raise error

        return task

    why = run_safely(failing(RuntimeError("(-215) /io/opencv/a.cpp C:\\clips\\b.mp4 is odd")), {})["dropped"]["why"]
    assert why == "cannot be used (RuntimeError: (-215) is odd); allowed: a complete file"
    with pytest.raises(CheckpointError):
        run_safely(failing(CheckpointError("no predictor")), {})
    with pytest.raises(ImportError):
        run_safely(failing(ImportError("libGL")), {})
    with pytest.raises(StoreError, match="cannot be written: No space left"):
        run_safely(failing(OSError(28, "No space left on device", "/data/out/clips/a.part")), {})

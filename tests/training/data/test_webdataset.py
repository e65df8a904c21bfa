"""Shards and readers: what is written comes back; what is broken is counted, named and skipped."""

import functools
import importlib.util
import io
import json
import tarfile
import tempfile

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from omnivideo.cli.main import app
from omnivideo.errors import InvalidInput, UnreadableMedia
from omnivideo.training.data.batch_sampler import Bucket, MixConfig, build_buckets, select_bucket
from omnivideo.training.data.file_store import open_file_store
from omnivideo.training.data.readers import read_samples
from omnivideo.training.data.sample import (
    SkipReport,
    TrainingSample,
    check_sample,
    decode_media,
    measure_media,
    resample_media,
)
from omnivideo.training.data.webdataset import ShardDataset, stream_samples, write_shards


def png(shade: int = 0, size: tuple[int, int] = (32, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 90, 160)).save(file, "PNG")
    return file.getvalue()


@functools.cache
def mp4(count: int = 5, size: tuple[int, int] = (32, 32), fps: int = 8, first: bool = True) -> bytes:
    """A clip of noise; `first` puts the header before the frames, as the web wants it."""
    rng, options = np.random.default_rng(count), {"movflags": "faststart"} if first else {}
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        with av.open(file.name, "w", options=options) as container:
            stream = container.add_stream("libx264", rate=fps, width=size[0], height=size[1], pix_fmt="yuv420p")
            for _ in range(count):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
            container.mux(stream.encode())
        return file.read()


def six() -> list[TrainingSample]:
    """A sample of every task."""
    turns = (("what is it?", "a ball"), ("which colour?", "red"))
    return [
        TrainingSample("image-understanding", source=png(1), turns=turns),
        TrainingSample("video-understanding", source=mp4(), turns=turns[:1]),
        TrainingSample("text-to-image", "a red ball — rot", target=png(2)),
        TrainingSample("text-to-video", "a red ball rolls", target=mp4(9)),
        TrainingSample("image-editing", "make it blue", png(3), png(4), caption="a blue ball"),
        TrainingSample("video-editing", "make it blue", mp4(6), mp4(7), origin="made"),
    ]


def contents(samples) -> list[dict]:
    return [{name: value for name, value in vars(sample).items() if name != "key"} for sample in samples]


@pytest.fixture
def shards(tmp_path):
    problems = SkipReport()
    assert write_shards(six(), open_file_store(tmp_path / "shards"), problems) == 6
    assert not problems.skipped_samples
    return tmp_path / "shards"


# ---------------------------------------------------------------- shards


def test_samples_of_all_six_tasks_come_back_from_the_stream_and_by_number(shards):
    problems = SkipReport()
    assert contents(stream_samples(open_file_store(shards), problems)) == contents(six())
    library = ShardDataset(open_file_store(shards), problems)
    assert contents(library[at] for at in (5, 0, 3, 1, 4, 2)) == contents(six()[at] for at in (5, 0, 3, 1, 4, 2))
    assert [entry.shape.frames for entry in library.entries] == [1, 5, 1, 9, 1, 7]
    assert not problems.skipped_samples


def test_the_same_samples_give_the_same_bytes(shards, tmp_path):
    write_shards(six(), open_file_store(tmp_path / "again"), SkipReport())
    assert (tmp_path / "again" / "00000.tar").read_bytes() == (shards / "00000.tar").read_bytes()


def test_an_index_is_made_again_where_it_is_gone_or_does_not_fit(shards):
    before = ShardDataset(open_file_store(shards), SkipReport()).entries
    index = shards / "00000.index.json"
    index.unlink()
    assert ShardDataset(open_file_store(shards), SkipReport()).entries == before
    size = (shards / "00000.tar").stat().st_size
    for text in (json.dumps({"format": 1, "bytes": 3, "samples": []}), json.dumps({"format": 1, "bytes": size}), "[]"):
        index.write_text(text)
        assert ShardDataset(open_file_store(shards), SkipReport()).entries == before


def test_a_second_shard_begins_where_the_first_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr("omnivideo.training.data.webdataset.MAX_SHARD_SAMPLES", 4)
    write_shards(six(), open_file_store(tmp_path), SkipReport())
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert contents(stream_samples(open_file_store(tmp_path), SkipReport())) == contents(six())


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # its open file
def test_the_webdataset_package_reads_our_shards(shards):
    if not importlib.util.find_spec("webdataset"):
        pytest.skip("webdataset is not here (pip install webdataset): whether it reads our shards was not tested")
    from webdataset import WebDataset

    found = list(WebDataset(str(shards / "00000.tar"), shardshuffle=False))
    assert [json.loads(row["json"])["task"] for row in found] == [sample.task for sample in six()]
    assert found[5]["target.mp4"] == six()[5].target


@pytest.mark.parametrize("where", ["header", "middle", "end mark"])
def test_a_broken_tar_gives_what_comes_before_the_break(shards, where):
    path = shards / "00000.tar"
    data = path.read_bytes()
    last = ShardDataset(open_file_store(shards), SkipReport()).entries[-1]
    start = last.members["json"][0] - 512
    cut = {"header": start, "middle": start + 700, "end mark": len(data.rstrip(b"\0")) // 512 * 512 + 512}[where]
    path.write_bytes(data[:cut])
    streamed, scanned = SkipReport(), SkipReport()
    assert contents(stream_samples(open_file_store(shards), streamed))[:5] == contents(six())[:5]
    assert len(ShardDataset(open_file_store(shards), scanned)) >= 5
    for problems in (streamed, scanned):
        assert problems.count_by_kind()["broken shard"] == 1
        assert problems.skipped_samples[0][1].startswith("00000.tar")


def test_a_header_overwritten_midway_is_not_taken_for_the_end(shards):
    path = shards / "00000.tar"
    data = bytearray(path.read_bytes())
    start = ShardDataset(open_file_store(shards), SkipReport()).entries[3].members["json"][0] - 512
    data[start : start + 512] = b"x" * 512
    path.write_bytes(data)
    problems = SkipReport()
    assert contents(stream_samples(open_file_store(shards), problems)) == contents(six())[:3]
    assert problems.count_by_kind() == {"broken shard": 1}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("members", "kind", "word"),
    [
        ({"a.json": b"{not json", "a.target.png": png()}, "wrong record", "not JSON"),
        ({"a.json": b'{"task": "text-to-sound", "text": "x"}', "a.target.png": png()}, "wrong record", "not one of"),
        ({"a.json": b'{"task": "text-to-image", "text": 3}', "a.target.png": png()}, "wrong record", "text"),
        ({"a.json": b'{"task": "text-to-image", "text": "x"}'}, "wrong record", "target"),
        (
            {"a.json": b'{"task": "text-to-image", "text": "\\ud800"}', "a.target.png": png()},
            "wrong record",
            "surrogate",
        ),
        ({"a.json": b'{"task": "image-understanding", "turns": 3}', "a.source.png": png()}, "wrong record", "turns"),
        ({"a.json": b"[" * 100_000, "a.target.png": png()}, "wrong record", "not JSON"),
        ({"a.json": b'{"task": "text-to-video", "text": "x"}', "a.target.png": png()}, "wrong record", "png"),
        ({"a.target.png": png()}, "missing file", "a.json"),
        (
            {"a.json": b'{"task": "text-to-image", "text": "x"}', "a.target.png": b"nothing"},
            "unreadable media",
            "no im",
        ),
    ],
)
def test_a_wrong_sample_is_named_and_skipped(tmp_path, members, kind, word):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
        add(tar, "b.json", b'{"task": "text-to-image", "text": "x"}')
        add(tar, "b.target.png", png())
    problems = SkipReport()
    assert [sample.key for sample in stream_samples(open_file_store(tmp_path), problems)] == ["b"]
    assert problems.count_by_kind() == {kind: 1}
    assert problems.skipped_samples[0][1] == "0.tar/a" and word in problems.skipped_samples[0][2]


# ---------------------------------------------------------------- media


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("left", [0.3, 0.6, 0.9])
def test_a_cut_mp4_is_refused(first, left):
    whole = mp4(24, first=first)
    assert measure_media(whole).frames == 24
    with pytest.raises(UnreadableMedia):
        measure_media(whole[: int(len(whole) * left)])


def test_a_cut_png_is_refused():
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    with pytest.raises(UnreadableMedia):
        measure_media(file.getvalue()[:1500])


def test_a_clip_is_seen_at_the_wanted_rate_and_shape():
    clip = mp4(17, size=(64, 32), fps=16)
    frames = [pixels for pixels, *_ in decode_media(clip)]
    seen = resample_media(clip, 32, 32, 9, 8)
    assert seen.shape == (9, 32, 32, 3)
    assert np.array_equal(seen, np.stack([frame[:, 16:48] for frame in frames[::2]]))
    assert np.array_equal(resample_media(clip, 32, 32, 9, 8, frame_indices=[0, 3, 3, 8]), seen[[0, 3, 3, 8]])
    assert np.array_equal(resample_media(clip, 32, 32, 12, 8), seen[[*range(9), 8, 8, 8]])  # its last frame stays


def test_a_clip_is_decoded_as_far_as_it_is_looked_at(monkeypatch):
    taken = []

    def seen(data):
        return (taken.append(1) or one for one in decode_media(data))

    monkeypatch.setattr("omnivideo.training.data.sample.decode_media", seen)
    assert resample_media(mp4(48, fps=16), 32, 32, 5, 8).shape == (5, 32, 32, 3)
    assert len(taken) == 10  # the fifth is frame 8


def test_buckets_lose_the_least():
    buckets = build_buckets(64, 64, (1, 5, 9))
    assert all(bucket.width % 16 == bucket.height % 16 == 0 for bucket in buckets)
    assert select_bucket(buckets, "text-to-image", 640, 640, 1, 0, 8) == Bucket(64, 64, 1)
    assert select_bucket(buckets, "text-to-video", 640, 640, 17, 16, 8) == Bucket(64, 64, 9)
    assert select_bucket(buckets, "text-to-video", 640, 640, 16, 16, 8) == Bucket(64, 64, 5)
    tall = select_bucket(buckets, "text-to-image", 480, 832, 1, 0, 8)
    assert tall.height > tall.width
    with pytest.raises(InvalidInput, match="no bucket is so short"):
        select_bucket(buckets, "text-to-video", 640, 640, 3, 8, 8)


def test_a_clip_for_an_image_task_is_refused():
    with pytest.raises(InvalidInput, match="mp4"):
        check_sample(TrainingSample("text-to-image", "x", target=mp4()))


# ---------------------------------------------------------------- published layouts


def lay(folder, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def taken(layout, folder, name) -> tuple[list[TrainingSample], SkipReport]:
    problems = SkipReport()
    return list(read_samples(layout, folder / name, folder, problems)), problems


def said(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(turns)]


def test_llava(tmp_path):
    lay(tmp_path, {"coco/1.png": png(), "clips/2.mp4": mp4()})
    rows = [
        {"id": "1", "image": "coco/1.png", "conversations": said("<image>\nWhat is it?", "A ball.", "Red?", "Yes.")},
        {"id": "2", "data_source": "x", "video": "clips/2.mp4", "conversations": said("<video>\nHow?", "It rolls.")},
        {"id": "3", "image": "coco/gone.png", "conversations": said("<image>\nWhat?", "No.")},
        {"id": "4", "image": "../../etc/passwd", "conversations": said("<image>\nWhat?", "No.")},
        {"id": "5", "image": "coco/1.png", "conversations": said("<image>\nWhat?")},
        {"id": "6", "conversations": said("Hello", "Hello.")},
        "no object",
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    samples, problems = taken("llava", tmp_path, "a.json")
    assert contents(samples) == contents(
        [
            TrainingSample(
                "image-understanding", "", png(), turns=(("What is it?", "A ball."), ("Red?", "Yes.")), origin="llava"
            ),
            TrainingSample("video-understanding", "", mp4(), turns=(("How?", "It rolls."),), origin="llava"),
        ]
    )
    assert problems.count_by_kind() == {"missing file": 2, "wrong record": 3}
    assert {where for _, where, _ in problems.skipped_samples} == {f"a.json#{number}" for number in range(3, 8)}


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "..", "", "/etc/passwd", "\ud800.png"])
def test_file_names_that_are_none_are_skipped(tmp_path, name):
    lay(tmp_path, {"1.png": png()})
    row = {"image": "1.png", "conversations": said("<image>\nWhat?", "A ball.")}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row | {'image': name})}\n{'[' * 100_000}\n{json.dumps(row)}\n")
    samples, problems = taken("llava", tmp_path, "a.jsonl")
    assert len(samples) == 1
    assert [where for _, where, _ in problems.skipped_samples] == ["a.jsonl:1", "a.jsonl:2"]
    problems.write_jsonl(tmp_path / "report.jsonl")
    assert len((tmp_path / "report.jsonl").read_text().splitlines()) == 2


def test_an_array_that_is_cut_gives_what_comes_before(tmp_path):
    lay(tmp_path, {"1.png": png()})
    row = {"id": "1", "image": "1.png", "conversations": said("<image>\nWhat?", "A ball.")}
    (tmp_path / "a.json").write_text(json.dumps([row] * 3)[:-30])
    samples, problems = taken("llava", tmp_path, "a.json")
    assert len(samples) == 2
    assert problems.skipped_samples[0][:2] == ("wrong record", "a.json#3")


def test_sharegpt4video(tmp_path):
    lay(tmp_path, {"panda/1.mp4": mp4()})
    captions = [{"idx": "0", "content": "first"}, {"idx": "-1", "content": "A ball rolls."}]
    row = {"video_id": "1", "video_path": "panda/1.mp4", "timestamp": ["00:00:00.000"], "keyframe": [0],
           "captions": captions, "zip_folder": "panda_videos_1.zip"}  # fmt: skip
    lines = [
        json.dumps(row),
        '{"video_id": "2", "video_',
        json.dumps(row | {"captions": captions[:1]}),
        json.dumps(row),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    samples, problems = taken("sharegpt4video", tmp_path, "a.jsonl")
    assert contents(samples) == contents(
        [TrainingSample("text-to-video", "A ball rolls.", target=mp4(), origin="sharegpt4video")] * 2
    )
    assert [(kind, where) for kind, where, _ in problems.skipped_samples] == [
        ("wrong record", "a.jsonl:2"),
        ("wrong record", "a.jsonl:3"),
    ]


def test_senorita(tmp_path):
    lay(tmp_path, {"obj_swap/1_org.mp4": mp4(), "obj_swap/1.mp4": mp4(6)})
    row = {"source_video_path": "./obj_swap/1_org.mp4", "target_video_path": "./obj_swap/1.mp4",
           "instruction": "swap ball", "enhanced_instruction": "Turn the ball into a cube."}  # fmt: skip
    plain = {key: value for key, value in row.items() if key != "enhanced_instruction"}
    (tmp_path / "a.json").write_text(json.dumps([row, plain, row | {"target_video_path": "./obj_swap/2.mp4"}]))
    samples, problems = taken("senorita", tmp_path, "a.json")
    edits = ["Turn the ball into a cube.", "swap ball"]
    assert contents(samples) == contents(
        TrainingSample("video-editing", text, mp4(), mp4(6), origin="senorita") for text in edits
    )
    assert problems.count_by_kind() == {"missing file": 1}


def test_anyedit_as_json(tmp_path):
    lay(tmp_path, {"COCO_1.png": png(1), "edited.png": png(2)})
    row = {"edit": "make the ball green", "edited object": "ball", "input": "a ball", "output": "a green ball",
           "edit_type": "color_alter", "visual_input": "None", "image_file": "COCO_1.png",
           "edited_file": "edited.png"}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps([row, row | {"visual_input": "other.png"}]))
    samples, problems = taken("anyedit", tmp_path, "a.json")
    wanted = TrainingSample(
        "image-editing", "make the ball green", png(1), png(2), caption="a green ball", origin="anyedit"
    )
    assert contents(samples) == contents([wanted])
    assert "second picture" in problems.skipped_samples[0][2]


def parquet(path, rows: list[dict]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not here: parquet layouts were not tested")
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path)


def held(data: bytes) -> dict:
    """As the `datasets` package writes a picture."""
    return {"bytes": data, "path": "a.png"}


def test_ultraedit(tmp_path):
    row = {"source_image": held(png(1)), "edited_image": held(png(2)), "source_caption": "a ball",
           "target_caption": "a blue ball", "edit_prompt": "make it blue", "clip_sim_image": 0.9}  # fmt: skip
    parquet(tmp_path / "FreeForm-00000.parquet", [row, row | {"edit_prompt": None}])
    samples, problems = taken("ultraedit", tmp_path, "FreeForm-00000.parquet")
    wanted = TrainingSample("image-editing", "make it blue", png(1), png(2), caption="a blue ball", origin="ultraedit")
    assert contents(samples) == contents([wanted])
    assert problems.count_by_kind() == {"wrong record": 1}


def test_anyedit_as_parquet(tmp_path):
    row = {"image_id": "1", "image_file": held(png(1)), "edited_file": held(png(2)), "edit_instruction": "make it blue",
           "edit_type": "color_alter", "input": "a ball", "output": "a blue ball", "visual_input": None}  # fmt: skip
    parquet(tmp_path / "train-0.parquet", [row])
    samples, problems = taken("anyedit", tmp_path, "train-0.parquet")
    assert contents(samples) == contents(
        [TrainingSample("image-editing", "make it blue", png(1), png(2), caption="a blue ball", origin="anyedit")]
    )
    assert not problems.skipped_samples


def test_captions(tmp_path):
    lay(tmp_path, {"3.png": png(3)})
    parquet(tmp_path / "a.parquet", [{"image": png(1), "caption": "one"}, {"image": None, "caption": "two"}])
    parquet(tmp_path / "b.parquet", [{"jpg": "3.png", "txt": "three"}])
    samples, problems = taken("captions", tmp_path, ".")
    assert [(sample.text, sample.target) for sample in samples] == [("one", png(1)), ("three", png(3))]
    assert problems.count_by_kind() == {"wrong record": 1}


def test_curated(tmp_path):
    """A curation's folder: its clips, and not its journals; what it rejected, and what has no caption, is named."""
    lay(tmp_path, {"clips/pan-1-0000.mp4": mp4()})
    row = {"file": "clips/pan-1-0000.mp4", "caption": "A ball rolls.", "width": 64, "height": 64, "fps": 8.0,
           "frames": 9, "source": "pan.mp4", "start": 0.0, "stop": 1.1, "scores": {"motion": 0.1}}  # fmt: skip
    dropped = {"dropped": {"stage": "motion", "value": 0.01, "why": "0.01 sides a second; allowed: 0.02 or more"}}
    rows = [row, row | {"caption": None}, row | dropped, row | {"file": "clips/gone.mp4"}, row | {"caption": " "}]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "captions.jsonl").write_text('{"key": "pan-1-0000", "caption": "A ball rolls."}\n')
    (tmp_path / "settings.json").write_text('{"ocr": false}')
    problems = SkipReport()
    samples = list(read_samples("curated", tmp_path, tmp_path, problems))
    assert contents(samples) == contents(
        [TrainingSample("text-to-video", "A ball rolls.", target=mp4(), origin="curated")]
    )
    assert [(kind, where) for kind, where, _ in problems.skipped_samples] == [
        ("wrong record", "clips.jsonl:2"),
        ("wrong record", "clips.jsonl:3"),
        ("missing file", "clips.jsonl:4"),
        ("wrong record", "clips.jsonl:5"),
    ]
    assert (
        "caption: there is none" in problems.skipped_samples[0][2]
        and "0.01 sides a second" in problems.skipped_samples[1][2]
    )
    with pytest.raises(InvalidInput, match=r"'clips' holds no clips\.jsonl"):
        list(read_samples("curated", tmp_path / "clips", tmp_path, SkipReport()))


def test_a_broken_parquet_is_named(tmp_path):
    parquet(tmp_path / "a.parquet", [{"image": png(1), "caption": "one"}])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    samples, problems = taken("captions", tmp_path, ".")
    assert len(samples) == 1
    assert problems.skipped_samples[0][:2] == ("broken file", "b.parquet")


# ---------------------------------------------------------------- the commands


def test_pack_names_what_it_skips_and_inspect_counts_the_rest(tmp_path):
    whole = mp4(24)
    lay(tmp_path, {"in/1.mp4": whole, "in/2.mp4": whole[: len(whole) // 2]})
    rows = [{"video_path": f"{at}.mp4", "captions": [{"idx": "-1", "content": "a ball"}]} for at in (1, 2)]
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, to = tmp_path / "report.jsonl", str(tmp_path / "out")
    given = ["data", "pack", "sharegpt4video", str(tmp_path / "in" / "a.jsonl"), "-o", to, "--report", str(report)]
    ran = CliRunner().invoke(app, given, catch_exceptions=False)
    assert ran.exit_code == 0
    assert "1 samples written" in ran.output
    (line,) = [json.loads(line) for line in report.read_text().splitlines()]
    assert line["kind"] == "unreadable media" and line["where"] == "sharegpt4video a.jsonl:2"
    looked = CliRunner().invoke(app, ["data", "inspect", to, "--frames", "9"], catch_exceptions=False)
    assert "64x64x9" in looked.output
    looked = CliRunner().invoke(
        app, ["data", "inspect", to, "--frames", "9", "--world-size", "4"], catch_exceptions=False
    )
    assert "1 samples in 1 steps, 75.00% of 4 ranks' work wasted" in looked.output
    with pytest.raises(InvalidInput, match="weights"):
        CliRunner().invoke(app, ["data", "inspect", to, "--group-weight", "image=1"], catch_exceptions=False)
    with pytest.raises(InvalidInput, match="already"):
        CliRunner().invoke(app, given, catch_exceptions=False)


def test_a_layout_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(InvalidInput, match="layout"):
        list(read_samples("coco", tmp_path / "a.json", tmp_path, SkipReport()))
    assert MixConfig().task_ratio is not None

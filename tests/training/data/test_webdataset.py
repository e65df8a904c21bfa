"""Shards: samples are read as they were written; broken ones are counted, reported and skipped."""

import importlib.util
import io
import json
import tarfile

import pytest

from omnivideo.training.data.file_store import open_file_store
from omnivideo.training.data.sample import SkipReport
from omnivideo.training.data.webdataset import ShardDataset, stream_samples, write_shards
from tests.support.training_samples import drop_keys, make_png, make_samples


@pytest.fixture
def shards(tmp_path):
    skip_report = SkipReport()
    assert write_shards(make_samples(), open_file_store(tmp_path / "shards"), skip_report) == 6
    assert not skip_report.skipped_samples
    return tmp_path / "shards"


def test_samples_of_all_six_tasks_are_read_from_the_stream_and_by_number(shards):
    skip_report = SkipReport()
    assert drop_keys(stream_samples(open_file_store(shards), skip_report)) == drop_keys(make_samples())
    dataset = ShardDataset(open_file_store(shards), skip_report)
    assert drop_keys(dataset[at] for at in (5, 0, 3, 1, 4, 2)) == drop_keys(
        make_samples()[at] for at in (5, 0, 3, 1, 4, 2)
    )
    assert [entry.shape.frames for entry in dataset.entries] == [1, 5, 1, 9, 1, 7]
    assert not skip_report.skipped_samples


def test_the_same_samples_give_the_same_bytes(shards, tmp_path):
    write_shards(make_samples(), open_file_store(tmp_path / "again"), SkipReport())
    assert (tmp_path / "again" / "00000.tar").read_bytes() == (shards / "00000.tar").read_bytes()


def test_a_missing_or_stale_index_is_rebuilt(shards):
    before = ShardDataset(open_file_store(shards), SkipReport()).entries
    index = shards / "00000.index.json"
    index.unlink()
    assert ShardDataset(open_file_store(shards), SkipReport()).entries == before
    size = (shards / "00000.tar").stat().st_size
    for text in (json.dumps({"format": 1, "bytes": 3, "samples": []}), json.dumps({"format": 1, "bytes": size}), "[]"):
        index.write_text(text)
        assert ShardDataset(open_file_store(shards), SkipReport()).entries == before


def test_a_second_shard_begins_when_the_first_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr("omnivideo.training.data.webdataset.MAX_SHARD_SAMPLES", 4)
    write_shards(make_samples(), open_file_store(tmp_path), SkipReport())
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert drop_keys(stream_samples(open_file_store(tmp_path), SkipReport())) == drop_keys(make_samples())


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # its open file
def test_the_webdataset_package_reads_our_shards(shards):
    if not importlib.util.find_spec("webdataset"):
        pytest.skip("webdataset is not installed (pip install webdataset); whether it reads our shards was not tested")
    from webdataset import WebDataset

    found = list(WebDataset(str(shards / "00000.tar"), shardshuffle=False))
    assert [json.loads(row["json"])["task"] for row in found] == [sample.task for sample in make_samples()]
    assert found[5]["target.mp4"] == make_samples()[5].target


@pytest.mark.parametrize("where", ["header", "middle", "end mark"])
def test_a_broken_tar_gives_the_samples_before_the_break(shards, where):
    path = shards / "00000.tar"
    data = path.read_bytes()
    last = ShardDataset(open_file_store(shards), SkipReport()).entries[-1]
    start = last.members["json"][0] - 512
    cut = {"header": start, "middle": start + 700, "end mark": len(data.rstrip(b"\0")) // 512 * 512 + 512}[where]
    path.write_bytes(data[:cut])
    streamed, scanned = SkipReport(), SkipReport()
    assert drop_keys(stream_samples(open_file_store(shards), streamed))[:5] == drop_keys(make_samples())[:5]
    assert len(ShardDataset(open_file_store(shards), scanned)) >= 5
    for skip_report in (streamed, scanned):
        assert skip_report.count_by_kind()["broken shard"] == 1
        assert skip_report.skipped_samples[0][1].startswith("00000.tar")


def test_an_overwritten_header_is_not_mistaken_for_the_end(shards):
    path = shards / "00000.tar"
    data = bytearray(path.read_bytes())
    start = ShardDataset(open_file_store(shards), SkipReport()).entries[3].members["json"][0] - 512
    data[start : start + 512] = b"x" * 512
    path.write_bytes(data)
    skip_report = SkipReport()
    assert drop_keys(stream_samples(open_file_store(shards), skip_report)) == drop_keys(make_samples())[:3]
    assert skip_report.count_by_kind() == {"broken shard": 1}


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("members", "kind", "word"),
    [
        ({"a.json": b"{not json", "a.target.png": make_png()}, "wrong record", "not JSON"),
        (
            {"a.json": b'{"task": "text-to-sound", "text": "x"}', "a.target.png": make_png()},
            "wrong record",
            "not one of",
        ),
        ({"a.json": b'{"task": "text-to-image", "text": 3}', "a.target.png": make_png()}, "wrong record", "text"),
        ({"a.json": b'{"task": "text-to-image", "text": "x"}'}, "wrong record", "target"),
        (
            {"a.json": b'{"task": "text-to-image", "text": "\\ud800"}', "a.target.png": make_png()},
            "wrong record",
            "surrogate",
        ),
        (
            {"a.json": b'{"task": "image-understanding", "turns": 3}', "a.source.png": make_png()},
            "wrong record",
            "turns",
        ),
        ({"a.json": b"[" * 100_000, "a.target.png": make_png()}, "wrong record", "not JSON"),
        ({"a.json": b'{"task": "text-to-video", "text": "x"}', "a.target.png": make_png()}, "wrong record", "png"),
        ({"a.target.png": make_png()}, "missing file", "a.json"),
        (
            {"a.json": b'{"task": "text-to-image", "text": "x"}', "a.target.png": b"nothing"},
            "unreadable media",
            "not an im",
        ),
    ],
)
def test_an_invalid_sample_is_reported_and_skipped(tmp_path, members, kind, word):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in members.items():
            add_member(tar, name, data)
        add_member(tar, "b.json", b'{"task": "text-to-image", "text": "x"}')
        add_member(tar, "b.target.png", make_png())
    skip_report = SkipReport()
    assert [sample.key for sample in stream_samples(open_file_store(tmp_path), skip_report)] == ["b"]
    assert skip_report.count_by_kind() == {kind: 1}
    assert skip_report.skipped_samples[0][1] == "0.tar/a" and word in skip_report.skipped_samples[0][2]

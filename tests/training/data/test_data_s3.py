"""Shards on an S3 server are written, streamed and read by number; a missing server is reported."""

import os

import pytest

from omnivideo.errors import InvalidInput, StoreError
from omnivideo.training.data.file_store import open_file_store
from omnivideo.training.data.prefetch import Prefetcher
from omnivideo.training.data.sample import SkipReport
from omnivideo.training.data.webdataset import ShardDataset, stream_samples, write_shards
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, s3_server
from tests.support.training_samples import drop_keys, make_samples

WHERE = "s3://training/sets/six"


@pytest.fixture
def server(tmp_path, monkeypatch):
    with s3_server(tmp_path) as server:
        monkeypatch.setenv("OMNIVIDEO_S3", server.address)
        monkeypatch.setenv("OMNIVIDEO_S3_ACCESS_KEY", ACCESS_KEY)
        monkeypatch.setenv("OMNIVIDEO_S3_SECRET_KEY", SECRET_KEY)
        yield server


def test_shards_are_written_to_and_read_from_a_bucket(server):
    skip_report = SkipReport()
    write_shards(make_samples(), open_file_store(WHERE), skip_report)
    assert open_file_store(WHERE).list_names(".tar") == ["00000.tar"]
    assert drop_keys(stream_samples(open_file_store(WHERE), skip_report)) == drop_keys(make_samples())
    library = ShardDataset(open_file_store(WHERE), skip_report)
    assert drop_keys([library[4], library[1]]) == drop_keys([make_samples()[4], make_samples()[1]])
    assert not skip_report.skipped_samples
    server.kill()
    with pytest.raises(StoreError, match="no connection"):
        library[0]


@pytest.mark.usefixtures("server")
def test_worker_processes_have_separate_connections():
    """The workers are forked from a process that has read the indices and keeps its connection open."""
    write_shards(make_samples(), open_file_store(WHERE), SkipReport())
    library = ShardDataset(open_file_store(WHERE), SkipReport())
    ours, samples = library.file_store.client, drop_keys(make_samples())

    def read(step: int) -> tuple[int, bool, dict]:
        one = library[step % 6]
        return os.getpid(), library.file_store.client is ours, drop_keys([one])[0]

    ahead = Prefetcher(read, workers=2)
    found = [ahead(step) for step in range(240)]
    assert [sample for _, _, sample in found] == 40 * samples
    assert len({pid for pid, _, _ in found}) == 2 and not any(shared for _, shared, _ in found)
    assert library.file_store.client is ours and drop_keys([library[3]]) == samples[3:4]


def test_a_bucket_without_a_server_is_refused(monkeypatch):
    monkeypatch.delenv("OMNIVIDEO_S3", raising=False)
    with pytest.raises(InvalidInput, match="OMNIVIDEO_S3"):
        open_file_store(WHERE)

"""Sweeps of the S3 store while others write: nothing that a put has confirmed is removed."""

import io
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from tests.support.object_stores import store_on
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

minio = pytest.importorskip("minio", reason="minio is not installed (pip install minio); the S3 store was not tested")
from omnivideo.storage.objects import s3 as s3_module  # noqa: E402
from omnivideo.storage.objects.s3 import S3ObjectStore  # noqa: E402


class SweeperWithConcurrentPut(S3ObjectStore):
    """Let another store put the same bytes again between the listing and the deletion of a sweep."""

    other: S3ObjectStore
    putting: threading.Thread | None = None

    def remove_objects(self, names: list[str]) -> None:
        if self.putting is None and names:
            self.putting = threading.Thread(target=self.other.put, args=(b"clip", "mp4"))
            self.putting.start()
            time.sleep(0.4)  # time for the upload
        super().remove_objects(names)


def sweep_during_put(s3: S3ObjectStore, server: S3Server) -> bool:
    """Run a sweep and a put of the same clip concurrently, and return whether the clip exists afterwards."""
    key = s3.put(b"clip", "mp4")
    sweeper = SweeperWithConcurrentPut(server.address, s3.bucket, ACCESS_KEY, SECRET_KEY)
    sweeper.other = s3
    assert sweeper.sweep(set(), 0) == [key]
    assert sweeper.putting is not None
    sweeper.putting.join()
    return s3.has(key)


def test_a_sweep_keeps_an_object_that_a_concurrent_put_confirmed(s3, server):
    assert sweep_during_put(s3, server)


def test_without_marks_the_sweep_removes_the_object(s3, server, monkeypatch):
    """Show that the previous test covers the race that the marks prevent."""
    monkeypatch.setattr(s3, "is_mark_active", lambda mark: False)
    assert not sweep_during_put(s3, server)


def test_sweeps_and_puts_may_run_in_any_order(s3):
    rng, clips = random.Random(0), [b"clip %d" % number for number in range(60)]
    keys = [s3.put(clip, "mp4") for clip in clips]
    time.sleep(1.1)

    def put_again(seed: int) -> list[str]:
        """Put every clip again, and return the keys that are missing right after their put."""
        order = random.Random(seed).sample(clips, len(clips))
        return [key for clip in order if not s3.has(key := s3.put(clip, "mp4"))]

    started_at = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        sweeps = [pool.submit(s3.sweep, set(), 1.0), pool.submit(s3.sweep, set(), 1.0)]
        missing = [key for found in pool.map(put_again, [rng.random() for _ in range(3)]) for key in found]
    removed = [key for sweep in sweeps for key in sweep.result()]
    seconds = time.monotonic() - started_at
    print(f"{len(removed)} removed by two sweeps in {seconds:.1f} s, {len(missing)} missing after a put")
    assert removed and missing == []
    assert all(s3.put(clip, "mp4") in keys and s3.has(key) for clip, key in zip(clips, keys, strict=True))


def test_the_mark_of_a_killed_sweep_expires(s3, monkeypatch):
    key = s3.put(b"clip", "mp4")
    s3.client.put_object(s3.bucket, f".sweep/{key[:2]}-dead", io.BytesIO(), 0)
    monkeypatch.setattr(s3_module, "MARK_LIFETIME", timedelta(seconds=2))
    started_at = time.monotonic()
    assert s3.put(b"clip", "mp4") == key and s3.has(key)
    assert 0.5 < time.monotonic() - started_at < 5
    assert s3.put(b"clip", "mp4") == key
    assert list(s3.iter_keys()) == [key]


def test_prefixes_are_separate(server):
    one, two = (store_on(server.address, "shared", prefix=prefix) for prefix in ("one", "/two/deep/"))
    key = one.put(b"clip", "mp4")
    assert one.has(key) and not two.has(key) and list(two.iter_keys()) == []
    assert two.put(b"clip", "mp4") == key
    assert two.sweep(set(), 0) == [key]
    assert one.has(key) and not two.has(key)

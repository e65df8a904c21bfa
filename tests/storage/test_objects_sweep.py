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

minio = pytest.importorskip("minio", reason="minio is not here (pip install minio): the S3 store was not tested")
from omnivideo.storage.objects import s3 as ours  # noqa: E402
from omnivideo.storage.objects.s3 import S3ObjectStore  # noqa: E402


class PutMeanwhile(S3ObjectStore):
    """Somebody puts the same bytes again while a sweep is between looking and deleting."""

    other: S3ObjectStore
    putting: threading.Thread | None = None

    def remove_objects(self, names: list[str]) -> None:
        if self.putting is None and names:
            self.putting = threading.Thread(target=self.other.put, args=(b"clip", "mp4"))
            self.putting.start()
            time.sleep(0.4)  # in which the put uploads
        super().remove_objects(names)


def swept_and_put(s3: S3ObjectStore, server: S3Server) -> bool:
    """Whether the clip is there after a sweep and a put that met."""
    key = s3.put(b"clip", "mp4")
    sweeper = PutMeanwhile(server.address, s3.bucket, ACCESS_KEY, SECRET_KEY)
    sweeper.other = s3
    assert sweeper.sweep(set(), 0) == [key]
    assert sweeper.putting is not None
    sweeper.putting.join()
    return s3.has(key)


def test_a_sweep_that_meets_a_put_takes_nothing_that_the_put_said_is_there(s3, server):
    assert swept_and_put(s3, server)


def test_without_the_marks_it_would(s3, server, monkeypatch):
    """That the meeting above is the dangerous one."""
    monkeypatch.setattr(s3, "is_mark_active", lambda mark: False)
    assert not swept_and_put(s3, server)


def test_sweeps_and_puts_in_any_order(s3):
    rng, clips = random.Random(0), [b"clip %d" % number for number in range(60)]
    keys = [s3.put(clip, "mp4") for clip in clips]
    time.sleep(1.1)

    def put_again(seed: int) -> list[str]:
        """Says of every clip that it is there, and looks at once."""
        order = random.Random(seed).sample(clips, len(clips))
        return [key for clip in order if not s3.has(key := s3.put(clip, "mp4"))]

    began = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        sweeps = [pool.submit(s3.sweep, set(), 1.0), pool.submit(s3.sweep, set(), 1.0)]
        missing = [key for found in pool.map(put_again, [rng.random() for _ in range(3)]) for key in found]
    taken = [key for sweep in sweeps for key in sweep.result()]
    print(f"{len(taken)} taken by two sweeps in {time.monotonic() - began:.1f} s, {len(missing)} missed after a put")
    assert taken and missing == []
    assert all(s3.put(clip, "mp4") in keys and s3.has(key) for clip, key in zip(clips, keys, strict=True))


def test_the_mark_of_a_killed_sweep_is_void_after_its_time(s3, monkeypatch):
    key = s3.put(b"clip", "mp4")
    s3.client.put_object(s3.bucket, f".sweep/{key[:2]}-dead", io.BytesIO(), 0)
    monkeypatch.setattr(ours, "MARK_LIFETIME", timedelta(seconds=2))
    began = time.monotonic()
    assert s3.put(b"clip", "mp4") == key and s3.has(key)
    assert 0.5 < time.monotonic() - began < 5
    assert s3.put(b"clip", "mp4") == key
    assert list(s3.iter_keys()) == [key]


def test_prefixes_keep_apart(server):
    one, two = (store_on(server.address, "shared", prefix=prefix) for prefix in ("one", "/two/deep/"))
    key = one.put(b"clip", "mp4")
    assert one.has(key) and not two.has(key) and list(two.iter_keys()) == []
    assert two.put(b"clip", "mp4") == key
    assert two.sweep(set(), 0) == [key]
    assert one.has(key) and not two.has(key)

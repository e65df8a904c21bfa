"""Build object stores for tests, and check the contract of every store."""

import hashlib
import os
import random
from typing import Any

import pytest

from omnivideo.errors import ArtifactNotFound, InvalidInput
from omnivideo.ports import ObjectStore
from omnivideo.storage.objects.s3 import S3ObjectStore
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY

MISSING = "0" * 64 + ".mp4"


def store_on(address: str, bucket: str = "", **options: Any) -> S3ObjectStore:
    """Return a store on an S3 server, in a new bucket unless one is named."""
    return S3ObjectStore(address, bucket or f"b{random.getrandbits(64):x}", ACCESS_KEY, SECRET_KEY, **options)


def check_round_trip(store: ObjectStore) -> None:
    """Check that bytes come back under their digest, and that the same bytes have the same key."""
    for data, suffix in ((b"a clip", "mp4"), (b"", "json"), (os.urandom(3 << 20), "safetensors")):
        key = store.put(data, suffix)
        assert key == f"{hashlib.sha256(data).hexdigest()}.{suffix}"
        assert store.get(key) == data and store.has(key)
        assert store.put(data, suffix) == key


def check_ranges(store: S3ObjectStore) -> None:
    """Check that parts of a file can be read, and that a range outside it is refused."""
    key = store.put(bytes(range(100)), "mp4")
    assert store.get_size(key) == 100
    assert store.read_range(key, 0, 0) == b"\0" and store.read_range(key, 10, 19) == bytes(range(10, 20))
    assert store.read_range(key, 90, 1000) == bytes(range(90, 100)) and store.read_range(key, 0, 99) == store.get(key)
    for first, last in ((100, 101), (-1, 3), (5, 4)):
        with pytest.raises(InvalidInput, match=r"^range: "):
            store.read_range(key, first, last)
    for ask in (store.get_size, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(ArtifactNotFound):
            ask(MISSING)

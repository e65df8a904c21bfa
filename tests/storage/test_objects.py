"""The contract of every object store: in memory, in a local folder, and on an S3 server that checks credentials."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from opentelemetry import trace

from omnivideo.errors import ArtifactNotFound
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.storage.objects.memory import MemoryObjectStore
from omnivideo.storage.objects.tensors import get_tensors, put_tensors
from tests.support.object_stores import MISSING, check_round_trip
from tests.support.spans import collect_spans, find_spans

minio = pytest.importorskip("minio", reason="minio is not installed (pip install minio); the S3 store was not tested")


@pytest.fixture(params=["memory", "local", "s3"])
def store(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return MemoryObjectStore() if request.param == "memory" else LocalObjectStore(tmp_path / "store")


@pytest.fixture(params=["local", "s3"])
def sweeping(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else LocalObjectStore(tmp_path / "store")


def test_bytes_are_stored_under_their_digest(store):
    check_round_trip(store)


def test_a_trace_covers_the_store(s3):
    collect_spans()
    with trace.get_tracer("test").start_as_current_span("caller") as caller:
        s3.get(s3.put(b"traced", "bin"))
    spans = find_spans(caller.get_span_context().trace_id)
    assert spans["store put"] >= 1 and spans["store get"] == 1


def test_a_missing_object_is_not_found(store):
    assert not store.has(MISSING)
    with pytest.raises(ArtifactNotFound, match="there is no such artifact"):
        store.get(MISSING)
    store.put(b"something", "mp4")
    assert not store.has(MISSING)
    with pytest.raises(ArtifactNotFound, match="there is no such artifact"):
        store.get(MISSING)


@pytest.mark.parametrize("key", ["../../etc/passwd", "", "x.mp4", MISSING.upper(), MISSING + "/..", MISSING + "?acl"])
def test_an_invalid_key_is_not_found(store, key):
    with pytest.raises(ArtifactNotFound, match=r"^store: "):
        store.get(key)


def test_many_threads_can_store_the_same_bytes(store):
    data = os.urandom(200_000)
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: store.put(data, "mp4"), range(24)))
    assert len(keys) == 1 and store.get(keys.pop()) == data


def test_tensors_are_stored_and_loaded(store):
    import torch

    tensors = {"latents": torch.randn(4, 3), "step": torch.tensor(7)}
    loaded = get_tensors(store, put_tensors(store, tensors))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_sweep_keeps_referenced_and_recent_objects(sweeping):
    assert list(sweeping.iter_keys()) == [] and sweeping.sweep(set(), 0) == []
    kept, old, again = (sweeping.put(data, "mp4") for data in (b"kept", b"old", b"again"))
    assert sorted(sweeping.iter_keys()) == sorted([kept, old, again])
    assert sweeping.sweep({kept}, lifetime_seconds=60) == []
    time.sleep(3.1)
    young = sweeping.put(b"young", "mp4")
    assert sweeping.put(b"again", "mp4") == again
    assert sweeping.sweep({kept}, lifetime_seconds=3) == [old]
    assert [sweeping.has(key) for key in (kept, old, again, young)] == [True, False, True, True]
    assert sorted(sweeping.iter_keys()) == sorted([kept, again, young])
    assert sorted(sweeping.sweep(set(), 0)) == sorted([kept, again, young]) and list(sweeping.iter_keys()) == []


def test_a_sweep_of_candidates_removes_nothing_else(sweeping):
    sweeping.check_writable()
    referenced, candidate, other = (sweeping.put(name, "mp4") for name in (b"referenced", b"candidate", b"other"))
    time.sleep(1.1)  # an S3 server states times in seconds
    assert sweeping.sweep({referenced}, 1.0, {referenced, candidate, MISSING}) == [candidate]
    assert sweeping.has(referenced) and sweeping.has(other) and not sweeping.has(candidate)
    assert set(sweeping.iter_keys()) == {referenced, other}, "the check has left nothing"

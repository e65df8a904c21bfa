"""Slow decoding and a store that hangs occupy their own share of the threads; other requests do not wait for them."""

import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from omnivideo.api.bulkheads import MAX_DECODING_THREADS_PER_OWNER, MAX_STORE_THREADS
from tests.support.openai_service import make_http_client, wait_until

NUM_REQUESTS = 80
MIB = 2**20


def measure_others(http) -> float:
    """Return the longest time of several requests that need neither the store nor a decoder."""
    slowest = 0.0
    for _ in range(5):
        for path in ("/health", "/v1/videos", "/v1/threads", "/v1/files"):
            started_at = time.monotonic()
            assert http.get(path).status_code == 200
            slowest = max(slowest, time.monotonic() - started_at)
    return slowest


def check_that_others_go_on(
    service, http, send, max_threads: int, release: threading.Event, check_meanwhile=lambda: None
) -> None:
    with make_http_client(service) as quiet, ThreadPoolExecutor(NUM_REQUESTS) as pool:  # `http` checks for 5xx
        started_at = time.monotonic()
        answers = [pool.submit(send, quiet) for _ in range(NUM_REQUESTS)]
        try:
            wait_until(lambda: sum(answer.done() for answer in answers) == NUM_REQUESTS - max_threads, 20)
            refused = [answer.result() for answer in answers if answer.done()]
            assert {answer.status_code for answer in refused} == {503}
            assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
            assert measure_others(http) < 2.0
            check_meanwhile()
            assert time.monotonic() - started_at < 25
        finally:
            release.set()
        assert {answer.result().status_code for answer in answers} == {200, 503}


def test_slow_uploads_of_one_owner_delay_no_other_request(service, http, context, monkeypatch):
    from omnivideo.media import ingest

    release, measure = threading.Event(), ingest.measure_in_sandbox

    def measure_slowly(source, limits, process_limits, owner):
        if owner == "admin":
            release.wait(60)
        return measure(source, limits, process_limits, owner)

    monkeypatch.setattr(ingest, "measure_in_sandbox", measure_slowly)
    _, other_key = context.api_keys.create_key("another")

    def upload(client):
        """Upload what no process needs to read: on a busy machine, sixteen take more than a minute."""
        return client.post("/v1/files", files={"file": ("a", b"no media")}, data={"purpose": "user_data"})

    def upload_as_another_owner():
        with make_http_client(service) as other:
            other.headers["Authorization"] = f"Bearer {other_key}"
            assert upload(other).status_code == 200

    check_that_others_go_on(
        service, http, upload, MAX_DECODING_THREADS_PER_OWNER, release, check_meanwhile=upload_as_another_owner
    )


def test_a_store_that_hangs_delays_no_other_request(service, http, context, monkeypatch):
    stored = http.post("/v1/files", files={"file": ("a.bin", b"text")}, data={"purpose": "batch"}).json()
    release, get_size = threading.Event(), context.store.store.get_size
    monkeypatch.setattr(context.store.store, "get_size", lambda key: release.wait(60) and get_size(key))

    def download(client):
        return client.get(f"/v1/files/{stored['id']}/content")

    check_that_others_go_on(service, http, download, MAX_STORE_THREADS, release)


# ---------------------------------------------------------------- memory


@contextmanager
def assert_peak_below(max_bytes: int):
    """Check the memory that this process, which runs the service and the client, allocates meanwhile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < max_bytes
    finally:
        tracemalloc.stop()


@pytest.fixture
def large_file(context, tmp_path):
    """Return the id of a stored file of 150 MiB."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(150 * MIB)
    with path.open("rb") as file:
        key = context.store.put_stream(file, "bin")
    record = context.files.create_file(
        "admin", file_id="file-large", name="large", purpose="user_data", size_bytes=150 * MIB, object_key=key,
        artifact=None,
    )  # fmt: skip
    return record.id


def test_a_range_of_a_large_file_takes_little_memory(http, large_file):
    path = f"/v1/files/{large_file}/content"
    with assert_peak_below(12 * MIB):
        for _ in range(12):
            answer = http.get(path, headers={"Range": "bytes=100000000-100000000"})
            assert answer.status_code == 206 and answer.content == b"\0"
            assert answer.headers["Content-Range"] == f"bytes 100000000-100000000/{150 * MIB}"


def test_a_large_file_is_sent_in_parts(http, large_file):
    with (
        assert_peak_below(40 * MIB),
        http.stream("GET", f"/v1/files/{large_file}/content", headers={"Range": "bytes=5-"}) as answer,
    ):
        assert int(answer.headers["Content-Length"]) == 150 * MIB - 5
        assert sum(map(len, answer.iter_bytes(MIB))) == 150 * MIB - 5

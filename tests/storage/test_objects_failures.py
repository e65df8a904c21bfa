"""Failures of the S3 server, and invalid addresses and buckets, are reported as clear errors."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import urllib3

from omnivideo.errors import InvalidInput, StoreError
from tests.support.object_stores import MISSING, store_on
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, s3_server

minio = pytest.importorskip("minio", reason="minio is not installed (pip install minio); the S3 store was not tested")
from omnivideo.storage.objects import s3_client as connection  # noqa: E402
from omnivideo.storage.objects.local import compute_object_key  # noqa: E402
from omnivideo.storage.objects.s3 import S3ObjectStore  # noqa: E402

CLIP_KEY = compute_object_key(b"clip", "mp4")


def test_a_wrong_access_key_is_reported(server):
    store_on(server.address, "secrets").put(b"clip", "mp4")
    for access, secret in ((ACCESS_KEY, "wrong-secret"), ("somebody", SECRET_KEY)):
        stranger = S3ObjectStore(server.address, "secrets", access, secret)
        for request, *arguments in (
            (stranger.put, b"more", "mp4"), (stranger.get, MISSING), (stranger.has, MISSING), (stranger.sweep, set()),
            (stranger.read_range, MISSING, 0, 1), (stranger.get_size, MISSING), (stranger.abort_stale_uploads,),
            (stranger.set_lifecycle_expiration, 1),
        ):  # fmt: skip
            with pytest.raises(StoreError) as caught:
                request(*arguments)
            assert type(caught.value) is StoreError
            assert f"127.0.0.1:{server.port}: it rejects this access key" in str(caught.value)
            assert secret not in str(caught.value) and "\n" not in str(caught.value)


def test_requests_continue_after_the_server_is_killed_and_restarted(tmp_path):
    with s3_server(tmp_path) as server:
        store = store_on(server.address)
        key = store.put(b"before", "mp4")
        server.kill()
        for request in (lambda: store.get(key), lambda: store.put(b"down", "mp4")):
            started_at = time.monotonic()
            with pytest.raises(StoreError, match=f"^store: the S3 server at 127.0.0.1:{server.port}: no connection$"):
                request()
            assert time.monotonic() - started_at < 6
        server.start()
        assert store.get(key) == b"before"  # over the old connections of the pool
        server.kill()
        server.start()
        assert store.has(store.put(b"after", "mp4"))
        server.kill()
        restart = threading.Timer(1.0, server.start)
        restart.start()
        assert store.get(key) == b"before"  # retried until the server is back
        restart.join()


class ScriptedHandler(BaseHTTPRequestHandler):
    """Answer each request with the server's next answer: (status, content type, body, number of bytes to send)."""

    def do_GET(self) -> None:
        status, content_type, body, sent_bytes = self.server.answers.pop(0)  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[:sent_bytes])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def scripted_server():
    server = HTTPServer(("127.0.0.1", 0), ScriptedHandler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    server.store = store_on(f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_a_truncated_answer_is_requested_again(scripted_server):
    scripted_server.answers = [(200, "video/mp4", b"clip", 2), (200, "video/mp4", b"clip", 4)]
    assert scripted_server.store.get(CLIP_KEY) == b"clip"
    scripted_server.answers = [(200, "video/mp4", b"clip", 2)] * 2
    with pytest.raises(StoreError, match=r"the connection was lost$"):
        scripted_server.store.get(CLIP_KEY)


def test_bytes_that_are_not_those_of_the_key_are_requested_again(scripted_server):
    scripted_server.answers = [(200, "video/mp4", b"clib", 4), (200, "video/mp4", b"clip", 4)]
    assert scripted_server.store.get(CLIP_KEY) == b"clip"
    scripted_server.answers = [(200, "video/mp4", b"clib", 4)] * 2
    with pytest.raises(StoreError, match=r"the S3 server sends other bytes for \w+.mp4 than were stored$"):
        scripted_server.store.get(CLIP_KEY)


def test_an_answer_that_is_not_s3_is_an_error(scripted_server):
    scripted_server.answers = [(404, "text/html", b"<html>secret page</html>", 99)]
    with pytest.raises(StoreError, match=r"it answers something that is not S3$"):
        scripted_server.store.get(MISSING)


def test_a_server_error_is_retried_three_times(scripted_server):
    scripted_server.answers = [(503, "text/plain", b"busy", 4)] * 3 + [(200, "video/mp4", b"clip", 4)]
    assert scripted_server.store.get(CLIP_KEY) == b"clip"
    scripted_server.answers = [(503, "text/plain", b"busy", 4)] * 9
    with pytest.raises(StoreError, match=r"it failed, or the connection was lost$"):
        scripted_server.store.get(MISSING)
    assert len(scripted_server.answers) == 5


def test_a_server_that_does_not_answer_is_an_error(monkeypatch):
    monkeypatch.setattr(connection, "HTTP_TIMEOUT", urllib3.Timeout(connect=1, read=0.2))
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(StoreError, match=r"no response in time$"),
    ):
        store_on(f"http://127.0.0.1:{silent.getsockname()[1]}").get(MISSING)


@pytest.mark.parametrize("address", [
    "", "minio:9000", "ftp://minio:9000", "http://", "http://me:hunter2@minio:9000", "http://minio:9000/path",
    "http://minio:9000?x=1",
])  # fmt: skip
def test_invalid_addresses_are_refused(address):
    for arguments in ({"address": address}, {"address": "http://minio:9000", "public_address": address or "x"}):
        with pytest.raises(InvalidInput, match=r"^S3 address: http://host:port") as caught:
            S3ObjectStore(bucket="clips", access_key="a", secret_key="b", **arguments)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("bucket", ["", "ab", "Clips", "a/b", "x" * 64, "-clips"])
def test_invalid_buckets_are_refused(bucket):
    with pytest.raises(InvalidInput, match=r"^S3 bucket: 3 to 63"):
        S3ObjectStore("http://minio:9000", bucket, "a", "b")

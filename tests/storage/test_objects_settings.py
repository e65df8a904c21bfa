"""Answers of an S3 server that a setting would mend name the setting and its value.

A server of a region is rclone behind a process that compares the signature's region, as AWS, Garage and MinIO do.
"""

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import urllib3

from omnivideo.errors import StoreError
from omnivideo.storage.objects.s3 import S3ObjectStore
from tests.support.object_stores import MISSING, store_on
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

REGION = "eu-west-1"
MESSAGES = {
    "AWS": f"The authorization header is malformed; the region 'us-east-1' is wrong; expecting '{REGION}'",
    "Garage": "Authorization header malformed, unexpected scope: 20261129/us-east-1/s3/aws4_request, "
    f"expected: 20261129/{REGION}/s3/aws4_request",
}
MALFORMED = """<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>AuthorizationHeaderMalformed</Code><Message>{message}</Message><Region>{region}</Region></Error>"""
HOP_HEADERS = ("connection", "transfer-encoding", "content-length", "date", "server")


class RegionHandler(BaseHTTPRequestHandler):
    """Refuses what is signed for another region, and passes everything else on."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        signed = re.search(r"Credential=[^/]+/\d+/([^/]+)/s3", self.headers["Authorization"])
        if signed and signed[1] == REGION:
            response = urllib3.request(
                self.command, f"{self.server.target}{self.path}", headers=dict(self.headers), body=body, retries=False
            )  # fmt: skip
            headers = {name: value for name, value in response.headers.items() if name.lower() not in HOP_HEADERS}
            self.answer(response.status, headers, response.data)
            return
        error = MALFORMED.format(message=self.server.message, region=REGION).encode()
        self.answer(400, {"Content-Type": "application/xml", "x-amz-bucket-region": REGION}, error)

    do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Write nothing."""


@pytest.fixture
def region_server(server: S3Server) -> Iterator[ThreadingHTTPServer]:
    regional = ThreadingHTTPServer(("127.0.0.1", 0), RegionHandler)
    regional.target, regional.message = server.address, MESSAGES["AWS"]
    threading.Thread(target=regional.serve_forever, args=(0.05,), daemon=True).start()
    yield regional
    regional.shutdown()
    regional.server_close()


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_store_in_another_region_names_the_region(region_server: ThreadingHTTPServer, kind: str) -> None:
    region_server.message = MESSAGES[kind]
    address = f"http://127.0.0.1:{region_server.server_port}"
    store = store_on(address, "region")
    for request in (lambda: store.put(b"clip", "mp4"), lambda: store.get(MISSING), lambda: store.has(MISSING)):
        with pytest.raises(StoreError, match=r"this region; set OMNIVIDEO_S3_REGION to eu-west-1$"):
            request()
    mended = S3ObjectStore(address, "region", ACCESS_KEY, SECRET_KEY, region=REGION)
    assert mended.get(mended.put(b"clip", "mp4")) == b"clip"


@pytest.mark.parametrize(("access", "secret"), [(ACCESS_KEY, "wrong-secret"), ("somebody", SECRET_KEY)])
def test_refused_keys_are_named(server: S3Server, access: str, secret: str) -> None:
    store_on(server.address, "keys").put(b"clip", "mp4")
    stranger = S3ObjectStore(server.address, "keys", access, secret)
    for request in (lambda: stranger.put(b"more", "mp4"), lambda: stranger.get(MISSING)):
        with pytest.raises(StoreError, match="set OMNIVIDEO_S3_ACCESS_KEY and OMNIVIDEO_S3_SECRET_KEY to a pair"):
            request()


def test_an_address_with_tls_of_a_server_without_is_named(server: S3Server) -> None:
    store = store_on(server.address.replace("http:", "https:"))
    with pytest.raises(StoreError, match="it does not speak TLS; set OMNIVIDEO_S3 to an address that begins with http"):
        store.get(MISSING)

"""Requests for more than the service can afford, and images that decompress to more than fits in memory."""

import struct
import time
import zlib

import pytest

from tests.support.attacks import assert_refused
from tests.support.openai_service import download_lines, make_lines, make_runner, wait_for_batch


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        ("videos", {"num_frames": 100_001}, "num_frames"),
        ("videos", {"num_frames": 241, "size": "1280x720"}, "num_frames"),
        ("videos", {"seconds": "86400"}, "seconds"),
        ("videos", {"seconds": "1", "fps": 10**9}, "fps"),
        ("videos", {"num_inference_steps": 10**6}, "num_inference_steps"),
        ("videos", {"size": "99999x99999"}, "size"),
        ("videos", {"size": "100000000x16"}, "size"),
        ("videos", {"prompt": "a" * 1_000_000}, "prompt"),
        ("images/generations", {"n": 1000}, "n"),
        ("images/generations", {"num_inference_steps": 10**6}, "num_inference_steps"),
        ("images/generations", {"size": "99999x16"}, "size"),
        ("images/generations", {"num_frames": 9, "n": 10**18}, "n"),
    ],
)
def test_values_above_their_limits(http, context, path, fields, field):
    assert_refused(http.post(f"/v1/{path}", json={"prompt": "a"} | fields), field)
    assert context.jobs.count_queued() == 0


def test_values_above_their_limits_in_a_form_and_in_a_batch(http, client, context):
    form = {"prompt": "a", "num_frames": "99999", "num_inference_steps": "99999"}
    assert_refused(http.post("/v1/videos", data=form, files={"x": b""}), "num_inference_steps")
    data = make_lines(1, num_frames=99_997, num_inference_steps=1)
    file = client.files.create(file=("a.jsonl", data), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")
    runner = make_runner(context).start()
    try:
        (line,) = download_lines(client, wait_for_batch(client, batch).error_file_id)
    finally:
        runner.stop()
    assert line["response"]["body"]["error"]["param"] == "num_frames"


def build_decompression_bomb() -> bytes:
    """Return a PNG of 30,000 x 30,000 px that takes about a hundred kilobytes."""
    side = 30_000
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8 * 100)) for _ in range(side // 100)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_decompression_bomb(http):
    """The image is refused by its header, on every route that accepts images."""
    data, started_at = build_decompression_bomb(), time.monotonic()
    assert len(data) < 300_000
    message = assert_refused(
        http.post("/v1/files", files={"file": ("a.png", data)}, data={"purpose": "vision"}), "file"
    )
    assert "pixels" in message
    form = {"prompt": "a"}
    assert "pixels" in assert_refused(
        http.post("/v1/videos", files={"input_reference": data}, data=form), "input_reference"
    )
    assert "pixels" in assert_refused(http.post("/v1/images/edits", files={"image": data}, data=form), "image")
    stored = http.post("/v1/files", files={"file": ("a.png", data)}, data={"purpose": "user_data"}).json()
    assert_refused(
        http.post("/v1/videos", json=form | {"input_reference": {"file_id": stored["id"]}}), "input_reference.file_id"
    )
    assert time.monotonic() - started_at < 20

"""Signed download links, ranges and large files of the S3 store."""

import hashlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from omnivideo.errors import InvalidInput, StoreError
from tests.support.object_stores import MISSING, check_ranges, store_on
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY

minio = pytest.importorskip("minio", reason="minio is not installed (pip install minio); the S3 store was not tested")


def download(address: str) -> tuple[bytes, str]:
    with urllib.request.urlopen(address, timeout=10) as response:
        return response.read(), response.headers["Content-Type"]


def test_a_signed_url_downloads_with_its_content_type_until_it_expires(s3):
    for suffix, kind in (("mp4", "video/mp4"), ("png", "image/png"), ("json", "application/json"), ("html", None)):
        got, got_kind = download(s3.presign_url(s3.put(b"what it holds", suffix), 60))
        assert got == b"what it holds" and got_kind == (kind or "application/octet-stream")
    key, other = s3.put(b"a clip", "mp4"), s3.put(b"another", "mp4")
    short = s3.presign_url(key, 1)
    assert SECRET_KEY not in short
    time.sleep(2.1)
    for refused in (short, s3.presign_url(key, 60).replace(key, other), s3.presign_url(key, 60).split("?")[0]):
        with pytest.raises(urllib.error.HTTPError) as caught:
            download(refused)
        assert caught.value.code in (400, 403)
        caught.value.close()


def test_signed_urls_name_the_public_server(server):
    store = store_on(server.address, public_address=f"http://localhost:{server.port}")
    address = store.presign_url(store.put(b"a clip", "mp4"), 60)
    assert address.startswith(f"http://localhost:{server.port}/")
    assert download(address)[0] == b"a clip"
    down = store_on("http://127.0.0.1:9", public_address="https://media.example.org")
    assert down.presign_url(MISSING, 7 * 86_400).startswith(
        "https://media.example.org/"
    )  # without a request to the server


@pytest.mark.parametrize("seconds", [0, -5, 7 * 86_400 + 1])
def test_a_signed_url_lasts_from_one_second_to_a_week(s3, seconds):
    with pytest.raises(InvalidInput, match=r"^seconds: 1 to 604800"):
        s3.presign_url(MISSING, seconds)


def test_ranges_are_read(s3):
    check_ranges(s3)


PUT_FILE = """
import sys
from pathlib import Path
from omnivideo.storage.objects.s3 import S3ObjectStore
peak = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
store = S3ObjectStore(sys.argv[1], "large", sys.argv[2], sys.argv[3])
store.put(b"warm", "mp4")
before = peak()
print(store.put_file(Path(sys.argv[4]), "mp4"), peak() - before)
"""


def test_a_large_file_is_stored_without_loading_it(server, tmp_path):
    path, digest = tmp_path / "large.mp4", hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(64):
            piece = os.urandom(1 << 20)
            digest.update(piece)
            file.write(piece)
    command = [sys.executable, "-c", PUT_FILE, server.address, ACCESS_KEY, SECRET_KEY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    key, grown = done.stdout.split()
    print(f"putting 64 MiB raised the peak memory by {float(grown):.0f} MiB")
    assert key == f"{digest.hexdigest()}.mp4"
    assert float(grown) < 40  # two parts of 16 MiB and a margin
    store = store_on(server.address, "large")
    assert store.get_size(key) == 64 << 20
    again = hashlib.sha256()
    for first in range(0, 64 << 20, 8 << 20):
        again.update(store.read_range(key, first, first + (8 << 20) - 1))
    assert again.hexdigest() == digest.hexdigest()


def test_an_unreadable_file_is_an_error(s3, tmp_path):
    with pytest.raises(StoreError, match=r"^store: gone.mp4 cannot be read: No such file or directory$"):
        s3.put_file(tmp_path / "gone.mp4", "mp4")

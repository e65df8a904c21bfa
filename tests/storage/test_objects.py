"""One contract for every object store; then what the one on S3 owes, against a real server that checks credentials.

rclone keeps no lifecycle rules and lists no unfinished uploads: those two are tested against moto's imitation.
"""

import hashlib
import io
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import urllib3

from omnivideo.errors import ArtifactNotFound, InvalidInput, StoreError
from omnivideo.storage.objects.local import DAY_SECONDS, LocalObjectStore
from omnivideo.storage.objects.memory import MemoryObjectStore
from omnivideo.storage.objects.tensors import get_tensors, put_tensors
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, moto_server, s3_server

minio = pytest.importorskip("minio", reason="minio is not here (pip install minio): the S3 store was not tested")
from omnivideo.storage.objects import s3 as ours  # noqa: E402
from omnivideo.storage.objects import s3_client as connection  # noqa: E402
from omnivideo.storage.objects.s3 import LIFECYCLE_RULE_ID, S3ObjectStore  # noqa: E402

MISSING = "0" * 64 + ".mp4"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(server) -> S3ObjectStore:
    """In a bucket of its own, which is not there yet."""
    return store_on(server.address)


def store_on(address: str, bucket: str = "", **more) -> S3ObjectStore:
    return S3ObjectStore(address, bucket or f"b{random.getrandbits(64):x}", ACCESS_KEY, SECRET_KEY, **more)


@pytest.fixture(params=["memory", "local", "s3"])
def store(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return MemoryObjectStore() if request.param == "memory" else LocalObjectStore(tmp_path / "store")


@pytest.fixture(params=["local", "s3"])
def sweeping(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else LocalObjectStore(tmp_path / "store")


# The contract.


def test_bytes_come_back_under_the_digest_of_what_they_are(store):
    for data, suffix in ((b"a clip", "mp4"), (b"", "json"), (os.urandom(3 << 20), "safetensors")):
        key = store.put(data, suffix)
        assert key == f"{hashlib.sha256(data).hexdigest()}.{suffix}"
        assert store.get(key) == data and store.has(key)
        assert store.put(data, suffix) == key


def test_what_is_not_there_is_not_stored(store):
    assert not store.has(MISSING)
    with pytest.raises(ArtifactNotFound, match=f"there is no artifact {MISSING}"):
        store.get(MISSING)
    store.put(b"something", "mp4")
    assert not store.has(MISSING)
    with pytest.raises(ArtifactNotFound, match=f"there is no artifact {MISSING}"):
        store.get(MISSING)


@pytest.mark.parametrize("key", ["../../etc/passwd", "", "x.mp4", MISSING.upper(), MISSING + "/..", MISSING + "?acl"])
def test_what_is_no_key_reaches_nothing(store, key):
    with pytest.raises(ArtifactNotFound, match=r"^store: "):
        store.get(key)


def test_the_same_bytes_from_many_threads(store):
    data = os.urandom(200_000)
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: store.put(data, "mp4"), range(24)))
    assert len(keys) == 1 and store.get(keys.pop()) == data


def test_tensors(store):
    import torch

    tensors = {"latents": torch.randn(4, 3), "step": torch.tensor(7)}
    back = get_tensors(store, put_tensors(store, tensors))
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_the_sweep_leaves_what_is_referred_to_and_what_is_young(sweeping):
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


# A sweep and a put of the same bytes at the same time.


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


# Failures.


def test_a_wrong_secret_is_said_clearly(server):
    store_on(server.address, "secrets").put(b"clip", "mp4")
    for access, secret in ((ACCESS_KEY, "wrong-secret"), ("somebody", SECRET_KEY)):
        stranger = S3ObjectStore(server.address, "secrets", access, secret)
        for ask, *given in (
            (stranger.put, b"more", "mp4"), (stranger.get, MISSING), (stranger.has, MISSING), (stranger.sweep, set()),
            (stranger.read_range, MISSING, 0, 1), (stranger.get_size, MISSING), (stranger.abort_stale_uploads,),
            (stranger.set_lifecycle_expiration, 1),
        ):  # fmt: skip
            with pytest.raises(StoreError) as caught:
                ask(*given)
            assert type(caught.value) is StoreError
            assert f"127.0.0.1:{server.port}: it refuses this access key" in str(caught.value)
            assert secret not in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_killed_and_started_again(tmp_path):
    with s3_server(tmp_path) as server:
        store = store_on(server.address)
        key = store.put(b"before", "mp4")
        server.kill()
        for ask in (lambda: store.get(key), lambda: store.put(b"down", "mp4")):
            began = time.monotonic()
            with pytest.raises(StoreError, match=f"^store: the S3 server at 127.0.0.1:{server.port}: no connection$"):
                ask()
            assert time.monotonic() - began < 6
        server.start()
        assert store.get(key) == b"before"  # over the pool's old connections
        server.kill()
        server.start()
        assert store.has(store.put(b"after", "mp4"))
        server.kill()
        back = threading.Timer(1.0, server.start)
        back.start()
        assert store.get(key) == b"before"  # waited for
        back.join()


class Peculiar(BaseHTTPRequestHandler):
    """Answers each request with the next of its server's answers: (status, type, body, how much of it is sent)."""

    def do_GET(self) -> None:
        status, kind, body, sent = self.server.answers.pop(0)  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[:sent])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def peculiar():
    server = HTTPServer(("127.0.0.1", 0), Peculiar)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    server.store = store_on(f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_an_answer_that_is_cut_short_is_asked_for_again(peculiar):
    peculiar.answers = [(200, "video/mp4", b"clip", 2), (200, "video/mp4", b"clip", 4)]
    assert peculiar.store.get(MISSING) == b"clip"
    peculiar.answers = [(200, "video/mp4", b"clip", 2)] * 2
    with pytest.raises(StoreError, match=r"the connection breaks$"):
        peculiar.store.get(MISSING)


def test_an_answer_that_is_not_s3(peculiar):
    peculiar.answers = [(404, "text/html", b"<html>secret page</html>", 99)]
    with pytest.raises(StoreError, match=r"it answers something that is not S3$"):
        peculiar.store.get(MISSING)


def test_a_server_in_trouble_is_asked_four_times(peculiar):
    peculiar.answers = [(503, "text/plain", b"busy", 4)] * 3 + [(200, "video/mp4", b"clip", 4)]
    assert peculiar.store.get(MISSING) == b"clip"
    peculiar.answers = [(503, "text/plain", b"busy", 4)] * 9
    with pytest.raises(StoreError, match=r"it fails, or the connection breaks$"):
        peculiar.store.get(MISSING)
    assert len(peculiar.answers) == 5


def test_a_server_that_hangs(monkeypatch):
    monkeypatch.setattr(connection, "HTTP_TIMEOUT", urllib3.Timeout(connect=1, read=0.2))
    with socket.create_server(("127.0.0.1", 0)) as deaf, pytest.raises(StoreError, match=r"no answer in time$"):
        store_on(f"http://127.0.0.1:{deaf.getsockname()[1]}").get(MISSING)


@pytest.mark.parametrize("address", [
    "", "minio:9000", "ftp://minio:9000", "http://", "http://me:hunter2@minio:9000", "http://minio:9000/path",
    "http://minio:9000?x=1",
])  # fmt: skip
def test_addresses_that_cannot_be_used(address):
    for given in ({"address": address}, {"address": "http://minio:9000", "public_address": address or "x"}):
        with pytest.raises(InvalidInput, match=r"^S3 address: http://host:port") as caught:
            S3ObjectStore(bucket="clips", access_key="a", secret_key="b", **given)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("bucket", ["", "ab", "Clips", "a/b", "x" * 64, "-clips"])
def test_buckets_that_cannot_be_used(bucket):
    with pytest.raises(InvalidInput, match=r"^S3 bucket: 3 to 63"):
        S3ObjectStore("http://minio:9000", bucket, "a", "b")


# Downloads.


def download(address: str) -> tuple[bytes, str]:
    with urllib.request.urlopen(address, timeout=10) as response:
        return response.read(), response.headers["Content-Type"]


def test_a_signed_address_downloads_with_its_type_until_it_expires(s3):
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


def test_signed_addresses_name_the_public_server(server):
    store = store_on(server.address, public_address=f"http://localhost:{server.port}")
    address = store.presign_url(store.put(b"a clip", "mp4"), 60)
    assert address.startswith(f"http://localhost:{server.port}/")
    assert download(address)[0] == b"a clip"
    down = store_on("http://127.0.0.1:9", public_address="https://media.example.org")
    assert down.presign_url(MISSING, 7 * 86_400).startswith("https://media.example.org/")  # no server is asked


@pytest.mark.parametrize("seconds", [0, -5, 7 * 86_400 + 1])
def test_a_signed_address_lives_a_second_to_a_week(s3, seconds):
    with pytest.raises(InvalidInput, match=r"^seconds: 1 to 604800"):
        s3.presign_url(MISSING, seconds)


def test_parts(s3):
    key = s3.put(bytes(range(100)), "mp4")
    assert s3.get_size(key) == 100
    assert s3.read_range(key, 0, 0) == b"\0" and s3.read_range(key, 10, 19) == bytes(range(10, 20))
    assert s3.read_range(key, 90, 1000) == bytes(range(90, 100)) and s3.read_range(key, 0, 99) == s3.get(key)
    for first, last in ((100, 101), (-1, 3), (5, 4)):
        with pytest.raises(InvalidInput, match=r"^range: "):
            s3.read_range(key, first, last)
    for ask in (s3.get_size, lambda key: s3.read_range(key, 0, 1)):
        with pytest.raises(ArtifactNotFound):
            ask(MISSING)


# Large files.

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


def test_a_large_file_is_put_without_being_held(server, tmp_path):
    path, digest = tmp_path / "large.mp4", hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(64):
            piece = os.urandom(1 << 20)
            digest.update(piece)
            file.write(piece)
    command = [sys.executable, "-c", PUT_FILE, server.address, ACCESS_KEY, SECRET_KEY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    key, grown = done.stdout.split()
    print(f"64 MiB put with {float(grown):.0f} MiB more at the peak")
    assert key == f"{digest.hexdigest()}.mp4"
    assert float(grown) < 40  # two parts of 16 MiB and some
    store = store_on(server.address, "large")
    assert store.get_size(key) == 64 << 20
    again = hashlib.sha256()
    for first in range(0, 64 << 20, 8 << 20):
        again.update(store.read_range(key, first, first + (8 << 20) - 1))
    assert again.hexdigest() == digest.hexdigest()


def test_a_file_that_cannot_be_read(s3, tmp_path):
    with pytest.raises(StoreError, match=r"^store: gone.mp4 cannot be read: No such file or directory$"):
        s3.put_file(tmp_path / "gone.mp4", "mp4")


# Lifetime by the server's own rule, and unfinished uploads.


@pytest.fixture(scope="module")
def imitation(tmp_path_factory):
    with moto_server(tmp_path_factory.mktemp("moto")) as address:
        yield address


def test_a_server_without_lifecycle_rules_says_so(s3):
    for _ in range(2):  # without and with the bucket
        with pytest.raises(StoreError, match=r"it keeps no lifecycle rules; use the sweep$"):
            s3.set_lifecycle_expiration(3)
        s3.put(b"clip", "mp4")


def test_a_lifetime_by_rule_leaves_other_rules(imitation):
    store = store_on(imitation, prefix="clips")
    store.set_lifecycle_expiration(3)
    theirs = minio.lifecycleconfig.Rule(
        minio.commonconfig.ENABLED, minio.commonconfig.Filter(prefix="logs/"), "theirs",
        expiration=minio.lifecycleconfig.Expiration(days=1),
    )  # fmt: skip
    rules = store.client.get_bucket_lifecycle(store.bucket).rules
    store.client.set_bucket_lifecycle(store.bucket, minio.lifecycleconfig.LifecycleConfig([*rules, theirs]))
    store.set_lifecycle_expiration(30)
    rules = {rule.rule_id: rule for rule in store.client.get_bucket_lifecycle(store.bucket).rules}
    assert set(rules) == {"theirs", LIFECYCLE_RULE_ID}
    assert rules[LIFECYCLE_RULE_ID].expiration.days == 30 and rules[LIFECYCLE_RULE_ID].rule_filter.prefix == "clips/"
    assert rules[LIFECYCLE_RULE_ID].abort_incomplete_multipart_upload.days_after_initiation == 1
    for days in (0, 40_000):
        with pytest.raises(InvalidInput, match=r"^days: 1 to 36500"):
            store.set_lifecycle_expiration(days)


def test_unfinished_uploads_end(imitation):
    store = store_on(imitation, prefix="clips")
    assert store.abort_stale_uploads(0) == 0
    store.put(b"clip", "mp4")
    for name in ("clips/ab/left", "elsewhere/left"):
        store.client._create_multipart_upload(store.bucket, name, {})
    assert (
        store.abort_stale_uploads(100 * 366 * DAY_SECONDS) == 0
    )  # younger: perhaps still under way (here all began in 2010)
    assert store.abort_stale_uploads(0) == 1
    assert store.abort_stale_uploads(0) == 0
    left = store.client._list_multipart_uploads(store.bucket).uploads
    assert [upload.object_name for upload in left] == ["elsewhere/left"]


def test_the_contract_on_the_imitation_too(imitation, tmp_path):
    store = store_on(imitation)
    test_bytes_come_back_under_the_digest_of_what_they_are(store)
    test_parts(store)
    path = Path(tmp_path / "large")
    path.write_bytes(os.urandom(34 << 20))
    key = store.put_file(path, "mp4")
    assert store.get(key) == path.read_bytes()
    assert len(store.sweep({key}, 0)) == len(list(store.iter_keys())) + 3

"""Attacks that servers of this kind have seen, each against the routes that take files, media, batches and hooks."""

import json
import pickle
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from omnivideo.backends.webhooks import WebhookSender, check_reachable, parse_webhook_url, send_event
from omnivideo.errors import InvalidInput
from omnivideo.media.fetch import resolve_addresses
from omnivideo.storage.objects.local import LocalObjectStore
from tests.support.openai_service import KEY, ended, http_for, lines, png, runner_for, service_in, told, until

MOST = 2 * 2**20
INSIDE = [
    "127.0.0.1",
    "localhost",
    "[::1]",
    "169.254.169.254",
    "10.0.0.1",
    "[::ffff:127.0.0.1]",
    "2130706433",
    "0x7f.1",
]
LEAK = re.compile(r"0x[0-9a-f]{6,}|Traceback|File \"|/work/|/tmp/|site-packages|sqlalchemy|\.py\b|127\.0\.0\.1")


@pytest.fixture(scope="module")
def service(omni, tmp_path_factory):
    with service_in(tmp_path_factory.mktemp("attacked"), omni, max_upload_bytes=MOST) as made:
        made[1].check_webhook_url = partial(check_reachable, internal_hosts=())
        yield made


@pytest.fixture(scope="module")
def http(service):
    """Looks at each answer: no error tells of our insides, and none is a failure of ours."""

    def looked_at(answer: httpx.Response) -> None:
        if answer.status_code >= 400:
            answer.read()
            assert answer.status_code < 500 and not LEAK.search(answer.text), answer.text

    with http_for(service, event_hooks={"response": [looked_at]}) as http:
        yield http


def refused(answer: httpx.Response, field: str, status: int = 400) -> str:
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, field), answer.text
    return error["message"]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..\\..\\boot.ini", "/etc/passwd", "a/../../b.png", "....//x", "C:\\x\\a.png", ".."]
)
def test_attack_traversal_in_a_file_name(http, rooms, name):
    before = {path for path in rooms.settings.home.parent.rglob("*") if path.is_file()}
    kept = http.post("/v1/files", files={"file": (name, b"text")}, data={"purpose": "user_data"}).json()
    assert not set(kept["filename"]) & set("/\\")
    row = rooms.files.get_file(kept["id"], "admin")
    assert re.fullmatch(r"[0-9a-f]{64}\.bin", row.object_key) and rooms.store.get(row.object_key) == b"text"
    made = {path for path in rooms.settings.home.parent.rglob("*") if path.is_file()} - before
    assert all(path.is_relative_to(rooms.settings.home) for path in made)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "a" * 300, "%00", "a%0d%0ab"])
@pytest.mark.parametrize("where", ["/v1/files/{}/content", "/v1/videos/{}/content", "/v1/images/{}/content"])
def test_attack_traversal_in_an_id(http, where, name):
    assert http.get(where.format(name)).status_code in (400, 404)


@pytest.mark.parametrize(
    "name", ['a"\r\nX-Evil: 1\r\n\r\n<b>', "a\nb", 'a"; filename="b.exe', "ä\u202egnp.exe", "\x00\x1b[2J", ";;"]
)
def test_attack_header_injection_through_a_file_name(http, name):
    files = {"file": (name, b"text")}
    kept = http.post("/v1/files", files=files, data={"purpose": "user_data"}).json()
    assert kept["filename"].isprintable()
    answer = http.get(f"/v1/files/{kept['id']}/content")
    assert answer.content == b"text" and "x-evil" not in answer.headers
    assert re.fullmatch(r"attachment; filename\*=UTF-8''[\w.%~-]+", answer.headers["content-disposition"])


@pytest.mark.parametrize("field", ["filename", "name"])
def test_attack_header_injection_in_a_raw_form(http, field):
    """As no client would write it: line ends inside the form's own headers."""
    head = {"filename": 'name="file"; filename="a\r\nContent-Type: text/html\r\n"', "name": 'name="fi\r\nle"'}[field]
    parts = [f"--b\r\nContent-Disposition: form-data; {head}\r\n\r\ntext\r\n"]
    parts += ['--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n--b--\r\n']
    body = "".join(parts)
    answer = http.post("/v1/files", content=body.encode(), headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status_code in (200, 400)
    if answer.status_code == 200:
        assert (
            http.get(f"/v1/files/{answer.json()['id']}/content").headers["content-type"] == "application/octet-stream"
        )


def test_attack_page_in_an_upload_is_never_shown_as_one(http):
    for name, data in (("a.html", b"<script>alert(1)</script>"), ("a.svg", b"<svg onload='alert(1)'/>")):
        kept = http.post("/v1/files", files={"file": (name, data, "text/html")}, data={"purpose": "user_data"}).json()
        headers = http.get(f"/v1/files/{kept['id']}/content").headers
        assert headers["content-type"] == "application/octet-stream" and headers["x-content-type-options"] == "nosniff"


# ---------------------------------------------------------------- bodies


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "kind", ["application/octet-stream", "application/x-python-pickle", "application/json", "text/plain"]
)
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/images/generations", "/v1/files", "/v1/batches", "/v1/webhooks"])
def test_attack_pickle_as_a_body(http, tmp_path, path, kind):
    trap = tmp_path / "unpickled"
    answer = http.post(path, content=pickle.dumps(Bomb(trap)), headers={"Content-Type": kind})
    assert answer.status_code == (400 if kind == "application/json" else 415)
    assert not trap.exists()


def test_attack_pickle_as_a_file(http, client, rooms, tmp_path):
    trap = tmp_path / "unpickled"
    data = pickle.dumps(Bomb(trap))
    assert "no image or video" in refused(
        http.post("/v1/files", files={"file": data}, data={"purpose": "vision"}), "file"
    )
    kept = http.post("/v1/files", files={"file": ("a.safetensors", data)}, data={"purpose": "batch"}).json()
    asked = {"input_file_id": kept["id"], "endpoint": "/v1/videos", "completion_window": "24h"}
    batch = client.batches.create(**asked)
    runner = runner_for(rooms).start()
    try:
        assert ended(client, batch, "failed").errors.data[0].message == "line: it is not valid JSON"
    finally:
        runner.stop()
    reference = {"prompt": "a", "input_reference": {"file_id": kept["id"]}}
    refused(http.post("/v1/videos", json=reference), "input_reference.file_id")
    assert not trap.exists()


@pytest.mark.parametrize(
    "body",
    [b'{"prompt":' + b"[" * 200_000, b"[" * 200_000, b'{"a":' * 200_000, b'{"prompt": NaN}', b"\xff\xfe", b"",
     b"null", b'"' + b"a" * 100_000, b"1" * 10_000],
    ids=range(9),
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/batches"])
def test_attack_json_without_end_or_sense(http, path, body):
    refused(http.post(path, content=body, headers={"Content-Type": "application/json"}), "body")


def test_attack_numbers_without_end(http):
    number = "1" * 4000
    for field in ("num_frames", "fps", "seed", "num_inference_steps"):
        body = f'{{"prompt": "a", "{field}": {number}}}'
        refused(http.post("/v1/videos", content=body, headers={"Content-Type": "application/json"}), field)


def raw(service, head: str, pieces, most: int) -> tuple[bytes, int]:
    """Sends pieces until the server says something or has taken `most` bytes; the answer, and what it took."""
    host, port = service[2].removeprefix("http://").split(":")
    sent = 0
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(f"POST {head}\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode())
        line.sendall(b"Content-Type: multipart/form-data; boundary=b\r\n")
        try:
            for piece in pieces:
                line.sendall(piece)
                sent += len(piece)
                line.setblocking(False)
                try:
                    if line.recv(1, socket.MSG_PEEK):
                        break
                except BlockingIOError:
                    pass
                line.setblocking(True)
                assert sent < most, "it reads on and on"
        except (BrokenPipeError, ConnectionResetError):
            pass
        line.settimeout(20)
        try:
            return line.recv(65536), sent
        except ConnectionResetError:
            return b"", sent


HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


def test_attack_body_above_the_cap_with_its_length(service):
    """Refused by the length alone: of the body only what was on its way is taken."""
    answer, sent = raw(service, "/v1/files HTTP/1.1", iter([b"Content-Length: 99999999999\r\n\r\n", HEAD]), 2 * MOST)
    assert answer.startswith(b"HTTP/1.1 413") and sent < 1000


@pytest.mark.parametrize("path", ["/v1/files", "/v1/videos", "/v1/images/edits"])
def test_attack_body_above_the_cap_without_its_length(service, path):
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"

    def pieces():
        yield b"Transfer-Encoding: chunked\r\n\r\n"
        yield f"{len(HEAD):x}\r\n".encode() + HEAD + b"\r\n"
        while True:
            yield chunk

    answer, sent = raw(service, f"{path} HTTP/1.1", pieces(), 64 * 2**20)
    assert answer.startswith(b"HTTP/1.1 413") or not answer
    assert sent < 32 * 2**20  # what the sockets between us hold, too


def test_attack_body_of_a_stranger_is_not_read(service, monkeypatch):
    """The key is looked at first."""
    read = []
    monkeypatch.setattr("starlette.requests.Request.form", lambda *rest, **more: read.append(rest))
    with httpx.Client(base_url=service[2], trust_env=False) as http:
        assert http.post("/v1/files", files={"file": b"x" * 10**6}).status_code == 401
    assert not read


def test_attack_form_of_many_parts(http):
    many = [("file", (f"{at}", b"x")) for at in range(50)]
    assert http.post("/v1/files", files=many, data={"purpose": "vision"}).status_code == 400
    fields = {f"field{at}": "x" for at in range(5000)}
    assert http.post("/v1/videos", data=fields, files={"a": b"b"}).status_code == 400


# ---------------------------------------------------------------- what cannot be afforded


@pytest.mark.parametrize(
    ("path", "given", "field"),
    [
        ("videos", {"num_frames": 100_001}, "num_frames"),
        ("videos", {"num_frames": 241, "size": "1280x720"}, "size"),
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
def test_attack_uncapped(http, rooms, path, given, field):
    refused(http.post(f"/v1/{path}", json={"prompt": "a"} | given), field)
    assert rooms.jobs.count_queued() == 0


def test_attack_uncapped_in_a_form_and_in_a_batch(http, client, rooms):
    asked = {"prompt": "a", "num_frames": "99999", "num_inference_steps": "99999"}
    refused(http.post("/v1/videos", data=asked, files={"x": b""}), "num_inference_steps")
    data = lines(1, num_frames=99_997, num_inference_steps=1)
    file = client.files.create(file=("a.jsonl", data), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")
    runner = runner_for(rooms).start()
    try:
        (line,) = told(client, ended(client, batch).error_file_id)
    finally:
        runner.stop()
    assert line["response"]["body"]["error"]["param"] == "num_frames"


def bomb() -> bytes:
    """A png of 30,000 x 30,000 px in a hundred kilobytes or so."""
    side = 30_000
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8 * 100)) for _ in range(side // 100)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_attack_decompression_bomb(http):
    """Refused by its header, wherever it comes in."""
    data, began = bomb(), time.monotonic()
    assert len(data) < 300_000
    said = refused(http.post("/v1/files", files={"file": ("a.png", data)}, data={"purpose": "vision"}), "file")
    assert "pixels" in said
    form = {"prompt": "a"}
    assert "pixels" in refused(http.post("/v1/videos", files={"input_reference": data}, data=form), "input_reference")
    assert "pixels" in refused(http.post("/v1/images/edits", files={"image": data}, data=form), "image")
    kept = http.post("/v1/files", files={"file": ("a.png", data)}, data={"purpose": "user_data"}).json()
    refused(
        http.post("/v1/videos", json=form | {"input_reference": {"file_id": kept["id"]}}), "input_reference.file_id"
    )
    assert time.monotonic() - began < 20


# ---------------------------------------------------------------- addresses that are not the user's business


class Inner(BaseHTTPRequestHandler):
    """A service inside, which notes who calls."""

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        self.wfile.write(png())

    do_POST = do_GET

    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def inner():
    served = ThreadingHTTPServer(("127.0.0.1", 0), Inner)
    served.daemon_threads, served.block_on_close, served.seen = True, False, []
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


@pytest.mark.parametrize("host", INSIDE)
def test_attack_ssrf_through_an_input_reference(http, inner, host):
    url = f"http://{host}:{inner.server_address[1]}/a.png"
    body = {"prompt": "a", "input_reference": {"image_url": url}}
    refused(http.post("/v1/videos", json=body), "input_reference.image_url")
    refused(http.post("/v1/images/edits", json={"prompt": "a", "image": {"image_url": url}}), "image.image_url")
    assert not inner.seen


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://x/a.png", "/etc/passwd", "data:text/html;base64,AAAA", "http:a"]
)
def test_attack_url_that_is_none(http, url):
    said = refused(
        http.post("/v1/videos", json={"prompt": "a", "input_reference": {"image_url": url}}),
        "input_reference.image_url",
    )
    assert "root:" not in said


def test_attack_ssrf_through_batch_lines(client, rooms, inner):
    urls = [f"http://{host}:{inner.server_address[1]}/a.png" for host in INSIDE] + ["file:///etc/passwd"]
    data = b"".join(
        lines(1, input_reference={"image_url": url}).replace(b"line 0", str(at).encode()) for at, url in enumerate(urls)
    )
    file = client.files.create(file=("a.jsonl", data), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")
    runner = runner_for(rooms).start()
    try:
        done = ended(client, batch)
    finally:
        runner.stop()
    bad = told(client, done.error_file_id)
    assert len(bad) == len(urls) and not done.output_file_id and not inner.seen
    for line in bad:
        error = line["response"]["body"]["error"]
        assert error["param"] == "input_reference.image_url" and not LEAK.search(json.dumps(error))


def test_attack_batch_line_with_a_url_of_its_own(client, rooms, inner):
    where = f"http://127.0.0.1:{inner.server_address[1]}/v1/videos"
    file = client.files.create(file=("a.jsonl", lines(1, where)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")
    runner = runner_for(rooms).start()
    try:
        failed = ended(client, batch, "failed")
    finally:
        runner.stop()
    assert failed.errors.data[0].param == "url" and not inner.seen


@pytest.mark.parametrize("host", INSIDE)
@pytest.mark.parametrize("port", ["", "inner"])
def test_attack_ssrf_through_a_webhooks_url(http, inner, host, port):
    url = f"http://{host}{':' + str(inner.server_address[1]) if port else ''}/"
    refused(http.post("/v1/webhooks", json={"url": url}), "url")
    assert not inner.seen


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "gopher://1.1.1.1/", "https://u:p@1.1.1.1/", "https://1.1.1.1:22/", "https://1.1.1.1\\@x/",
     "https://[1.1.1.1/", "https://1.1.1.1/a b", "https://1.1.1.1/\r\nX: y", "//1.1.1.1", "https://", "https://ä.test/"],
)  # fmt: skip
def test_attack_webhook_url_of_another_kind(http, url):
    refused(http.post("/v1/webhooks", json={"url": url}), "url")


def test_attack_webhook_name_that_turns_inside_later(rooms, inner, monkeypatch):
    """A name that was public when the hook was made: each call looks again, and calls what it has looked at."""
    answers = iter([["1.1.1.1"], ["127.0.0.1"]])
    monkeypatch.setattr("omnivideo.backends.webhooks.resolve_addresses", lambda host: next(answers))
    check_reachable("http://hook.test/")
    with pytest.raises(Exception, match=r"^$"):
        send_event("http://hook.test/", "whsec_AAAA", "evt_1", {"a": 1}, ())
    assert not inner.seen and parse_webhook_url("http://hook.test/", ())[1] == "hook.test"
    with pytest.raises(InvalidInput):
        send_event(f"http://hook.test:{inner.server_address[1]}/", "whsec_AAAA", "evt_1", {"a": 1}, ())


def test_attack_redirect_of_a_webhook_to_the_inside(rooms, inner):
    """What a hook answers is not followed, and not even read."""
    port = inner.server_address[1]

    class Sends(Inner):
        def do_POST(self) -> None:
            self.send_response(307)
            self.send_header("Location", f"http://127.0.0.1:{port}/")
            self.end_headers()

    served = ThreadingHTTPServer(("127.0.0.1", 0), Sends)
    served.daemon_threads, served.block_on_close = True, False
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        url = f"http://localhost:{served.server_address[1]}/"
        assert send_event(url, "whsec_AAAA", "evt_1", {"a": 1}, ("localhost",)) == 307
    finally:
        served.shutdown()
        thread.join()
        served.server_close()
    assert not inner.seen


def test_attack_webhook_that_answers_never(rooms, monkeypatch):
    monkeypatch.setattr("omnivideo.backends.webhooks.DELIVERY_TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(Exception, match=r"^$|timed out"):
            send_event(f"http://localhost:{silent.getsockname()[1]}/", "whsec_AAAA", "evt_1", {}, ("localhost",))
        assert time.monotonic() - began < 3
    assert resolve_addresses("localhost")


# ---------------------------------------------------------------- what errors tell


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/images/generations", "/v1/files"])
def test_attack_traceback_in_an_answer(service, monkeypatch, path):
    """A failure of ours tells a request id, and nothing else."""
    where = f"at {object()!r} in {Path(__file__).resolve()}"

    def broken(*given, **more):
        raise ZeroDivisionError(where)

    monkeypatch.setattr(service[1].jobs, "submit", broken)
    monkeypatch.setattr(service[1].files, "create_file", broken)
    given = {"Authorization": f"Bearer {KEY}"}
    form = (
        {"files": {"file": b"x"}, "data": {"purpose": "user_data"}}
        if path == "/v1/files"
        else {"json": {"prompt": "a"}}
    )
    with httpx.Client(base_url=service[2], headers=given, trust_env=False) as http:
        answer = http.post(path, **form)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal"
    assert not LEAK.search(answer.text) and answer.headers["x-request-id"]


def test_attack_traceback_in_a_job_and_in_a_batch(service, client, http, rooms, monkeypatch):
    def broken(job):
        raise ZeroDivisionError(f"at {object()!r} in {Path(__file__).resolve()}")

    file = client.files.create(file=("a.jsonl", lines(1)), purpose="batch")
    runner = runner_for(rooms).start()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(service[0].worker.renderer, "prepare_job", broken)
            video = http.post("/v1/videos", json={"prompt": "a"}).json()["id"]
            batch = client.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")
            (line,) = told(client, ended(client, batch).error_file_id)
            failed = until(lambda: (now := http.get(f"/v1/videos/{video}")).json()["status"] == "failed" and now)
    finally:
        runner.stop()
    assert failed.json()["error"]["code"] == "internal" and not LEAK.search(failed.text)
    assert line["response"]["body"]["error"]["code"] == "internal" and not LEAK.search(json.dumps(line))


def test_attack_key_of_the_store_is_no_way_to_others_files(http, rooms):
    """A digest that somebody knows opens nothing: only ids do, and only their owner's."""
    key = rooms.store.put(b"secret", "bin")
    assert isinstance(rooms.store, LocalObjectStore)
    for path in (f"/v1/files/{key}/content", f"/v1/videos/{key}/content"):
        assert http.get(path).status_code == 404
    refused(
        http.post("/v1/videos", json={"prompt": "a", "input_reference": {"file_id": key}}), "input_reference.file_id"
    )


def test_the_routes_and_their_threads_need_no_torch():
    """An API process is small."""
    program = """
import sys
from omnivideo.api import generation, request_body
from omnivideo.api.routes import batches, files, images, videos, webhooks
from omnivideo.backends import webhooks
from omnivideo.backends.batches import runner
from omnivideo.media import thumbnails
from omnivideo.storage.database import batches, files, webhooks
print(sorted({"torch", "diffusers", "transformers", "celery"} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "[]"


def test_signatures_are_the_standards():
    """The example of standardwebhooks.com's specification."""
    from omnivideo.backends.webhooks import sign_event

    body = b'{"test": 2432232314}'
    made = sign_event("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_sender_lives_on_after_trouble(rooms):
    sender = WebhookSender(rooms.webhooks, rooms.jobs, poll_seconds=0.01)
    told_of = []
    sender.jobs = type("Broken", (), {"list_unannounced_jobs": lambda *rest: told_of.append(1) or 1 / 0})()
    sender.start()
    until(lambda: len(told_of) > 2)
    sender.stop()

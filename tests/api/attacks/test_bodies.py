"""Attacks through bodies: pickles, unterminated JSON, and bodies above the limits."""

import pickle
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from omnivideo.contracts import RequestModel
from omnivideo.validation import find_models
from tests.support.attacks import MAX_UPLOAD_BYTES, assert_refused
from tests.support.openai_service import KEY, make_runner, wait_for_batch


class Bomb:
    """Create a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "kind", ["application/octet-stream", "application/x-python-pickle", "application/json", "text/plain"]
)
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/images/generations", "/v1/files", "/v1/batches", "/v1/webhooks"])
def test_pickle_as_a_body(http, tmp_path, path, kind):
    trap = tmp_path / "unpickled"
    answer = http.post(path, content=pickle.dumps(Bomb(trap)), headers={"Content-Type": kind})
    assert answer.status_code == (400 if kind == "application/json" else 415)
    assert not trap.exists()


def test_pickle_as_a_file(http, client, context, tmp_path):
    trap = tmp_path / "unpickled"
    data = pickle.dumps(Bomb(trap))
    assert "not an image or video" in assert_refused(
        http.post("/v1/files", files={"file": data}, data={"purpose": "vision"}), "file"
    )
    stored = http.post("/v1/files", files={"file": ("a.safetensors", data)}, data={"purpose": "batch"}).json()
    batch = client.batches.create(input_file_id=stored["id"], endpoint="/v1/videos", completion_window="24h")
    runner = make_runner(context).start()
    try:
        assert wait_for_batch(client, batch, "failed").errors.data[0].message == "line: it is not valid JSON"
    finally:
        runner.stop()
    reference = {"prompt": "a", "input_reference": {"file_id": stored["id"]}}
    assert_refused(http.post("/v1/videos", json=reference), "input_reference.file_id")
    assert not trap.exists()


@pytest.mark.parametrize(
    "body",
    [b'{"prompt":' + b"[" * 200_000, b"[" * 200_000, b'{"a":' * 200_000, b'{"prompt": NaN}', b"\xff\xfe", b"",
     b"null", b'"' + b"a" * 100_000, b"1" * 10_000],
    ids=range(9),
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/batches"])
def test_malformed_and_deeply_nested_json(http, path, body):
    assert_refused(http.post(path, content=body, headers={"Content-Type": "application/json"}), "body")


def test_numbers_with_thousands_of_digits(http):
    number = "1" * 4000
    for field in ("num_frames", "fps", "seed", "num_inference_steps"):
        body = f'{{"prompt": "a", "{field}": {number}}}'
        assert_refused(http.post("/v1/videos", content=body, headers={"Content-Type": "application/json"}), field)


def send_raw(service, head: str, pieces, max_bytes: int) -> tuple[bytes, int]:
    """Send pieces until the server answers; return the answer and the number of bytes sent, at most `max_bytes`."""
    host, port = service[2].removeprefix("http://").split(":")
    sent = 0
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"POST {head}\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode())
        connection.sendall(b"Content-Type: multipart/form-data; boundary=b\r\n")
        try:
            for piece in pieces:
                connection.sendall(piece)
                sent += len(piece)
                connection.setblocking(False)
                try:
                    if connection.recv(1, socket.MSG_PEEK):
                        break
                except BlockingIOError:
                    pass
                connection.setblocking(True)
                assert sent < max_bytes, "the server does not stop reading"
        except (BrokenPipeError, ConnectionResetError):
            pass
        connection.settimeout(20)
        try:
            return connection.recv(65536), sent
        except ConnectionResetError:
            return b"", sent


HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


def test_body_above_the_limit_with_its_length(service):
    """The body is refused by its length, without reading it."""
    answer, sent = send_raw(
        service, "/v1/files HTTP/1.1", iter([b"Content-Length: 99999999999\r\n\r\n", HEAD]), 2 * MAX_UPLOAD_BYTES
    )
    assert answer.startswith(b"HTTP/1.1 413") and sent < 1000


@pytest.mark.parametrize("path", ["/v1/files", "/v1/videos", "/v1/images/edits"])
def test_body_above_the_limit_without_its_length(service, path):
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"

    def pieces():
        yield b"Transfer-Encoding: chunked\r\n\r\n"
        yield f"{len(HEAD):x}\r\n".encode() + HEAD + b"\r\n"
        while True:
            yield chunk

    answer, sent = send_raw(service, f"{path} HTTP/1.1", pieces(), 64 * 2**20)
    assert answer.startswith(b"HTTP/1.1 413") or not answer
    assert sent < 32 * 2**20  # including what the sockets buffer


def test_body_without_an_api_key_is_not_read(service, monkeypatch):
    """The API key is checked first."""
    forms_read = []
    monkeypatch.setattr("starlette.requests.Request.form", lambda *arguments, **options: forms_read.append(arguments))
    with httpx.Client(base_url=service[2], trust_env=False) as http:
        assert http.post("/v1/files", files={"file": b"x" * 10**6}).status_code == 401
    assert not forms_read


def test_form_of_many_parts(http):
    files = [("file", (f"{index}", b"x")) for index in range(50)]
    assert http.post("/v1/files", files=files, data={"purpose": "vision"}).status_code == 400
    fields = {f"field{index}": "x" for index in range(5000)}
    assert http.post("/v1/videos", data=fields, files={"a": b"b"}).status_code == 400


# ---------------------------------------------------------------- JSON


def measure_slowest_health(service, stop: threading.Event) -> float:
    """Return the longest time that `/health` took until `stop` is set."""
    slowest = 0.0
    with httpx.Client(base_url=service[2], trust_env=False, timeout=60) as http:
        while not stop.is_set():
            started_at = time.monotonic()
            assert http.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - started_at)
            time.sleep(0.01)
    return slowest


@pytest.mark.parametrize("key", ["", KEY])
def test_a_large_body_of_arrays_delays_nobody(service, key):
    """Its 30 MB took 13 to 27 s in the event loop, without a key."""
    body = b'{"messages": [' + b"[]," * 10_000_000 + b"[]]}"
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        health = pool.submit(measure_slowest_health, service, stop)
        try:
            with httpx.Client(base_url=service[2], trust_env=False, timeout=60) as http:
                headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
                answer = http.post("/v1/chat/completions", content=body, headers=headers)
                assert answer.status_code == (413 if key else 401)
        except httpx.TransportError:  # the service has answered, and closed the connection before the end of the body
            pass
        finally:
            stop.set()
        assert health.result() < 1.0


def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(http):
    body = b'{"messages": [' + b"[]," * 150_000 + b"[]]}"
    for path in ("/v1/chat/completions", "/v1/videos"):
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert "too many values" in assert_refused(answer, "body")


@pytest.mark.parametrize("path", ["/v1/threads", "/v1/webhooks", "/v1/batches", "/v1/threads/none/forks"])
def test_json_without_media_is_small(http, path):
    def send_chunks() -> Iterator[bytes]:
        yield b'{"id": "'
        for _ in range(24):
            yield b"x" * 2**16
        yield b'"}'

    for content in (send_chunks(), b'{"id": "' + b"x" * (3 * 2**19) + b'"}'):  # without and with its length
        answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert assert_refused(answer, "body", 413).startswith(f"the body is larger than {2**20} bytes")


def list_request_models(model: type = RequestModel) -> set[type[RequestModel]]:
    children = {child for child in model.__subclasses__() if child.__module__.startswith("omnivideo.")}
    return children.union(*map(list_request_models, children))


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_no_field_of_a_request_accepts_characters_that_cannot_be_stored(service, text):
    """The kind of fault: every field of every request that accepts text refuses them."""
    assert len(list_request_models()) > 15
    for model in list_request_models():
        for field_name, field in model.model_fields.items():
            name = field.alias or field_name
            # What a nested request does not define is ignored; its own fields are checked as those of a model.
            nested = [] if list(find_models(field.annotation)) else [{"a": text}, {"a": [{"b": text}]}]
            for value in (text, [text], *nested):
                with pytest.raises(ValidationError) as raised:
                    model.model_validate({name: value})
                assert any(error["loc"][0] == name for error in raised.value.errors()), (model, name)


@pytest.mark.parametrize("value", ["%00", "a%00b", "%ED%A0%80", "a%0Ab", "x" * 300])
def test_no_parameter_of_a_route_accepts_such_characters(service, http, value):
    """The kind of fault: every text in a path, in a query and in a header of every route."""
    checked = 0
    for path, operations in http.get("/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            for parameter in operation.get("parameters", []):
                schemas = parameter["schema"].get("anyOf", [parameter["schema"]])
                if parameter["in"] == "header" or not any("pattern" in schema for schema in schemas):
                    assert parameter["name"] not in ("name", "turn", "key", "after", "artifact"), (path, parameter)
                    continue
                checked += 1
                target = re.sub(r"\{(\w+)\}", lambda found: value if found[1] == parameter["name"] else "none", path)  # noqa: B023
                query = f"?{parameter['name']}={value}" if parameter["in"] == "query" else ""
                answer = http.request(method, target + query, headers={"Content-Type": "application/json"})
                assert answer.status_code == 400, (method, target, query, answer.text)
    assert checked > 25

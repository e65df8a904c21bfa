"""Whose ids are whose, what a revoked key and a deletion stop, and what pages of other sites may do."""

import http.client
import io
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import Engine, event

from omnivideo.api import app as application
from omnivideo.api.routes import operations
from omnivideo.storage.database.keys import APIKeyRepository
from omnivideo.storage.database.schema import jobs, turns
from tests.support.api_server import build_scripted_wiring, run_api_server
from tests.support.openai_service import KEY, make_http_client, pause_worker, run_service, wait_until


@pytest.fixture(scope="module")
def keys(context) -> APIKeyRepository:
    return APIKeyRepository(context.jobs.engine, KEY)


@contextmanager
def connect(service, key: str) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=service[2], headers={"Authorization": f"Bearer {key}"}, timeout=60, trust_env=False
    ) as client:
        yield client


@pytest.fixture
def ann(service, keys) -> Iterator[httpx.Client]:
    key_id, key = keys.create_key("ann")
    with connect(service, key) as client:
        client.key_id = key_id  # type: ignore[attr-defined]
        yield client


@pytest.fixture
def bob(service, keys) -> Iterator[httpx.Client]:
    with connect(service, keys.create_key("bob")[1]) as client:
        yield client


def start_long_turn(client: httpx.Client, thread_id: str) -> str:
    response = client.post(f"/v1/threads/{thread_id}/turns", json={"text": "a red ball", "steps": 200})
    assert response.status_code == 202, response.text
    return f"/v1/threads/{thread_id}/turns/{response.json()['id']}"


# ---------------------------------------------------------------- ids


def test_an_id_means_a_thread_of_its_owner_only(ann, bob):
    texts = ((ann, "a red ball"), (bob, "a green star"))
    for client, text in texts:
        assert client.post("/v1/threads", json={"id": "mine"}).json()["id"] == "mine"
        turn = client.post("/v1/threads/mine/turns", json={"text": text, "steps": 2}).json()
        assert turn["thread_id"] == "mine"
        path = f"/v1/threads/mine/turns/{turn['id']}"
        wait_until(lambda client=client, path=path: client.get(path).json()["state"] == "done")
    for client, text in texts:
        assert [turn["text"] for turn in client.get("/v1/threads/mine").json()["turns"]] == [text]
        assert [item["id"] for item in client.get("/v1/threads").json()["data"]] == ["mine"]
    refused = ann.post("/v1/threads", json={"id": "mine"})
    assert refused.status_code == 400 and "you have a thread with that id" in refused.text
    assert ann.delete("/v1/threads/mine").status_code == 200
    assert ann.get("/v1/threads/mine").status_code == 404
    assert ann.post("/v1/threads", json={"id": "mine"}).status_code == 201, "the id is free again"
    assert ann.get("/v1/threads/mine").json()["turns"] == []
    assert len(bob.get("/v1/threads/mine").json()["turns"]) == 1


def test_the_id_of_a_chat_on_the_command_line_means_nothing_over_http(ann, context):
    thread = context.conversations.open_thread("my-chat", create=True)
    list(thread.send("a red ball", steps=2))
    assert ann.get("/v1/threads/my-chat").status_code == 404
    assert ann.post("/v1/threads", json={"id": "my-chat"}).status_code == 201
    assert ann.get("/v1/threads/my-chat").json()["turns"] == []
    assert len(thread.get_turns()) == 1


# ---------------------------------------------------------------- revoked keys and deleted threads


def test_a_stream_ends_once_its_key_is_revoked(ann, keys, context, monkeypatch):
    monkeypatch.setattr(application, "ACCESS_CHECK_SECONDS", 0.1)
    thread_id = ann.post("/v1/threads").json()["id"]
    path = start_long_turn(ann, thread_id)
    with ann.stream("GET", f"{path}/events") as stream:
        lines = stream.iter_lines()
        for line in lines:
            if '"kind": "step"' in line:
                break
        keys.update_key(ann.key_id, revoked=True)
        revoked_at, rest = time.monotonic(), list(lines)
    assert time.monotonic() - revoked_at < 5 and not any('"kind": "done"' in line for line in rest)
    assert ann.get(path).status_code == 401
    turn = context.turns.get_turn(path.rpartition("/")[2], ann.key_id)
    assert turn.state == "running", "what was begun with the key is completed"
    context.turn_runner.cancel_turn(turn)  # it would keep the next test waiting


def test_a_signed_link_ends_with_its_key(ann, keys, service):
    body = {"prompt": "a", "size": "32x32", "num_inference_steps": 1, "response_format": "url"}
    url = ann.post("/v1/images/generations", json=body).json()["data"][0]["url"]
    assert "signature=" in url and httpx.get(url, trust_env=False).status_code == 200
    keys.update_key(ann.key_id, revoked=True)
    refused = httpx.get(url, trust_env=False)
    assert refused.status_code == 403 and refused.json()["error"]["param"] == "owner"


def test_a_deletion_stops_what_runs_in_the_thread(ann, keys):
    thread_id = ann.post("/v1/threads").json()["id"]
    path = start_long_turn(ann, thread_id)
    turn_id = path.rpartition("/")[2]
    with ann.stream("GET", f"{path}/events") as stream:
        lines = stream.iter_lines()
        next(line for line in lines if '"kind": "step"' in line)
        assert ann.delete(f"/v1/threads/{thread_id}").status_code == 200
        list(lines)
    for table, condition in ((turns, turns.c.id == turn_id), (jobs, jobs.c.turn_id == turn_id)):
        row = wait_until(lambda table=table, condition=condition: keys.fetch_one(table.select().where(condition)), 5)
        assert row.state == "cancelled"
    assert ann.get(f"{path}/events").status_code == 404


def test_images_and_batches_can_be_deleted(ann, bob, service):
    image = ann.post("/v1/images/generations", json={"prompt": "a", "size": "32x32", "num_inference_steps": 1}).json()
    path = f"/v1/images/{image['id']}"
    assert bob.delete(path).status_code == 404 and ann.delete(path).json()["object"] == "image.deleted"
    assert ann.get(f"{path}/content").status_code == 404 and ann.delete(path).status_code == 404
    file = ann.post("/v1/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": "batch"}).json()
    fields = {"input_file_id": file["id"], "endpoint": "/v1/videos", "completion_window": "24h"}
    path = f"/v1/batches/{ann.post('/v1/batches', json=fields).json()['id']}"
    assert bob.delete(path).status_code == 404 and ann.delete(path).json()["object"] == "batch.deleted"
    assert ann.get(path).status_code == 404 and ann.get("/v1/batches").json()["data"] == []


# ---------------------------------------------------------------- pages of other sites


@pytest.fixture(scope="module")
def open_address(omni, tmp_path_factory) -> Iterator[str]:
    """Yield the address of a service that requires no keys."""
    folder = tmp_path_factory.mktemp("open")
    settings = {"allowed_hosts": ("studio.test",), "cors_origins": ("https://page.test",)}
    with run_api_server(build_scripted_wiring(folder, omni, **settings)) as address:
        yield address


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {}, 200),
        ("GET", {"Host": "localhost:1"}, 200),
        ("GET", {"Host": "[::1]:8000"}, 200),
        ("GET", {"Host": "Studio.test."}, 200),
        ("GET", {"Host": "evil.test"}, 403),
        ("GET", {"Host": "127.0.0.1.evil.test"}, 403),
        ("GET", {"Host": "localhost:1@evil.test"}, 403),
        ("GET", {"Host": ""}, 403),
        ("GET", {"Origin": "https://evil.test"}, 200),  # a browser does not show it the answer
        ("POST", {}, 201),
        ("POST", {"Origin": "SAME"}, 201),
        ("POST", {"Origin": "https://page.test"}, 201),
        ("POST", {"Origin": "https://evil.test"}, 403),
        ("POST", {"Origin": "null"}, 403),
        ("POST", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("POST", {"Sec-Fetch-Site": "same-origin"}, 201),
        ("POST", {"Host": "evil.test", "Origin": "http://evil.test"}, 403),
        ("DELETE", {"Origin": "https://evil.test"}, 403),
    ],
)
def test_pages_of_other_sites_may_change_nothing(open_address, method, headers, status):
    headers = {name: open_address if value == "SAME" else value for name, value in headers.items()}
    path = "/v1/threads/unknown" if method == "DELETE" else "/v1/threads"
    with httpx.Client(base_url=open_address, trust_env=False) as client:
        response = client.request(method, path, headers=headers)
    assert response.status_code == status, response.text
    if status == 403:
        assert response.json()["error"]["param"] in ("Host", "Origin")


def test_a_key_allows_every_host_and_origin(http):
    headers = {"Host": "video.example.com", "Origin": "https://page.example.com"}
    assert http.post("/v1/threads", headers=headers).status_code == 201


# ---------------------------------------------------------------- metrics, wrong bytes, readiness


def test_invented_methods_are_one_label(service, http, caplog):
    with caplog.at_level("INFO", logger="omnivideo.api"), closing(http_connection(service)) as connection:
        for number in range(30):
            connection.request(f"FETCH{number}", "/v1/threads", headers=dict(http.headers))
            connection.getresponse().read()
    metrics = http.get("/metrics").text
    assert 'method="other"' in metrics and "FETCH" not in metrics and "FETCH" not in caplog.text


def http_connection(service) -> http.client.HTTPConnection:
    parts = urlsplit(service[2])
    return http.client.HTTPConnection(parts.hostname, parts.port)


def upload(client: httpx.Client, data: bytes) -> str:
    files = {"file": ("a.bin", io.BytesIO(data))}
    return client.post("/v1/files", files=files, data={"purpose": "user_data"}).json()["id"]


def flip_byte(context, file_id: str, position: int) -> None:
    """Change a byte of a stored file."""
    file = context.files.get_file(file_id, "admin")
    path = context.store.store.path_for_key(file.object_key)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_wrong_bytes_are_not_served(http, context):
    small, large = upload(http, b"small" * 100), upload(http, bytes(3 * 2**20))
    flip_byte(context, small, 7)
    flip_byte(context, large, 2**21)
    for headers in ({}, {"Range": "bytes=0-3"}):
        answer = http.get(f"/v1/files/{small}/content", headers=headers)
        assert answer.status_code == 503 and "other bytes than were stored" in answer.text
    with pytest.raises(httpx.RemoteProtocolError):
        http.get(f"/v1/files/{large}/content")
    route = 'method="GET",route="/v1/files/{file_id}/content",status="500"'
    assert route in http.get("/metrics").text, "an error during a response is in the metrics"


def test_a_service_that_cannot_write_is_not_ready(omni, tmp_path, monkeypatch):
    monkeypatch.setattr(operations, "READY_SECONDS", 0.0)
    with run_service(tmp_path, omni) as service, make_http_client(service) as client:
        wiring = service[0]
        assert client.get("/ready").status_code == 200
        store_folder = wiring.store.folder
        for path in sorted(store_folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        store_folder.rmdir()
        store_folder.write_bytes(b"not a folder")
        answer = client.get("/ready")
        assert answer.status_code == 503 and "store: it cannot be written" in answer.text
        store_folder.unlink()
        assert client.get("/ready").status_code == 200
        with pause_worker(wiring), forbid_writes(wiring.engine):
            answer = client.get("/ready")
            assert answer.status_code == 503 and answer.json()["error"]["message"].startswith("database:")
        assert client.get("/ready").status_code == 200


@contextmanager
def forbid_writes(engine: Engine) -> Iterator[None]:
    """Open the connections of a SQLite database for reading only."""

    def set_read_only(connection, record) -> None:
        connection.execute("PRAGMA query_only=ON")

    event.listen(engine, "connect", set_read_only)
    engine.dispose()
    yield
    event.remove(engine, "connect", set_read_only)
    engine.dispose()

"""The same Idempotency-Key on every POST route: twice, in parallel, after a cancellation, a deletion and a restart."""

import base64
import hashlib
import json
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest

from tests.support.openai_service import (
    QUICK,
    make_client,
    make_http_client,
    make_lines,
    make_png,
    pause_worker,
    run_service,
    wait_until,
)

SMALL_VIDEO = {"size": "32x32"} | QUICK
SMALL_IMAGE = {"size": "32x32", "num_inference_steps": 1}
PNG_URL = "data:image/png;base64," + base64.b64encode(make_png()).decode()


@dataclass
class World:
    """What the requests refer to."""

    http: httpx.Client
    video: str
    thread: str
    file: str
    webhook: str

    def new_key(self) -> str:
        return uuid.uuid4().hex


@dataclass(frozen=True)
class Case:
    """A route: its path, and what is sent to it for a text. `find_id` names what the response is about."""

    path: Callable[[World], str]
    build: Callable[[World, str], dict]
    find_id: Callable[[dict], str] = lambda body: body["id"]
    cancel: Callable[[World, dict], None] | None = None
    delete: Callable[[World, dict], None] | None = None
    is_ended_by_cancel: bool = False  # a route that cancels: it may be repeated, and creates nothing


def post(world: World, path: str) -> None:
    assert world.http.post(path).status_code == 200, path


def delete(world: World, path: str) -> None:
    assert world.http.delete(path).status_code == 200, path


def build_json(**fields) -> Callable[[World, str], dict]:
    return lambda world, text: {"json": fields | {"prompt": text}}


VIDEO = {
    "cancel": lambda world, body: post(world, f"/v1/videos/{body['id']}/cancel"),
    "delete": lambda world, body: delete(world, f"/v1/videos/{body['id']}"),
}
WEBHOOK = {
    "build": lambda world, text: {"json": {"url": "http://localhost/", "name": text}},
    "find_id": lambda body: body["id"] + body["secret"],
}
IMAGE_ID = {"find_id": lambda body: body["data"][0]["url"]}


def delete_thread_of_chat(world: World, body: dict) -> None:
    delete(world, f"/v1/threads/{body['omnivideo']['thread']}")


def cancel_turn(world: World, thread: str, turn: str) -> None:
    path = f"/v1/threads/{thread}/turns/{turn}"
    post(world, f"{path}/cancel")


CASES = {
    "/v1/videos": Case(lambda world: "/v1/videos", build_json(**SMALL_VIDEO), **VIDEO),
    "/v1/videos/sync": Case(
        lambda world: "/v1/videos/sync",
        build_json(**SMALL_VIDEO),
        delete=lambda world, body: delete(world, f"/v1/videos/{body['id']}"),
    ),
    "/v1/videos/edits": Case(
        lambda world: "/v1/videos/edits",
        lambda world, text: {"json": {"prompt": text, "video": {"id": world.video}} | QUICK},
        **VIDEO,
    ),
    "/v1/videos/{video_id}/remix": Case(
        lambda world: f"/v1/videos/{world.video}/remix", build_json(num_inference_steps=1), **VIDEO
    ),
    "/v1/images/generations": Case(
        lambda world: "/v1/images/generations", build_json(response_format="url", n=2, **SMALL_IMAGE), **IMAGE_ID
    ),
    "/v1/images/edits": Case(
        lambda world: "/v1/images/edits",
        build_json(response_format="url", num_inference_steps=1, image={"image_url": PNG_URL}),
        **IMAGE_ID,
    ),
    "/v1/files": Case(
        lambda world: "/v1/files",
        lambda world, text: {"files": {"file": ("a.txt", text.encode())}, "data": {"purpose": "user_data"}},
        delete=lambda world, body: delete(world, f"/v1/files/{body['id']}"),
    ),
    "/v1/batches": Case(
        lambda world: "/v1/batches",
        lambda world, text: {
            "json": {
                "input_file_id": world.file,
                "endpoint": "/v1/videos",
                "completion_window": "24h",
                "metadata": {"a": text},
            }
        },
        cancel=lambda world, body: post(world, f"/v1/batches/{body['id']}/cancel"),
    ),
    "/v1/webhooks": Case(
        lambda world: "/v1/webhooks", delete=lambda world, body: delete(world, f"/v1/webhooks/{body['id']}"), **WEBHOOK
    ),
    "/v1/webhook_endpoints": Case(
        lambda world: "/v1/webhook_endpoints",
        delete=lambda world, body: delete(world, f"/v1/webhook_endpoints/{body['id']}"),
        **WEBHOOK,
    ),
    "/v1/threads": Case(
        lambda world: "/v1/threads",
        lambda world, text: {"json": {"id": None if text == "a red ball" else "chosen"}},
        delete=lambda world, body: delete(world, f"/v1/threads/{body['id']}"),
    ),
    "/v1/threads/{name}/forks": Case(
        lambda world: f"/v1/threads/{world.thread}/forks",
        lambda world, text: {"json": {"after_turn": 1 if text == "a red ball" else 0}},
        delete=lambda world, body: delete(world, f"/v1/threads/{body['id']}"),
    ),
    "/v1/threads/{name}/turns": Case(
        lambda world: f"/v1/threads/{world.thread}/turns",
        lambda world, text: {"json": {"text": text, "steps": 1}},
        cancel=lambda world, body: cancel_turn(world, body["thread_id"], body["id"]),
    ),
    "/v1/chat/completions": Case(
        lambda world: "/v1/chat/completions",
        lambda world, text: {"json": {"model": "tiny", "messages": [{"role": "user", "content": text}], "steps": 1}},
        lambda body: body["id"] + body["choices"][0]["message"]["content"],
        delete=delete_thread_of_chat,
    ),
    "/v1/responses": Case(
        lambda world: "/v1/responses",
        lambda world, text: {"json": {"model": "tiny", "input": text, "steps": 1}},
        delete=delete_thread_of_chat,
    ),
    "/v1/videos/{video_id}/cancel": Case(
        lambda world: f"/v1/videos/{world.video}/cancel", lambda world, text: {}, is_ended_by_cancel=True
    ),
}
# Routes that cancel or change something that exists: the same key repeats them, and another path is refused.
REPEATED: dict[str, Callable[[World], str]] = {
    "/v1/batches/{batch_id}/cancel": lambda world: f"/v1/batches/{create(world, '/v1/batches')}/cancel",
    "/v1/responses/{response_id}/cancel": lambda world: f"/v1/responses/{create(world, '/v1/responses')}/cancel",
    "/v1/threads/{name}/turns/{turn}/cancel": lambda world: (
        f"/v1/threads/{world.thread}/turns/{create(world, '/v1/threads/{name}/turns')}/cancel"
    ),
    "/v1/webhook_endpoints/{hook_id}": lambda world: f"/v1/webhook_endpoints/{world.webhook}",
    "/v1/webhook_endpoints/{hook_id}/rotate_secret": lambda world: (
        f"/v1/webhook_endpoints/{world.webhook}/rotate_secret"
    ),
    "/v1/webhook_endpoints/{hook_id}/test": lambda world: f"/v1/webhook_endpoints/{world.webhook}/test",
}
REFUSED = {"/v1/videos/extensions"}  # always
STATELESS = {"/v1/route", "/v1/understand"}  # they create nothing and know no keys


def change_webhook(action: str, **fields) -> Case:
    return Case(
        lambda world: f"/v1/webhooks/{world.webhook}{action}",
        lambda world, text: {"json": fields} if fields else {},
        lambda body: body["id"] + body.get("secret", ""),
        is_ended_by_cancel=True,
    )


CASES |= {
    "/v1/webhooks/{hook_id}": change_webhook("", name="x"),
    "/v1/webhooks/{hook_id}/rotate_secret": change_webhook("/rotate_secret"),
    "/v1/webhooks/{hook_id}/test": change_webhook("/test"),
}
CREATING = [name for name, case in CASES.items() if not case.is_ended_by_cancel]


def send(world: World, case: Case, key: str, text: str = "a red ball", http: httpx.Client | None = None):
    headers = {"Idempotency-Key": key}
    return (http or world.http).post(case.path(world), headers=headers, **case.build(world, text))


def send_ok(world: World, case: Case, key: str, http: httpx.Client | None = None) -> dict:
    response = send(world, case, key, http=http)
    assert response.status_code in (200, 201, 202), response.text
    return {"id": response.headers["X-Video-Id"]} if "X-Video-Id" in response.headers else response.json()


def create(world: World, name: str) -> str:
    """Return the id of what a route creates."""
    return str(send_ok(world, CASES[name], world.new_key())["id"])


def build_world(service, http) -> World:
    video = http.post("/v1/videos", json={"prompt": "a red ball"} | SMALL_VIDEO).json()["id"]
    thread = http.post("/v1/threads").json()["id"]
    turn = http.post(f"/v1/threads/{thread}/turns", json={"text": "a red ball", "steps": 1}).json()["id"]
    wait_until(lambda: http.get(f"/v1/threads/{thread}/turns/{turn}").json()["state"] == "done")
    file = http.post(
        "/v1/files", files={"file": ("lines.jsonl", make_lines(1))}, data={"purpose": "batch"}
    ).json()["id"]  # fmt: skip
    wait_until(lambda: http.get(f"/v1/videos/{video}").json()["status"] == "completed")
    webhook = http.post("/v1/webhooks", json={"url": "http://localhost/"}).json()["id"]
    return World(http, video, thread, file, webhook)


@pytest.fixture(scope="module")
def shared_world(service, http):
    return build_world(service, http)


@pytest.fixture
def world(shared_world, http) -> World:
    """Return what requests refer to, with a thread of its own, in which no turn runs."""
    fork = http.post(f"/v1/threads/{shared_world.thread}/forks", json={"after_turn": 1}).json()["id"]
    return World(http, shared_world.video, fork, shared_world.file, shared_world.webhook)


def test_the_table_has_every_post_route(http):
    paths = http.get("/openapi.json").json()["paths"]
    assert {path for path, methods in paths.items() if "post" in methods} == (
        CASES.keys() | REPEATED.keys() | REFUSED | STATELESS
    )


def test_a_route_that_creates_nothing_answers_every_time(http):
    headers = {"Idempotency-Key": "question"}
    for prompt in ("draw a red circle", "draw a red circle", "a blue square"):
        assert http.post("/v1/route", headers=headers, json={"prompt": prompt}).status_code == 200


@pytest.mark.parametrize("name", CASES)
def test_the_same_key_twice_has_the_same_result(world, name):
    key, case = world.new_key(), CASES[name]
    first, second = (case.find_id(send_ok(world, case, key)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", CREATING)
def test_another_key_and_no_key_have_another_result(world, service, name):
    case = CASES[name]
    first = case.find_id(send_ok(world, case, world.new_key()))
    if name.endswith("/turns"):
        wait_until(lambda: send(world, case, world.new_key()).status_code == 202)
        return
    assert case.find_id(send_ok(world, case, world.new_key())) != first


@pytest.mark.parametrize("name", CREATING)
def test_the_same_key_in_parallel_has_the_same_result(world, service, name):
    key, case, results = world.new_key(), CASES[name], list[str]()

    def send_alone() -> None:
        with make_http_client(service) as http:
            results.append(case.find_id(send_ok(world, case, key, http)))

    threads = [threading.Thread(target=send_alone) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(set(results)) == 1


@pytest.mark.parametrize("name", CREATING)
def test_the_same_key_with_another_body_is_refused(world, name):
    key, case = world.new_key(), CASES[name]
    first = send_ok(world, case, key)
    refused = send(world, case, key, "a blue star")
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert case.find_id(send_ok(world, case, key)) == case.find_id(first)


@pytest.mark.parametrize("name", CASES)
def test_the_same_key_on_another_path_is_refused(world, name):
    key, case = world.new_key(), CASES[name]
    world.http.post("/v1/threads", headers={"Idempotency-Key": key})
    if name != "/v1/threads":
        assert send(world, case, key).status_code == 422


@pytest.mark.parametrize("name", REPEATED)
def test_what_may_be_repeated_is_repeated_with_its_key(world, name):
    path, headers = REPEATED[name](world), {"Idempotency-Key": world.new_key()}
    body = {} if path.endswith(("cancel", "secret", "test")) else {"json": {"name": "x"}}
    first, second = (world.http.post(path, headers=headers, **body) for _ in range(2))
    assert first.status_code == second.status_code == 200 and first.json()["id"] == second.json()["id"], first.text
    assert world.http.post("/v1/threads", headers=headers).status_code == 422


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.cancel])
def test_a_cancelled_result_is_made_anew(world, service, name):
    key, case = world.new_key(), CASES[name]
    with pause_worker(service[0]):
        first = send_ok(world, case, key)
        case.cancel(world, first)
        second = send_ok(world, case, key)
        assert case.find_id(second) != case.find_id(first)
        assert case.find_id(send_ok(world, case, key)) == case.find_id(second)
        case.cancel(world, second)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.delete])
def test_a_deleted_result_is_made_anew(world, name):
    key, case = world.new_key(), CASES[name]
    first = send_ok(world, case, key)
    case.delete(world, first)
    second = send_ok(world, case, key)
    assert case.find_id(second) != case.find_id(first)
    assert case.find_id(send_ok(world, case, key)) == case.find_id(second)
    case.delete(world, second)


def test_the_same_keys_after_a_restart_have_the_same_results(omni, tmp_path):
    """Every route of one service is called again on a second service with the same database."""
    results = []
    for _ in range(2):
        with run_service(tmp_path, omni) as service, make_http_client(service) as http:
            if not results:
                world = build_world(service, http)
            world.http = http
            ids = {}
            for name, case in CASES.items():
                ids[name] = case.find_id(send_ok(world, case, f"restart {name}"))
                if name.endswith("/turns"):
                    path = f"/v1/threads/{world.thread}"
                    wait_until(lambda http=http, path=path: len(http.get(path).json()["turns"]) == 2)
            results.append({name: value.replace(service[2], "") for name, value in ids.items()})
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["/v1/images/generations", "/v1/images/edits"])
def test_a_client_that_leaves_does_not_cancel_the_images_of_another(world, service, context, name):
    key, case, results = world.new_key(), CASES[name], list[dict]()
    with pause_worker(service[0]):
        with leaving_client(service, world, case, key):
            stayer = threading.Thread(target=lambda: results.append(send_ok(world, case, key)))
            stayer.start()
            wait_until(lambda: count_waiting_clients(context, key) == 2)
        wait_until(lambda: count_waiting_clients(context, key) == 1)
    stayer.join()
    assert results[0]["data"][0]["url"]


@pytest.mark.parametrize("name", ["/v1/images/generations", "/v1/images/edits"])
def test_images_whose_only_client_has_left_are_cancelled_and_made_anew(world, service, context, name):
    key, case = world.new_key(), CASES[name]
    with pause_worker(service[0]):
        with leaving_client(service, world, case, key):
            wait_until(lambda: count_waiting_clients(context, key) == 1)
            (job, *_), _ = context.jobs.list_owned_jobs("admin", "image", None, 1, True)
        wait_until(lambda: context.jobs.get_status(job.id).state == "cancelled")
    assert job.id not in case.find_id(send_ok(world, case, key))


@contextmanager
def leaving_client(service, world: World, case: Case, key: str):
    """Send a request, and close its connection at the end of the block."""
    http = make_http_client(service)
    request = http.build_request(
        "POST", case.path(world), headers={"Idempotency-Key": key}, **case.build(world, "a red ball")
    )
    port = int(service[2].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"POST {request.url.raw_path.decode()} HTTP/1.1\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        connection.sendall(head.encode() + b"\r\n" + request.read())
        yield
    http.close()


def count_waiting_clients(context, key: str) -> int:
    with context.idempotency_keys.engine.connect() as connection:
        query = "SELECT waiting_clients FROM idempotency_keys WHERE key_digest = ?"
        row = connection.exec_driver_sql(query, (hashlib.sha256(key.encode()).hexdigest(),)).first()
    return -1 if row is None else row[0]


def test_an_upload_and_a_data_url_of_the_same_bytes_are_the_same_request(world):
    key = {"Idempotency-Key": world.new_key()}
    fields = {"prompt": "make it blue", "num_inference_steps": 1, "response_format": "url"}
    form = {name: str(value) for name, value in fields.items()}
    by_url = world.http.post("/v1/images/edits", json=fields | {"image": {"image_url": PNG_URL}}, headers=key)
    upload = world.http.post("/v1/images/edits", data=form, files={"image": ("b.png", make_png())}, headers=key)
    other = world.http.post("/v1/images/edits", data=form, files={"image": ("b.png", make_png(7))}, headers=key)
    assert (by_url.status_code, upload.status_code, other.status_code) == (200, 200, 422)
    assert by_url.json() == upload.json()


def test_a_refused_request_leaves_its_key_free(world):
    key = {"Idempotency-Key": world.new_key()}
    refused = world.http.post("/v1/videos/edits", json={"prompt": "a", "video": {"id": "x"}}, headers=key)
    assert refused.status_code == 400
    body = {"prompt": "a", "video": {"id": world.video}} | QUICK
    assert world.http.post("/v1/videos/edits", json=body, headers=key).status_code == 200


def test_null_and_defaults_are_the_same_request(world):
    key = {"Idempotency-Key": world.new_key()}
    bodies = [{}, {"seed": None}, {"num_frames": "5"}]
    ids = {
        world.http.post("/v1/videos", json={"prompt": "a"} | SMALL_VIDEO | body, headers=key).json()["id"]
        for body in bodies
    }
    assert len(ids) == 1


def test_a_streamed_chat_is_repeated(service, world):
    key, chunks = {"Idempotency-Key": world.new_key()}, []
    with make_client(service) as client:
        for _ in range(2):
            messages = [{"role": "user", "content": "a red ball"}]
            stream = client.chat.completions.create(
                model="tiny", messages=messages, stream=True, extra_body={"steps": 1}, extra_headers=key
            )
            chunks.append([json.dumps(chunk.choices[0].delta.model_dump()) for chunk in stream])
    assert [chunk for chunk in chunks[0] if "waiting" not in chunk] == chunks[1]


def test_a_key_whose_process_has_died_is_taken_over(world, context):
    """A process that dies while it creates something leaves its key claimed."""
    key = world.new_key()
    assert send(world, CASES["/v1/videos"], key).status_code == 200
    with context.idempotency_keys.engine.connect() as connection:
        connection.exec_driver_sql("UPDATE idempotency_keys SET claimed_until = 1, resource_id = 'video_none'")
    assert send_ok(world, CASES["/v1/videos"], key)["id"] != "video_none"

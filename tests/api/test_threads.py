"""Threads, turns, events and chat over HTTP."""

import base64
import io
import json
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from sqlalchemy import insert

from omnivideo.api.turn_runner import TurnRunner
from omnivideo.storage.database.keys import APIKeyRepository
from omnivideo.storage.database.schema import threads
from omnivideo.storage.database.turns import TurnRepository
from tests.support.api_server import build_scripted_wiring, run_api_server


@pytest.fixture(scope="module")
def wiring(omni, tmp_path_factory):
    return build_scripted_wiring(tmp_path_factory.mktemp("service"), omni, admin_key="a-key-for-the-tests")


@pytest.fixture(scope="module")
def address(wiring):
    with run_api_server(wiring) as address:
        yield address


@pytest.fixture
def http(address):
    with httpx.Client(
        base_url=address, headers={"Authorization": "Bearer a-key-for-the-tests"}, timeout=60, trust_env=False
    ) as client:
        yield client


@pytest.fixture
def thread(http) -> str:
    return http.post("/v1/threads").json()["id"]


def read_events(http, thread: str, turn: str, after: int = 0) -> list[tuple[int, dict]]:
    """Return all events of a turn, read as a browser reads them."""
    received, number = [], 0
    headers = {"Last-Event-ID": str(after)} if after else {}
    with http.stream("GET", f"/v1/threads/{thread}/turns/{turn}/events", headers=headers) as stream:
        if stream.status_code == 204:
            return []
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("id: "):
                number = int(line[4:])
            elif line.startswith("data: "):
                received.append((number, json.loads(line[6:])))
    return received


def test_a_new_thread_takes_as_long_beside_six_thousand_others(wiring, address):
    """The least of twenty times, so that other work of the machine does not matter. Reading all rows took 27 ms."""
    owner, key = APIKeyRepository(wiring.engine).create_key("many")

    def measure_seconds() -> float:
        started_at = time.perf_counter()
        assert http.post("/v1/threads").status_code == 201
        return time.perf_counter() - started_at

    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}, trust_env=False) as http:
        alone = min(measure_seconds() for _ in range(20))
        ids = [f"many-{number}" for number in range(6000)]
        rows = [{"id": id, "client_id": id, "owner": owner, "created_at": 1.0, "deleted": False} for id in ids]
        with wiring.engine.begin() as connection:
            connection.execute(insert(threads), rows)
        assert min(measure_seconds() for _ in range(20)) < 1.5 * alone + 0.003


def run_turn(http, thread: str, text: str, **options) -> dict:
    """Run a turn to its end and return it."""
    response = http.post(f"/v1/threads/{thread}/turns", json={"text": text, "steps": 3, **options})
    assert response.status_code == 202, response.text
    turn = response.json()["id"]
    read_events(http, thread, turn)
    return http.get(f"/v1/threads/{thread}/turns/{turn}").json()


def make_png_url(colour=(200, 30, 30)) -> str:
    """Return a data URL of an image of one colour."""
    out = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), colour, dtype=np.uint8)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def test_a_conversation_builds_on_itself(http, thread):
    first = run_turn(http, thread, "a red ball; now make it blue; how many balls are there?")
    assert (first["state"], first["number"]) == ("done", 1)
    generated, edited, answered = first["turn"]["results"]
    assert edited["artifact"]["source"] == generated["artifact"]["key"] and answered["answer"]
    second = run_turn(http, thread, "make it green")
    assert second["turn"]["results"][0]["artifact"]["source"] == edited["artifact"]["key"]
    whole = http.get(f"/v1/threads/{thread}").json()
    assert [turn["number"] for turn in whole["turns"]] == [1, 2] and len(whole["artifacts"]) == 3
    lineage = http.get(f"/v1/threads/{thread}/lineage").json()
    assert [artifact["key"] for artifact in lineage] == [artifact["key"] for artifact in reversed(whole["artifacts"])]
    branch = http.post(f"/v1/threads/{thread}/forks", json={"after_turn": 1}).json()["id"]
    assert [turn["number"] for turn in http.get(f"/v1/threads/{branch}").json()["turns"]] == [1]
    assert thread in [item["id"] for item in http.get("/v1/threads").json()["data"]]


def test_events_are_ordered_and_resume_after_the_last_event_id(http, thread):
    turn = http.post(f"/v1/threads/{thread}/turns", json={"text": "a red ball", "steps": 8}).json()["id"]
    received = read_events(http, thread, turn)
    kinds = [event["kind"] for _, event in received]
    assert kinds[0] == "plan" and kinds[-1] == "done" and {"step", "preview", "artifact"} <= set(kinds)
    assert [number for number, _ in received] == list(range(1, len(received) + 1))
    assert read_events(http, thread, turn, after=4) == received[4:]
    assert read_events(http, thread, turn, after=len(received)) == []
    path = f"/v1/threads/{thread}/turns/{turn}/events"
    refused = http.get(path, headers={"Last-Event-ID": str(2**63)})
    assert refused.status_code == 400 and "0 to 2147483647" in refused.json()["error"]["message"]


def test_all_followers_see_the_same_events(http, address, thread):
    turn = http.post(f"/v1/threads/{thread}/turns", json={"text": "a red ball", "steps": 20}).json()["id"]
    seen: list[list] = []

    def follow() -> None:
        with httpx.Client(base_url=address, headers=http.headers, timeout=60, trust_env=False) as follower_http:
            seen.append(read_events(follower_http, thread, turn))

    followers = [threading.Thread(target=follow) for _ in range(12)]
    for follower in followers:
        follower.start()
    for follower in followers:
        follower.join()
    assert len(seen) == 12 and all(events_seen == seen[0] for events_seen in seen) and seen[0][-1][1]["kind"] == "done"


def test_an_artifact_is_downloaded_whole_and_in_ranges(http, thread):
    key = run_turn(http, thread, "a red ball")["turn"]["results"][0]["artifact"]["key"]
    path = f"/v1/threads/{thread}/artifacts/{key}"
    whole = http.get(path)
    assert whole.headers["content-type"] == "video/mp4" and whole.content[4:8] == b"ftyp"
    part = http.get(path, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    assert http.get(path, headers={"Range": "bytes=-5"}).content == whole.content[-5:]
    beyond = http.get(path, headers={"Range": "bytes=99999999-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(whole.content)}")
    assert http.get(path, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304


def test_a_repeated_request_returns_the_same_turn(http, thread):
    wanted, key = {"text": "a red ball", "steps": 3}, {"Idempotency-Key": "k"}
    twice = [http.post(f"/v1/threads/{thread}/turns", json=wanted, headers=key) for _ in range(2)]
    assert twice[0].json()["id"] == twice[1].json()["id"]
    read_events(http, thread, twice[0].json()["id"])
    assert len(http.get(f"/v1/threads/{thread}").json()["turns"]) == 1


def test_a_question_waits_for_its_reply(http, thread):
    asked = run_turn(http, thread, "make it blue")
    assert asked["state"] == "asks" and asked["question"].startswith("There is nothing to change yet")
    replied = run_turn(http, thread, "a red ball")
    assert replied["state"] == "done" and replied["turn"]["clarifications"][0][1] == "a red ball"


def test_attachments_are_edited(http, thread):
    turn = run_turn(http, thread, "make it blue", attachments=[{"url": make_png_url()}])["turn"]
    assert (
        turn["results"][0]["goal"] == "edit"
        and turn["results"][0]["artifact"]["source"] == turn["attachments"][0]["key"]
    )


def test_a_cancelled_turn_leaves_the_thread_unchanged(http, thread):
    run_turn(http, thread, "a red ball")
    turn = http.post(f"/v1/threads/{thread}/turns", json={"text": "a blue ball", "steps": 200}).json()["id"]
    path = f"/v1/threads/{thread}/turns/{turn}"
    busy = http.post(f"/v1/threads/{thread}/turns", json={"text": "another"})
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "busy")
    http.post(f"{path}/cancel")
    deadline = time.monotonic() + 20
    while (state := http.get(path).json()["state"]) in ("queued", "running") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert state == "cancelled"
    assert len(http.get(f"/v1/threads/{thread}").json()["turns"]) == 1
    assert run_turn(http, thread, "a blue ball")["state"] == "done"


def test_cancelling_an_ended_turn_leaves_the_next_one_alone(http, thread):
    path = f"/v1/threads/{thread}/turns"
    ended = http.post(path, json={"text": "a red ball", "steps": 1}).json()["id"]
    read_events(http, thread, ended)
    current = http.post(path, json={"text": "a blue ball", "steps": 20}).json()["id"]
    assert http.post(f"{path}/{ended}/cancel").json()["state"] == "done"
    read_events(http, thread, current)
    assert http.get(f"{path}/{current}").json()["state"] == "done"


def test_a_turn_of_a_dead_process_continues_in_another(http, thread, wiring, address, monkeypatch):
    """A killed process leaves its turn in the running state, with an old heartbeat."""
    context = wiring.build_service_context()
    dead_runner = TurnRunner(context.turns, context.jobs, context.conversations, context.settings.heartbeat_timeout)
    with monkeypatch.context() as patch:  # the server must not claim the turn first
        patch.setattr(wiring.turns, "claim_next_turn", lambda *arguments: None)
        row = dead_runner.start_turn("turn_left", "admin", thread, "a red ball", steps=3)
        claimed = TurnRepository.claim_next_turn(wiring.turns, 60.0)
    running = dead_runner.iterate_events(claimed, dead_runner.get_thread("admin", thread), has_started=False)
    next(running)
    next(running)
    del running
    with context.turns.engine.connect() as connection:
        connection.exec_driver_sql("UPDATE turns SET heartbeat_at = heartbeat_at - 3600 WHERE id = ?", (row.id,))
    assert read_events(http, thread, row.id)[-1][1]["kind"] == "done"
    assert http.get(f"/v1/threads/{thread}/turns/{row.id}").json()["state"] == "done"
    assert len(http.get(f"/v1/threads/{thread}").json()["turns"]) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text": ""}, "text"),
        ({"text": "x", "steps": 0}, "steps"),
        ({"text": "x", "think": "perhaps"}, "think"),
        ({"text": "x", "check": 17}, "check"),
        ({"text": "x", "attachments": [{}]}, "attachments.0"),
        ({"text": "x", "attachments": [{"url": "http://example.com/a.png"}]}, "attachments.0.url"),
        ({"text": "x", "attachments": [{"url": "file:///etc/passwd"}]}, "attachments.0.url"),
        ({"text": "x", "attachments": [{"file_id": "file_none"}]}, "attachments.0.file_id"),
    ],
)
def test_an_invalid_turn_is_refused_with_the_name_of_the_field_and_changes_nothing(http, thread, body, param):
    answer = http.post(f"/v1/threads/{thread}/turns", json=body)
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert error["param"] == param and error["message"] and "/work" not in error["message"]
    assert http.get(f"/v1/threads/{thread}").json()["turns"] == []


def test_threads_of_other_owners_are_not_found(http, address, wiring, thread):
    _, key = wiring.build_service_context().api_keys.create_key("somebody else")
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}, trust_env=False) as other:
        for path in (f"/v1/threads/{thread}", f"/v1/threads/{thread}/lineage", "/v1/threads/nothing"):
            assert other.get(path).status_code == 404
        assert other.post(f"/v1/threads/{thread}/turns", json={"text": "x"}).status_code == 404
        assert other.post("/v1/threads", json={"id": thread}).status_code == 201  # ids belong to their owners
        assert other.get(f"/v1/threads/{thread}").json()["turns"] == []
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        refused = httpx.get(f"{address}/v1/threads", headers=headers, trust_env=False)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert refused.headers["x-request-id"]


# ---------------------------------------------------------------- chat


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="a-key-for-the-tests", max_retries=0) as client:
        yield client


OPTIONS = {"extra_body": {"steps": 3}}


def test_the_openai_client_chats(client):
    messages = [{"role": "user", "content": "a red ball"}]
    first = client.chat.completions.create(model="tiny", messages=messages, **OPTIONS)
    assert "![a red ball](http://" in first.choices[0].message.content
    messages += [first.choices[0].message.model_dump(include={"role", "content"})]
    messages += [{"role": "user", "content": "make it blue"}]
    second = client.chat.completions.create(model="tiny", messages=messages, **OPTIONS)
    assert second.omnivideo["thread"] == first.omnivideo["thread"]
    messages[2:] = [{"role": "user", "content": "how many balls are there?"}]
    branch = client.chat.completions.create(model="tiny", messages=messages, **OPTIONS)
    assert branch.omnivideo["thread"] != first.omnivideo["thread"]
    assert branch.choices[0].message.content.startswith("it is a red ball")


def test_the_openai_client_streams_chats(client):
    image = {"type": "image_url", "image_url": {"url": make_png_url()}}
    content = [{"type": "text", "text": "how many balls are there?"}, image]
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], stream=True, **OPTIONS
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).startswith("it is")


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-text"]
    with pytest.raises(openai.NotFoundError, match="there is no 'gpt'"):
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hello"}])


def test_chat_errors_have_the_format_of_openai(client):
    with pytest.raises(openai.BadRequestError, match="messages: it has 0 items"):
        client.chat.completions.create(model="tiny", messages=[])


def test_threads_are_listed_in_pages(http):
    ids = [http.post("/v1/threads", json={}).json()["id"] for _ in range(5)]
    first = http.get("/v1/threads?limit=2").json()
    assert [thread["id"] for thread in first["data"]] == ids[:2:-1] and first["has_more"]
    second = http.get(f"/v1/threads?limit=2&after={first['last_id']}").json()
    assert [thread["id"] for thread in second["data"]] == ids[2:0:-1]
    http.delete(f"/v1/threads/{first['last_id']}")
    assert http.get(f"/v1/threads?limit=2&after={first['last_id']}").json() == second
    ascending = http.get(f"/v1/threads?order=asc&after={ids[0]}&limit=1").json()
    assert [thread["id"] for thread in ascending["data"]] == [ids[1]]
    assert http.get("/v1/threads?after=nothing").json()["error"]["param"] == "after"

"""What browsers, caches and pagers rely on: HEAD, entity tags, Allow, ends of streams, cursors, expiry, webhooks."""

import itertools

import openai
import pytest

from omnivideo.backends.webhooks import WebhookSender
from omnivideo.storage.database.jobs import JobRepository
from tests.support.openai_service import QUICK, make_client, make_lines, pause_worker, refer_to_video, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
VIDEO = {"prompt": "a ball", "size": "32x32"} | QUICK


@pytest.fixture(scope="module")
def video(http) -> str:
    video_id = http.post("/v1/videos", json=VIDEO).json()["id"]
    wait_until(lambda: http.get(f"/v1/videos/{video_id}").json()["status"] == "completed")
    return video_id


@pytest.fixture(scope="module")
def turn(http) -> str:
    """Return the path of a turn that has ended."""
    thread = http.post("/v1/threads").json()["id"]
    path = f"/v1/threads/{thread}/turns"
    path += "/" + http.post(path, json={"text": "a red ball", "steps": 1}).json()["id"]
    wait_until(lambda: http.get(path).json()["state"] == "done")
    return path


# ---------------------------------------------------------------- HEAD, entity tags, Allow


def test_every_route_that_answers_get_answers_head(http, video, turn):
    file = http.post("/v1/files", files={"file": ("a", make_lines(1))}, data={"purpose": "batch"}).json()["id"]
    batch = {"input_file_id": file, "endpoint": "/v1/videos", "completion_window": "24h"}
    hook = http.post("/v1/webhooks", json={"url": "http://localhost/"}).json()["id"]
    image = http.post("/v1/images/generations", json={"prompt": "a", "size": "32x32", "response_format": "url"}).json()
    thread = turn.split("/")[3]
    artifact = http.get(f"/v1/threads/{thread}").json()["artifacts"][0]["key"]
    response = http.post("/v1/responses", json={"model": "tiny", "input": "a red ball", "steps": 1}).json()
    names = {
        "video_id": video, "file_id": file, "batch_id": http.post("/v1/batches", json=batch).json()["id"],
        "hook_id": hook, "image_id": image["data"][0]["url"].split("/")[-2], "key": artifact,
        "turn": turn.split("/")[-1],
        "response_id": response["id"],
    }  # fmt: skip
    paths = [path for path, methods in http.get("/openapi.json").json()["paths"].items() if "get" in methods]
    assert len(paths) > 20
    for path in paths:
        name = "tiny" if path.startswith("/v1/models") else thread
        url = path.format_map(names | {"name": name})
        head, whole = http.head(url), http.get(url)
        assert head.status_code == whole.status_code in (200, 204), url
        assert not head.content and head.headers.get("content-type") == whole.headers.get("content-type"), url
        if path != "/metrics":
            assert head.headers.get("content-length") == whole.headers.get("content-length"), url
    http.delete(f"/v1/webhooks/{hook}")


def test_a_head_of_an_event_stream_does_not_wait_for_its_end(http, service):
    thread = http.post("/v1/threads").json()["id"]
    with pause_worker(service[0]):
        turn = http.post(f"/v1/threads/{thread}/turns", json={"text": "a red ball", "steps": 1}).json()["id"]
        head = http.head(f"/v1/threads/{thread}/turns/{turn}/events", timeout=10)
    assert head.status_code == 200 and head.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    ("condition", "status"),
    [("{}", 304), ("W/{}", 304), ('"x", {}', 304), ('"x",W/{}', 304), ("*", 304), ('"x"', 200), ('W/"x", "y"', 200)],
)
def test_the_entity_tags_of_a_condition_are_compared(http, video, condition, status):
    url = f"/v1/videos/{video}/content"
    etag = http.head(url).headers["etag"]
    response = http.get(url, headers={"If-None-Match": condition.format(etag)})
    assert response.status_code == status and response.headers["etag"] == etag


def test_a_weak_entity_tag_does_not_permit_a_range(http, video):
    url = f"/v1/videos/{video}/content"
    etag = http.head(url).headers["etag"]
    assert http.get(url, headers={"Range": "bytes=0-3", "If-Range": etag}).status_code == 206
    assert http.get(url, headers={"Range": "bytes=0-3", "If-Range": f"W/{etag}"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/videos", "GET, HEAD, POST"), ("/v1/videos/x", "DELETE, GET, HEAD"), ("/v1/chat/completions", "POST"),
        ("/v1/webhooks/x", "DELETE, GET, HEAD, POST"), ("/health", "GET, HEAD"),
    ],
)  # fmt: skip
def test_all_methods_of_a_path_are_allowed(http, path, allowed):
    response = http.request("PUT", path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)


def test_a_finished_event_stream_answers_204_to_a_reconnect(http, turn):
    whole = http.get(f"{turn}/events").text
    last = max(int(line[4:]) for line in whole.splitlines() if line.startswith("id: "))
    reconnect = http.get(f"{turn}/events", headers={"Last-Event-ID": str(last)})
    assert (reconnect.status_code, reconnect.content) == (204, b"")
    earlier = http.get(f"{turn}/events", headers={"Last-Event-ID": str(last - 1)})
    assert earlier.status_code == 200 and f"id: {last}" in earlier.text


# ---------------------------------------------------------------- cursors


def create_videos(http) -> list[str]:
    return [http.post("/v1/videos", json=VIDEO).json()["id"] for _ in range(4)]


def create_files(http) -> list[str]:
    form = {"files": {"file": ("a", b"1")}, "data": {"purpose": "user_data"}}
    return [http.post("/v1/files", **form).json()["id"] for _ in range(4)]


def create_webhooks(http) -> list[str]:
    return [http.post("/v1/webhooks", json={"url": "http://localhost/"}).json()["id"] for _ in range(4)]


@pytest.mark.parametrize(
    ("path", "create"), [("/v1/videos", create_videos), ("/v1/files", create_files), ("/v1/webhooks", create_webhooks)]
)
def test_a_list_can_be_emptied_while_it_is_paged(http, path, create):
    create(http)
    cursor, deleted = "", []
    for _ in itertools.count():
        page = http.get(f"{path}?limit=3{cursor}")
        assert page.status_code == 200, page.text
        for item in page.json()["data"]:
            assert http.delete(f"{path}/{item['id']}").status_code == 200
            deleted.append(item["id"])
        if not page.json()["has_more"]:
            break
        cursor = f"&after={page.json()['last_id']}"
    assert len(deleted) >= 4 and http.get(path).json()["data"] == []


# ---------------------------------------------------------------- expiry


def test_an_expired_video_is_expired_everywhere(http, client, context, monkeypatch):
    video = http.post("/v1/videos", json=VIDEO, headers={"Idempotency-Key": "old"}).json()["id"]
    wait_until(lambda: http.get(f"/v1/videos/{video}").json()["status"] == "completed")
    with context.jobs.engine.connect() as connection:
        connection.exec_driver_sql("UPDATE jobs SET ended_at = ended_at - 1e8 WHERE id = ?", (video,))
    listed = next(item for item in http.get("/v1/videos").json()["data"] if item["id"] == video)
    assert listed["status"] == http.get(f"/v1/videos/{video}").json()["status"] == client.videos.poll(video).status
    assert listed["status"] == "expired"
    for variant in ("video", "thumbnail", "spritesheet"):
        content = http.get(f"/v1/videos/{video}/content?variant={variant}")
        assert (content.status_code, content.json()["error"]["code"]) == (404, "expired")
    with pytest.raises(openai.BadRequestError, match="id: that video has expired"):
        client.videos.remix(video, prompt="a")
    with pytest.raises(openai.BadRequestError, match=r"video\.id: that video has expired"):
        client.videos.edit(prompt="a", **refer_to_video(video))
    again = http.post("/v1/videos", json=VIDEO, headers={"Idempotency-Key": "old"}).json()
    assert again["id"] != video and again["status"] != "expired"


def test_no_store_key_is_in_the_message_of_a_missing_file(http, context):
    video = http.post("/v1/videos", json=VIDEO | {"seed": 12345}).json()["id"]
    wait_until(lambda: http.get(f"/v1/videos/{video}").json()["status"] == "completed")
    key = context.jobs.get_status(video).result.key
    context.store.store.path_for_key(key).unlink()
    response = http.get(f"/v1/videos/{video}/content")
    assert response.status_code == 404 and key[:20] not in response.text


# ---------------------------------------------------------------- webhooks


def test_the_openai_client_updates_a_webhook_and_rotates_its_secret(service, context):
    with make_client(service) as client:
        hook = client.webhooks.create(name="mine", url="http://localhost/a", event_types=["video.failed"])
        updated = client.webhooks.update(hook.id, name="yours", event_types=["video.completed"])
        assert (updated.name, updated.url, updated.event_types) == ("yours", "http://localhost/a", ["video.completed"])
        rotated = client.webhooks.rotate_secret(hook.id)
        assert rotated.signing_secret not in (None, hook.signing_secret)
        assert context.webhooks.get_webhook(hook.id, "admin").secret == rotated.signing_secret
        with pytest.raises(openai.BadRequestError, match="url"):
            client.webhooks.update(hook.id, url="http://10.0.0.1/")
        client.webhooks.delete(hook.id)
        for call in (client.webhooks.update, client.webhooks.rotate_secret):
            with pytest.raises(openai.NotFoundError):
                call(hook.id)


def test_a_webhook_is_tested(http, context):
    hook = http.post("/v1/webhooks", json={"url": "http://localhost/"}).json()["id"]
    event = http.post(f"/v1/webhooks/{hook}/test").json()
    ((delivery, record),) = context.webhooks.claim_due_deliveries(9, 60.0)
    assert (delivery.id, delivery.body["type"], delivery.body["data"], record.id) == (
        event["id"], "webhook.test", {"id": hook}, hook
    )  # fmt: skip
    http.delete(f"/v1/webhooks/{hook}")


def test_a_cancelled_video_is_announced(http, service, context):
    hook = http.post("/v1/webhooks", json={"url": "http://localhost/"}).json()["id"]
    with pause_worker(service[0]):
        video = http.post("/v1/videos", json=VIDEO).json()["id"]
        http.post(f"/v1/videos/{video}/cancel")
    WebhookSender(context.webhooks, JobRepository(context.jobs.engine)).announce_ended_jobs()
    deliveries = [delivery.body for delivery, _ in context.webhooks.claim_due_deliveries(99, 60.0)]
    types = {body["data"]["id"]: body["type"] for body in deliveries}
    assert types[video] == "video.cancelled"
    http.delete(f"/v1/webhooks/{hook}")

"""The unmodified openai client against the service: videos, images, files."""

import base64
import hashlib
import io
import json
import re
import threading

import httpx
import openai
import pytest
from PIL import Image

from omnivideo.media.read import read_media
from tests.support.openai_service import (
    KEY,
    QUICK,
    SMALL,
    make_client,
    make_lines,
    make_mp4,
    make_png,
    pause_worker,
    refer_to_video,
    wait_until,
)

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def stranger(service, context):
    """Yield the client of another owner."""
    _, key = context.api_keys.create_key("stranger")
    with make_client(service, key) as client:
        yield client


@pytest.fixture(scope="module")
def video(client):
    """Return a completed video."""
    return client.videos.create_and_poll(prompt="a red ball", seconds="1", size="32x32", extra_body={"fps": 8})


# ---------------------------------------------------------------- videos


def test_a_video_is_created_polled_and_described(client, video):
    assert (video.status, video.progress, video.size, video.seconds) == ("completed", 100, "32x32", "1")
    assert (video.model, video.prompt, video.error) == ("tiny", "a red ball", None)
    assert video.created_at <= video.completed_at < video.expires_at
    assert client.videos.retrieve(video.id) == video


def test_a_videos_content_is_downloaded_in_all_variants(client, video, tmp_path):
    path = tmp_path / "clip.mp4"
    client.videos.download_content(video.id).write_to_file(path)
    assert read_media(path).frames.shape == (8, 32, 32, 3)  # 1 s at 8 fps, of the 9 frames that were generated
    kinds = {}
    for variant in ("video", "thumbnail", "spritesheet"):
        answer = client.videos.download_content(video.id, variant=variant)
        kinds[variant] = answer.response.headers["content-type"]
        if variant != "video":
            size = Image.open(io.BytesIO(answer.read())).size
            assert size == {"thumbnail": (32, 32), "spritesheet": (96, 96)}[variant]
    assert kinds == {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}


def test_videos_are_listed_in_pages(client, video):
    new_ids = [client.videos.create(prompt=f"ball {index}", **SMALL).id for index in range(3)]
    page = client.videos.list(limit=2)
    assert [item.id for item in page.data] == new_ids[:0:-1] and page.has_more and page.last_id == new_ids[1]
    all_ids = [item.id for item in client.videos.list(limit=2)]
    assert all_ids[:3] == new_ids[::-1] and video.id in all_ids and len(set(all_ids)) == len(all_ids)
    assert [item.id for item in client.videos.list(order="asc", after=video.id, limit=3)][:3] == new_ids


def test_a_remix_and_an_edit_keep_size_and_length(client, video):
    remix = client.videos.remix(video.id, prompt="make it blue")
    edit = client.videos.edit(prompt="make it green", **refer_to_video(video.id))
    for requested, source in ((remix, video.id), (edit, None)):
        done = client.videos.poll(requested.id)
        assert (done.status, done.size, done.remixed_from_video_id) == ("completed", "32x32", source)
    frames = {hashlib.sha256(client.videos.download_content(one.id).read()).hexdigest() for one in (video, remix, edit)}
    assert len(frames) == 3


@pytest.mark.parametrize("way", ["image", "clip", "file_id", "image_url", "json"])
def test_an_input_reference_is_edited(client, http, context, way):
    if way == "json":
        url = "data:image/png;base64," + base64.b64encode(make_png()).decode()
        body = {"prompt": "make it move", "size": "32x32", "input_reference": {"image_url": url}} | QUICK
        name = http.post("/v1/videos", json=body).json()["id"]
    else:
        reference = {
            "image": lambda: ("a.png", make_png()), "clip": lambda: ("b.mp4", make_mp4()),
            "file_id": lambda: {"file_id": client.files.create(file=("c.png", make_png()), purpose="vision").id},
            "image_url": lambda: {"image_url": "data:image/png;base64," + base64.b64encode(make_png()).decode()},
        }[way]()  # fmt: skip
        given = {"input_reference": reference} if isinstance(reference, tuple) else {}
        more = QUICK | ({} if given else {"input_reference": reference})
        name = client.videos.create(prompt="make it move", size="32x32", extra_body=more, **given).id
    job = context.jobs.get_status(name).job
    assert (job.task, job.source.medium) == ("video-editing", "video" if way == "clip" else "image")
    assert client.videos.poll(name).status == "completed"


def test_an_uploaded_clip_is_edited(client):
    edit = client.videos.edit(prompt="make it blue", video=("b.mp4", make_mp4()), extra_body={"num_inference_steps": 1})
    assert edit.size == "64x64" and client.videos.poll(edit.id).status == "completed"


def test_a_deleted_video_is_gone(client):
    created = client.videos.create_and_poll(prompt="a ball", **SMALL)
    deletion = client.videos.delete(created.id)
    assert (deletion.id, deletion.deleted, deletion.object) == (created.id, True, "video.deleted")
    for call in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
        with pytest.raises(openai.NotFoundError):
            call(created.id)
    assert created.id not in [video.id for video in client.videos.list(limit=100)]


def test_a_running_video_is_stopped_by_cancel_and_by_delete(client, http, context):
    first, second = (client.videos.create(prompt="a ball", extra_body={"num_inference_steps": 200}) for _ in range(2))
    wait_until(lambda: context.jobs.get_status(first.id).step)
    seen = http.get(f"/v1/videos/{first.id}")
    assert seen.json()["status"] == "in_progress" and 100 <= int(seen.headers["openai-poll-after-ms"]) <= 1000
    assert http.post(f"/v1/videos/{first.id}/cancel").status_code == 200
    assert client.videos.poll(first.id).status == "cancelled"
    assert http.get(f"/v1/videos/{first.id}/content").json()["error"]["code"] == "not_ready"
    wait_until(lambda: context.jobs.get_status(second.id).step)
    client.videos.delete(second.id)
    wait_until(lambda: context.jobs.get_status(second.id).state == "cancelled")


def test_a_failed_video_reports_its_error(client, service, context, monkeypatch):
    def broken(job):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(service[0].worker.renderer, "prepare_job", broken)
        failed = client.videos.create_and_poll(prompt="a ball", **SMALL)
    assert failed.status == "failed" and failed.error.code == "out_of_memory" and "memory" in failed.error.message


def test_extending_is_refused(client, video):
    with pytest.raises(openai.BadRequestError, match="video: tiny cannot do video-extension") as refused:
        client.videos.extend(prompt="on", seconds="4", **refer_to_video(video.id))
    assert (refused.value.code, refused.value.param) == ("unsupported", "video")
    assert "its tasks are text-to-video, video-editing" in str(refused.value)


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        ("bytes=0-9", 206, slice(0, 10)),
        ("bytes=10-", 206, slice(10, None)),
        ("bytes=-7", 206, slice(-7, None)),
        ("bytes=0-999999999", 206, slice(None)),
        ("bytes=999999999-", 416, None),
        ("bytes=5-2", 416, None),
        ("bytes=x", 200, slice(None)),
        ("bytes=0-1,4-5", 200, slice(None)),
        (None, 200, slice(None)),
    ],
)
def test_ranges_of_a_video_are_downloaded(http, video, asked, status, part):
    where = f"/v1/videos/{video.id}/content"
    whole = http.get(where)
    answer = http.get(where, headers={"Range": asked} if asked else {})
    assert answer.status_code == status and answer.headers["accept-ranges"] == "bytes"
    if part is None:
        assert answer.headers["content-range"] == f"bytes */{len(whole.content)}" and not answer.content
    else:
        assert answer.content == whole.content[part]


def test_a_range_of_changed_content_returns_all_of_it(http, video):
    where = f"/v1/videos/{video.id}/content"
    whole = http.get(where)
    same = http.get(where, headers={"Range": "bytes=0-3", "If-Range": whole.headers["etag"]})
    other = http.get(where, headers={"Range": "bytes=0-3", "If-Range": '"other"'})
    assert (same.status_code, other.status_code, other.content) == (206, 200, whole.content)
    assert http.get(where, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304


# ---------------------------------------------------------------- permissions


def test_every_route_requires_a_key(service):
    """Also with a signature that signs nothing: links have one in place of a key."""
    with httpx.Client(base_url=service[2], trust_env=False) as http:
        paths = http.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()["paths"]
        routes = [(method, path) for path, methods in paths.items() if path.startswith("/v1/") for method in methods]
        assert len(routes) > 50
        for method, path in routes:
            path = re.sub(r"\{\w+\}", "x", path)
            for key, query in ((None, ""), ("wrong", ""), (None, "?signature=x&expires=9999999999&owner=admin")):
                given = {"Authorization": f"Bearer {key}"} if key else {}
                answer = http.request(method, path + query, headers=given)
                code = answer.json()["error"]["code"]
                assert answer.status_code in ((401, 403) if query else (401,)), (method, path)
                assert query or code == "invalid_api_key", (method, path)


def test_the_resources_of_other_owners_are_not_found(client, stranger, video):
    file = client.files.create(file=("lines.jsonl", make_lines(1)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")
    hook = client.webhooks.create(name="mine", url="http://localhost/", event_types=["video.failed"])
    calls = [
        lambda: stranger.videos.retrieve(video.id), lambda: stranger.videos.delete(video.id),
        lambda: stranger.videos.download_content(video.id), lambda: stranger.videos.remix(video.id, prompt="a"),
        lambda: stranger.files.retrieve(file.id), lambda: stranger.files.content(file.id),
        lambda: stranger.files.delete(file.id), lambda: stranger.batches.retrieve(batch.id),
        lambda: stranger.batches.cancel(batch.id), lambda: stranger.webhooks.retrieve(hook.id),
        lambda: stranger.webhooks.delete(hook.id),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call()
    for refused in (
        lambda: stranger.videos.edit(prompt="a", **refer_to_video(video.id)),
        lambda: stranger.videos.create(prompt="a", extra_body={"input_reference": {"file_id": file.id}}),
        lambda: stranger.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h"),
    ):
        with pytest.raises(openai.BadRequestError, match="there is no"):
            refused()
    assert not [*stranger.videos.list(), *stranger.files.list(), *stranger.batches.list(), *stranger.webhooks.list()]
    client.batches.cancel(batch.id)
    client.webhooks.delete(hook.id)


def test_a_full_queue_answers_with_retry_after(service, client, http, context, monkeypatch):
    with pause_worker(service[0]), monkeypatch.context() as patched:
        patched.setattr(context.jobs, "defaults", context.jobs.defaults.model_copy(update={"open_jobs": 1}))
        first = client.videos.create(prompt="a ball", **SMALL)
        answer = http.post("/v1/videos", json={"prompt": "another"})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        images = http.post("/v1/images/generations", json={"prompt": "another", "n": 2})
        assert images.status_code == 429
    assert client.videos.poll(first.id).status == "completed"


# ---------------------------------------------------------------- invalid fields

WRONG_VIDEOS = [
    ({"prompt": ""}, "prompt"), ({"prompt": " "}, "prompt"), ({"prompt": "a" * 4001}, "prompt"),
    ({"prompt": "a\0b"}, "prompt"), ({"prompt": 7}, "prompt"), ({"prompt": None}, "prompt"),
    ({"model": "sora-2"}, "model"), ({"size": "32"}, "size"), ({"size": "33x32"}, "size"), ({"size": "0x0"}, "size"),
    ({"size": "4096x4096"}, "size"), ({"seconds": "x"}, "seconds"), ({"seconds": "0"}, "seconds"),
    ({"seconds": "-1"}, "seconds"), ({"seconds": "1e9"}, "seconds"), ({"seconds": "nan"}, "seconds"),
    ({"seconds": "0.01"}, "seconds"), ({"seconds": "100"}, "seconds"), ({"seconds": "4", "fps": 8}, "seconds"),
    ({"seconds": "4", "num_frames": 9, "fps": 8}, "seconds"), ({"seconds": "30"}, "seconds"),
    ({"num_frames": 10}, "num_frames"), ({"num_frames": 1}, "num_frames"), ({"num_frames": 245}, "num_frames"),
    ({"num_frames": 2.5}, "num_frames"), ({"fps": 0}, "fps"), ({"fps": 61}, "fps"), ({"fps": "many"}, "fps"),
    ({"num_inference_steps": 0}, "num_inference_steps"), ({"num_inference_steps": 201}, "num_inference_steps"),
    ({"guidance_scale": -1}, "guidance_scale"), ({"guidance_scale": "inf"}, "guidance_scale"),
    ({"flow_shift": 0}, "flow_shift"), ({"seed": -2}, "seed"), ({"seed": 2**63}, "seed"),
    ({"negative_prompt": "a" * 4001}, "negative_prompt"), ({"input_reference": {}}, "input_reference"),
    ({"input_reference": "a.png"}, "input_reference"),
    ({"input_reference": {"file_id": "x"}}, "input_reference.file_id"),
    ({"input_reference": {"image_url": "x", "file_id": "x"}}, "input_reference"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "field"), WRONG_VIDEOS, ids=lambda case: str(case)[:40])
def test_an_invalid_video_request_is_refused_with_the_name_of_the_field(http, wrong, field):
    answer = http.post("/v1/videos", json={"prompt": "a ball"} | wrong)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, field, "invalid_value"), error
    assert error["message"].startswith(f"{field}: ") and answer.headers["x-request-id"]


WRONG = [
    ("/v1/images/generations", {"prompt": "a", "n": 0}, "n"), ("/v1/images/generations", {"prompt": "a", "n": 9}, "n"),
    ("/v1/images/generations", {"prompt": "a", "size": "8x8"}, "size"),
    ("/v1/images/generations", {"prompt": "a", "response_format": "x"}, "response_format"),
    ("/v1/images/generations", {"prompt": "a", "output_format": "gif"}, "output_format"),
    ("/v1/images/generations", {"prompt": "a", "stream": True}, "stream"),
    ("/v1/images/generations", {}, "prompt"), ("/v1/images/edits", {"prompt": "a"}, "image"),
    ("/v1/videos/edits", {"prompt": "a"}, "video"),
    ("/v1/videos/edits", {"prompt": "a", "video": {"id": "x"}}, "video.id"),
    ("/v1/batches", {}, "input_file_id"),
    ("/v1/batches", {"input_file_id": "x", "endpoint": "/v1/videos", "completion_window": "24h"}, "input_file_id"),
    ("/v1/batches", {"input_file_id": "x", "endpoint": "/v1/embeddings", "completion_window": "24h"}, "endpoint"),
    ("/v1/batches", {"input_file_id": "x", "endpoint": "/v1/videos", "completion_window": "1h"}, "completion_window"),
    ("/v1/webhooks", {}, "url"), ("/v1/webhooks", {"url": "https://1.1.1.1", "event_types": ["x"]}, "event_types.0"),
    ("/v1/files", {"purpose": "batch"}, "file"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "field"), WRONG, ids=lambda case: str(case)[:40])
def test_other_invalid_requests_are_refused_with_the_name_of_the_field(http, path, body, field):
    answer = http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up", "after=nothing", "after=%00"])
def test_an_invalid_page_is_refused(http, query):
    answer = http.get(f"/v1/videos?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, query.partition("=")[0])


# ---------------------------------------------------------------- repeated requests


def post_video(http, key: str, **body) -> httpx.Response:
    return http.post(
        "/v1/videos", json={"prompt": "a ball", "size": "32x32"} | QUICK | body, headers={"Idempotency-Key": key}
    )


def test_the_same_key_returns_the_same_video(http, context):
    first, again = post_video(http, "one").json(), post_video(http, "one").json()
    assert first["id"] == again["id"] != post_video(http, "two").json()["id"]
    other = post_video(http, "one", prompt="a star")
    assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency_key_reused"
    assert (
        post_video(http, "one", seed=7).status_code == 422
        and post_video(http, "one", seconds="1", num_frames=None).status_code == 422
    )


def test_concurrent_requests_with_one_key_create_one_video(http):
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(post_video(http, "twins"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {200} and len({answer.json()["id"] for answer in answers}) == 1


def test_the_same_key_of_another_owner_creates_another_video(client, stranger):
    headers = {"Idempotency-Key": "shared"}
    video_ids = {user.videos.create(prompt="a ball", **SMALL, extra_headers=headers).id for user in (client, stranger)}
    assert len(video_ids) == 2


def test_the_same_key_returns_the_same_images_and_batch(http, client):
    given = {"Idempotency-Key": "images"}
    body = {"prompt": "a star", "size": "32x32", "num_inference_steps": 1, "n": 2}
    first, again = (http.post("/v1/images/generations", json=body, headers=given) for _ in range(2))
    assert first.json() == again.json() and len({one["b64_json"] for one in first.json()["data"]}) == 2
    assert http.post("/v1/images/generations", json=body | {"n": 3}, headers=given).status_code == 422
    file = client.files.create(file=("a.jsonl", make_lines(1)), purpose="batch")
    asked = {"input_file_id": file.id, "endpoint": "/v1/videos", "completion_window": "24h"}
    batches = {client.batches.create(**asked, extra_headers={"Idempotency-Key": "b"}).id for _ in range(2)}
    assert len(batches) == 1
    assert (
        http.post("/v1/batches", json=asked | {"metadata": {"a": "b"}}, headers={"Idempotency-Key": "b"}).status_code
        == 422
    )
    client.batches.cancel(batches.pop())


def test_the_same_key_returns_the_same_file(http, client):
    def upload(data: bytes) -> httpx.Response:
        form = {"files": {"file": ("a", data)}, "data": {"purpose": "user_data"}}
        return http.post("/v1/files", headers={"Idempotency-Key": "file"}, **form)

    first, again = upload(b"one").json(), upload(b"one").json()
    assert first == again and client.files.content(first["id"]).read() == b"one"
    assert upload(b"two").status_code == 422


# ---------------------------------------------------------------- images


def test_images_are_generated(client):
    images = client.images.generate(
        prompt="a star", n=2, size="32x32", extra_body={"num_inference_steps": 1, "seed": 4}
    )
    files = [base64.b64decode(image.b64_json) for image in images.data]
    assert [Image.open(io.BytesIO(file)).size for file in files] == [(32, 32)] * 2 and files[0] != files[1]
    assert (images.size, images.output_format) == ("32x32", "png")
    second = client.images.generate(prompt="a star", size="32x32", extra_body={"num_inference_steps": 1, "seed": 5})
    assert base64.b64decode(second.data[0].b64_json) == files[1]


def test_an_image_is_returned_as_a_url(client, http):
    made = client.images.generate(
        prompt="a star", size="32x32", response_format="url", extra_body={"num_inference_steps": 1}
    )
    answer = http.get(made.data[0].url)
    assert answer.headers["content-type"] == "image/png" and Image.open(io.BytesIO(answer.content)).size == (32, 32)


def test_an_image_is_edited(client):
    for image in (("a.png", make_png()), [("a.png", make_png())]):
        made = client.images.edit(image=image, prompt="make it blue", extra_body={"num_inference_steps": 1})
        assert Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json))).size == (64, 64)
    with pytest.raises(openai.BadRequestError, match="image: it is a clip"):
        client.images.edit(image=("a.mp4", make_mp4()), prompt="make it blue")


def test_images_are_cancelled_when_the_client_disconnects(service, context):
    with make_client(service) as client, pytest.raises(openai.APITimeoutError):
        client.images.generate(prompt="gone", extra_body={"num_inference_steps": 200}, timeout=0.4)
    (job,), _ = context.jobs.list_owned_jobs("admin", "image", None, 1, True)
    assert job.job.prompt == "gone"
    wait_until(lambda: context.jobs.get_status(job.id).state == "cancelled")


# ---------------------------------------------------------------- files


def test_files_are_stored_listed_and_deleted(client):
    stored = client.files.create(file=("my notes.txt", b"<script>"), purpose="user_data")
    assert (stored.filename, stored.bytes, stored.purpose, stored.object) == ("my notes.txt", 8, "user_data", "file")
    answer = client.files.content(stored.id)
    assert answer.read() == b"<script>" and answer.response.headers["content-type"] == "application/octet-stream"
    assert answer.response.headers["x-content-type-options"] == "nosniff"
    assert answer.response.headers["content-disposition"] == "attachment; filename*=UTF-8''my%20notes.txt"
    picture = client.files.create(file=("a.png", make_png()), purpose="vision")
    assert client.files.content(picture.id).response.headers["content-type"] == "image/png"
    assert next(one.id for one in client.files.list(purpose="vision", limit=1)) == picture.id
    everything = [one.id for one in client.files.list(limit=1)]
    assert everything[:2] == [picture.id, stored.id]
    assert client.files.delete(stored.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(stored.id)


def test_a_vision_file_must_be_an_image_or_a_clip(client):
    with pytest.raises(openai.BadRequestError, match=r"file: 'a\.png' is not an image or video"):
        client.files.create(file=("a.png", b"text"), purpose="vision")
    for purpose in ("user_data", "assistants"):
        stored = client.files.create(file=("a.png", b"text"), purpose=purpose)
        assert stored.purpose == purpose
    with pytest.raises(openai.BadRequestError, match=r"input_reference.file_id: that file is not an image or a clip"):
        client.videos.create(prompt="a", extra_body={"input_reference": {"file_id": stored.id}})


def test_the_openapi_document_describes_forms(http):
    document = http.get("/openapi.json").json()
    for path in ("/v1/videos", "/v1/videos/edits", "/v1/images/edits", "/v1/files"):
        assert "multipart/form-data" in document["paths"][path]["post"]["requestBody"]["content"]
    assert "$defs" not in json.dumps(document)

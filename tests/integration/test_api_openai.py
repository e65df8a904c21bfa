"""The unmodified openai client against the service: videos, images, files, batches, webhooks."""

import base64
import hashlib
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from omnivideo.api.batches import Lines
from omnivideo.backends.batches import BatchRunner
from omnivideo.backends.decoder.video import read_media
from omnivideo.backends.hooks import HookSender, reachable
from omnivideo.backends.media import encoded
from omnivideo.backends.pictures import pictures
from omnivideo.errors import InvalidInput
from omnivideo.storage.jobs import Jobs
from tests.integration.api_server import scripted, serving

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
KEY = "an-admin-key-for-tests"
QUICK = {"num_inference_steps": 1, "num_frames": 5}
SMALL = {"size": "32x32", "extra_body": QUICK}


@contextmanager
def service_in(folder, omni, **given) -> Iterator[tuple]:
    """The wiring, its rooms and the address of a service that draws with an untrained model."""
    wiring = scripted(folder, omni, admin_key=KEY, **given)
    rooms = wiring.rooms()
    rooms.pictured = pictures(wiring.store)
    rooms.reachable = partial(reachable, inside=("localhost",))
    wiring.rooms = lambda: rooms  # type: ignore[method-assign]
    with serving(wiring) as address:
        yield wiring, rooms, address


@pytest.fixture(scope="module")
def service(omni, tmp_path_factory):
    with service_in(tmp_path_factory.mktemp("openai"), omni) as made:
        yield made


@pytest.fixture(scope="module")
def rooms(service):
    return service[1]


def client_for(service, key: str = KEY) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{service[2]}/v1", api_key=key, max_retries=0, http_client=http, timeout=60)


@pytest.fixture(scope="module")
def client(service):
    with client_for(service) as client:
        yield client


@pytest.fixture(scope="module")
def stranger(service, rooms):
    """Another owner's client."""
    _, key = rooms.keys.add("stranger")
    with client_for(service, key) as client:
        yield client


@pytest.fixture(scope="module")
def http(service):
    """For what the openai client has no words for."""
    given = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=service[2], headers=given, timeout=60, trust_env=False) as http:
        yield http


@pytest.fixture(scope="module")
def video(client):
    """A completed one."""
    return client.videos.create_and_poll(prompt="a red ball", seconds="1", size="32x32", extra_body={"fps": 8})


def by_id(video_id: str) -> dict:
    """A video that is here: the client's own types know this form, its check for files refuses it."""
    return {"video": openai.omit, "extra_body": {"video": {"id": video_id}}}


def png(colour: int = 200, size: int = 64) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), colour, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def mp4() -> bytes:
    return encoded(np.full((9, 64, 64, 3), 90, dtype=np.uint8), 8)[0]


def until(is_so, seconds: float = 30.0):
    """What `is_so` gives once it is something."""
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)
    return found


@contextmanager
def nobody_works(wiring) -> Iterator[None]:
    """Jobs stay where they are."""
    claim, wiring.worker.jobs.claim = wiring.worker.jobs.claim, lambda worker: None
    try:
        yield
    finally:
        wiring.worker.jobs.claim = claim
        wiring.tell()


# ---------------------------------------------------------------- videos


def test_a_video_is_created_polled_and_described(client, video):
    assert (video.status, video.progress, video.size, video.seconds) == ("completed", 100, "32x32", "1")
    assert (video.model, video.prompt, video.error) == ("tiny", "a red ball", None)
    assert video.created_at <= video.completed_at < video.expires_at
    assert client.videos.retrieve(video.id) == video


def test_a_videos_content_in_all_variants(client, video, tmp_path):
    path = tmp_path / "clip.mp4"
    client.videos.download_content(video.id).write_to_file(path)
    assert read_media(path).frames.shape == (9, 32, 32, 3)  # 1 s at 8 fps is 9 frames: 4k + 1
    kinds = {}
    for variant in ("video", "thumbnail", "spritesheet"):
        answer = client.videos.download_content(video.id, variant=variant)
        kinds[variant] = answer.response.headers["content-type"]
        if variant != "video":
            size = Image.open(io.BytesIO(answer.read())).size
            assert size == {"thumbnail": (32, 32), "spritesheet": (96, 96)}[variant]
    assert kinds == {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}


def test_videos_are_listed_in_pages(client, video):
    made = [client.videos.create(prompt=f"ball {at}", **SMALL).id for at in range(3)]
    page = client.videos.list(limit=2)
    assert [one.id for one in page.data] == made[:0:-1] and page.has_more and page.last_id == made[1]
    everything = [one.id for one in client.videos.list(limit=2)]
    assert everything[:3] == made[::-1] and video.id in everything and len(set(everything)) == len(everything)
    assert [one.id for one in client.videos.list(order="asc", after=video.id, limit=3)][:3] == made


def test_a_remix_and_an_edit_keep_size_and_length(client, video):
    remix = client.videos.remix(video.id, prompt="make it blue")
    edit = client.videos.edit(prompt="make it green", **by_id(video.id))
    for asked, source in ((remix, video.id), (edit, None)):
        done = client.videos.poll(asked.id)
        assert (done.status, done.size, done.remixed_from_video_id) == ("completed", "32x32", source)
    frames = {hashlib.sha256(client.videos.download_content(one.id).read()).hexdigest() for one in (video, remix, edit)}
    assert len(frames) == 3


@pytest.mark.parametrize("way", ["image", "clip", "file_id", "image_url", "json"])
def test_an_input_reference_is_edited(client, http, rooms, way):
    if way == "json":
        url = "data:image/png;base64," + base64.b64encode(png()).decode()
        body = {"prompt": "make it move", "size": "32x32", "input_reference": {"image_url": url}} | QUICK
        name = http.post("/v1/videos", json=body).json()["id"]
    else:
        reference = {
            "image": lambda: ("a.png", png()), "clip": lambda: ("b.mp4", mp4()),
            "file_id": lambda: {"file_id": client.files.create(file=("c.png", png()), purpose="vision").id},
            "image_url": lambda: {"image_url": "data:image/png;base64," + base64.b64encode(png()).decode()},
        }[way]()  # fmt: skip
        given = {"input_reference": reference} if isinstance(reference, tuple) else {}
        more = QUICK | ({} if given else {"input_reference": reference})
        name = client.videos.create(prompt="make it move", size="32x32", extra_body=more, **given).id
    job = rooms.jobs.status(name).job
    assert (job.task, job.source.medium) == ("video-editing", "video" if way == "clip" else "image")
    assert client.videos.poll(name).status == "completed"


def test_an_uploaded_clip_is_edited(client):
    asked = client.videos.edit(prompt="make it blue", video=("b.mp4", mp4()), extra_body={"num_inference_steps": 1})
    assert asked.size == "64x64" and client.videos.poll(asked.id).status == "completed"


def test_a_deleted_video_is_gone(client):
    made = client.videos.create_and_poll(prompt="a ball", **SMALL)
    gone = client.videos.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "video.deleted")
    for act in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
        with pytest.raises(openai.NotFoundError):
            act(made.id)
    assert made.id not in [one.id for one in client.videos.list(limit=100)]


def test_a_running_video_is_stopped_by_cancel_and_by_delete(client, http, rooms):
    first, second = (client.videos.create(prompt="a ball", extra_body={"num_inference_steps": 200}) for _ in range(2))
    until(lambda: rooms.jobs.status(first.id).step)
    seen = http.get(f"/v1/videos/{first.id}")
    assert seen.json()["status"] == "in_progress" and 100 <= int(seen.headers["openai-poll-after-ms"]) <= 1000
    assert http.post(f"/v1/videos/{first.id}/cancel").status_code == 200
    assert client.videos.poll(first.id).status == "cancelled"
    assert http.get(f"/v1/videos/{first.id}/content").json()["error"]["code"] == "not_ready"
    until(lambda: rooms.jobs.status(second.id).step)
    client.videos.delete(second.id)
    until(lambda: rooms.jobs.status(second.id).state == "cancelled")


def test_a_failed_video_says_why(client, service, rooms, monkeypatch):
    def broken(job):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(service[0].worker.painter, "ready", broken)
        failed = client.videos.create_and_poll(prompt="a ball", **SMALL)
    assert failed.status == "failed" and failed.error.code == "out_of_memory" and "memory" in failed.error.message


def test_extending_is_said_to_be_impossible(client, video):
    with pytest.raises(openai.BadRequestError, match="cannot continue a clip") as refused:
        client.videos.extend(prompt="on", seconds="4", **by_id(video.id))
    assert refused.value.code == "unsupported"


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
def test_ranges_of_a_video(http, video, asked, status, part):
    where = f"/v1/videos/{video.id}/content"
    whole = http.get(where)
    answer = http.get(where, headers={"Range": asked} if asked else {})
    assert answer.status_code == status and answer.headers["accept-ranges"] == "bytes"
    if part is None:
        assert answer.headers["content-range"] == f"bytes */{len(whole.content)}" and not answer.content
    else:
        assert answer.content == whole.content[part]


def test_a_range_of_what_has_changed_is_the_whole(http, video):
    where = f"/v1/videos/{video.id}/content"
    whole = http.get(where)
    same = http.get(where, headers={"Range": "bytes=0-3", "If-Range": whole.headers["etag"]})
    other = http.get(where, headers={"Range": "bytes=0-3", "If-Range": '"other"'})
    assert (same.status_code, other.status_code, other.content) == (206, 200, whole.content)
    assert http.get(where, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304


# ---------------------------------------------------------------- who may

ROUTES = [
    ("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", "/v1/videos/x/content"), ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"), ("GET", "/v1/files"), ("POST", "/v1/files"), ("POST", "/v1/batches"),
    ("GET", "/v1/batches"), ("POST", "/v1/webhooks"), ("DELETE", "/v1/webhooks/x"), ("POST", "/v1/videos/extensions"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_key_is_asked_for_everywhere(service, method, path):
    for key in (None, "wrong"):
        given = {"Authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(base_url=service[2], headers=given, trust_env=False) as http:
            answer = http.request(method, path)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"


def test_what_is_anothers_is_not_there(client, stranger, video):
    file = client.files.create(file=("lines.jsonl", lines(1)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")
    hook = client.webhooks.create(name="mine", url="http://localhost/", event_types=["video.failed"])
    acts = [
        lambda: stranger.videos.retrieve(video.id), lambda: stranger.videos.delete(video.id),
        lambda: stranger.videos.download_content(video.id), lambda: stranger.videos.remix(video.id, prompt="a"),
        lambda: stranger.files.retrieve(file.id), lambda: stranger.files.content(file.id),
        lambda: stranger.files.delete(file.id), lambda: stranger.batches.retrieve(batch.id),
        lambda: stranger.batches.cancel(batch.id), lambda: stranger.webhooks.retrieve(hook.id),
        lambda: stranger.webhooks.delete(hook.id),
    ]  # fmt: skip
    for act in acts:
        with pytest.raises(openai.NotFoundError):
            act()
    for refused in (
        lambda: stranger.videos.edit(prompt="a", **by_id(video.id)),
        lambda: stranger.videos.create(prompt="a", extra_body={"input_reference": {"file_id": file.id}}),
        lambda: stranger.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h"),
    ):
        with pytest.raises(openai.BadRequestError, match="there is no"):
            refused()
    assert not [*stranger.videos.list(), *stranger.files.list(), *stranger.batches.list(), *stranger.webhooks.list()]
    client.batches.cancel(batch.id)
    client.webhooks.delete(hook.id)


def test_limits_are_said_with_when_to_try_again(service, client, http, rooms, monkeypatch):
    with nobody_works(service[0]), monkeypatch.context() as patched:
        patched.setattr(rooms.jobs, "most_each", 1)
        first = client.videos.create(prompt="a ball", **SMALL)
        answer = http.post("/v1/videos", json={"prompt": "another"})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        images = http.post("/v1/images/generations", json={"prompt": "another", "n": 2})
        assert images.status_code == 429
    assert client.videos.poll(first.id).status == "completed"


# ---------------------------------------------------------------- what is wrong is named

WRONG_VIDEOS = [
    ({"prompt": ""}, "prompt"), ({"prompt": " "}, "prompt"), ({"prompt": "a" * 4001}, "prompt"),
    ({"prompt": "a\0b"}, "prompt"), ({"prompt": 7}, "prompt"), ({"prompt": None}, "prompt"),
    ({"model": "sora-2"}, "model"), ({"size": "32"}, "size"), ({"size": "33x32"}, "size"), ({"size": "0x0"}, "size"),
    ({"size": "1280x1280"}, "size"), ({"seconds": "x"}, "seconds"), ({"seconds": "0"}, "seconds"),
    ({"seconds": "-1"}, "seconds"), ({"seconds": "1e9"}, "seconds"), ({"seconds": "nan"}, "seconds"),
    ({"seconds": "0.01"}, "seconds"), ({"seconds": "100"}, "seconds"), ({"seconds": "4", "num_frames": 9}, "seconds"),
    ({"num_frames": 8}, "num_frames"), ({"num_frames": 1}, "num_frames"), ({"num_frames": 245}, "num_frames"),
    ({"num_frames": 2.5}, "num_frames"), ({"fps": 0}, "fps"), ({"fps": 61}, "fps"), ({"fps": "many"}, "fps"),
    ({"num_inference_steps": 0}, "num_inference_steps"), ({"num_inference_steps": 201}, "num_inference_steps"),
    ({"guidance_scale": -1}, "guidance_scale"), ({"guidance_scale": "inf"}, "guidance_scale"),
    ({"flow_shift": 0}, "flow_shift"), ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"),
    ({"negative_prompt": "a" * 4001}, "negative_prompt"), ({"input_reference": {}}, "input_reference"),
    ({"input_reference": "a.png"}, "input_reference"),
    ({"input_reference": {"file_id": "x"}}, "input_reference.file_id"),
    ({"input_reference": {"image_url": "x", "file_id": "x"}}, "input_reference"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "field"), WRONG_VIDEOS, ids=lambda case: str(case)[:40])
def test_a_wrong_video_is_refused_with_the_fields_name(http, wrong, field):
    answer = http.post("/v1/videos", json={"prompt": "a ball"} | wrong)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, field, "invalid_value"), error
    assert error["message"].startswith(f"{field}: ") and answer.headers["x-request-id"]


WRONG = [
    ("/v1/images/generations", {"prompt": "a", "n": 0}, "n"), ("/v1/images/generations", {"prompt": "a", "n": 9}, "n"),
    ("/v1/images/generations", {"prompt": "a", "size": "17x17"}, "size"),
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
def test_what_is_wrong_elsewhere_is_named_too(http, path, body, field):
    answer = http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up", "after=nothing", "after=%00"])
def test_a_wrong_page_is_refused(http, query):
    answer = http.get(f"/v1/videos?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, query.partition("=")[0])


# ---------------------------------------------------------------- the same request again


def posted(http, key: str, **body) -> httpx.Response:
    return http.post(
        "/v1/videos", json={"prompt": "a ball", "size": "32x32"} | QUICK | body, headers={"Idempotency-Key": key}
    )


def test_the_same_key_is_the_same_video(http, rooms):
    first, again = posted(http, "one").json(), posted(http, "one").json()
    assert first["id"] == again["id"] != posted(http, "two").json()["id"]
    other = posted(http, "one", prompt="a star")
    assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency_key_reused"
    assert (
        posted(http, "one", seed=7).status_code == 422
        and posted(http, "one", seconds="1", num_frames=None).status_code == 422
    )


def test_requests_at_the_same_time_are_one_video(http):
    answers: list[httpx.Response] = []
    twins = [threading.Thread(target=lambda: answers.append(posted(http, "twins"))) for _ in range(6)]
    for twin in twins:
        twin.start()
    for twin in twins:
        twin.join()
    assert {answer.status_code for answer in answers} == {200} and len({answer.json()["id"] for answer in answers}) == 1


def test_the_same_key_is_another_owners_other_video(client, stranger):
    given = {"extra_headers": {"Idempotency-Key": "shared"}}
    names = {one.videos.create(prompt="a ball", **SMALL, **given).id for one in (client, stranger)}
    assert len(names) == 2


def test_the_same_key_gives_the_same_images_and_batch(http, client):
    given = {"Idempotency-Key": "images"}
    body = {"prompt": "a star", "size": "32x32", "num_inference_steps": 1, "n": 2}
    first, again = (http.post("/v1/images/generations", json=body, headers=given) for _ in range(2))
    assert first.json() == again.json() and len({one["b64_json"] for one in first.json()["data"]}) == 2
    assert http.post("/v1/images/generations", json=body | {"n": 3}, headers=given).status_code == 422
    file = client.files.create(file=("a.jsonl", lines(1)), purpose="batch")
    asked = {"input_file_id": file.id, "endpoint": "/v1/videos", "completion_window": "24h"}
    batches = {client.batches.create(**asked, extra_headers={"Idempotency-Key": "b"}).id for _ in range(2)}
    assert len(batches) == 1
    assert (
        http.post("/v1/batches", json=asked | {"metadata": {"a": "b"}}, headers={"Idempotency-Key": "b"}).status_code
        == 422
    )
    client.batches.cancel(batches.pop())


def test_the_same_key_is_the_same_file(http, client):
    def sent(data: bytes) -> httpx.Response:
        form = {"files": {"file": ("a", data)}, "data": {"purpose": "user_data"}}
        return http.post("/v1/files", headers={"Idempotency-Key": "file"}, **form)

    first, again = sent(b"one").json(), sent(b"one").json()
    assert first == again and client.files.content(first["id"]).read() == b"one"
    assert sent(b"two").status_code == 422


# ---------------------------------------------------------------- images


def test_images_are_generated(client):
    made = client.images.generate(prompt="a star", n=2, size="32x32", extra_body={"num_inference_steps": 1, "seed": 4})
    pictures = [base64.b64decode(one.b64_json) for one in made.data]
    assert [Image.open(io.BytesIO(one)).size for one in pictures] == [(32, 32)] * 2 and pictures[0] != pictures[1]
    assert (made.size, made.output_format) == ("32x32", "png")
    second = client.images.generate(prompt="a star", size="32x32", extra_body={"num_inference_steps": 1, "seed": 5})
    assert base64.b64decode(second.data[0].b64_json) == pictures[1]


def test_an_image_comes_as_a_url_too(client, http):
    made = client.images.generate(
        prompt="a star", size="32x32", response_format="url", extra_body={"num_inference_steps": 1}
    )
    answer = http.get(made.data[0].url)
    assert answer.headers["content-type"] == "image/png" and Image.open(io.BytesIO(answer.content)).size == (32, 32)


def test_an_image_is_edited(client):
    for image in (("a.png", png()), [("a.png", png())]):
        made = client.images.edit(image=image, prompt="make it blue", extra_body={"num_inference_steps": 1})
        assert Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json))).size == (64, 64)
    with pytest.raises(openai.BadRequestError, match="image: it is a clip"):
        client.images.edit(image=("a.mp4", mp4()), prompt="make it blue")


def test_a_client_that_goes_away_stops_its_images(service, rooms):
    with client_for(service) as client, pytest.raises(openai.APITimeoutError):
        client.images.generate(prompt="gone", extra_body={"num_inference_steps": 200}, timeout=0.4)
    (job,), _ = rooms.records.jobs("admin", "image", None, 1, True)
    assert job.job.prompt == "gone"
    until(lambda: rooms.jobs.status(job.id).state == "cancelled")


# ---------------------------------------------------------------- files


def lines(count: int, url: str = "/v1/videos", **body) -> bytes:
    body = {"prompt": "a ball", "size": "32x32"} | (QUICK if url == "/v1/videos" else {"num_inference_steps": 1}) | body
    made = [{"custom_id": f"line {at}", "method": "POST", "url": url, "body": body} for at in range(count)]
    return b"".join(json.dumps(one).encode() + b"\n" for one in made)


def test_files_are_kept_listed_and_deleted(client):
    kept = client.files.create(file=("my notes.txt", b"<script>"), purpose="user_data")
    assert (kept.filename, kept.bytes, kept.purpose, kept.object) == ("my notes.txt", 8, "user_data", "file")
    answer = client.files.content(kept.id)
    assert answer.read() == b"<script>" and answer.response.headers["content-type"] == "application/octet-stream"
    assert answer.response.headers["x-content-type-options"] == "nosniff"
    assert answer.response.headers["content-disposition"] == "attachment; filename*=UTF-8''my%20notes.txt"
    picture = client.files.create(file=("a.png", png()), purpose="vision")
    assert client.files.content(picture.id).response.headers["content-type"] == "image/png"
    assert next(one.id for one in client.files.list(purpose="vision", limit=1)) == picture.id
    everything = [one.id for one in client.files.list(limit=1)]
    assert everything[:2] == [picture.id, kept.id]
    assert client.files.delete(kept.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(kept.id)


def test_a_file_that_is_no_picture_is_no_vision_file(client):
    with pytest.raises(openai.BadRequestError, match=r"file: 'a\.png' is no image or video"):
        client.files.create(file=("a.png", b"text"), purpose="vision")
    kept = client.files.create(file=("a.png", b"text"), purpose="user_data")
    with pytest.raises(openai.BadRequestError, match=r"input_reference.file_id: that file is no image or clip"):
        client.videos.create(prompt="a", extra_body={"input_reference": {"file_id": kept.id}})


# ---------------------------------------------------------------- batches


def say(owner: str, body: dict) -> dict:
    if body["messages"][0]["content"] == "bad":
        raise InvalidInput("messages", "they are bad")
    return {"object": "chat.completion", "owner": owner, "said": body["messages"][0]["content"]}


def runner_for(rooms, **given) -> BatchRunner:
    jobs = Jobs(rooms.records.engine)
    return BatchRunner(rooms.records, jobs, rooms.store, rooms.tell, Lines(rooms), say, **({"pause": 0.05} | given))


@pytest.fixture
def runner(rooms):
    runner = runner_for(rooms).start()
    yield runner
    runner.stop()


def batch_of(client, data: bytes, endpoint: str = "/v1/videos"):
    file = client.files.create(file=("lines.jsonl", data), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"for": "tests"}
    )


def ended(client, batch, *states: str):
    return until(lambda: (now := client.batches.retrieve(batch.id)).status in (states or ("completed",)) and now)


def told(client, file_id: str | None) -> list[dict]:
    return [json.loads(line) for line in client.files.content(file_id).read().splitlines()] if file_id else []


def test_a_batch_of_videos(client, runner):
    wrong = lines(1, num_frames=8).replace(b"line 0", b"wrong")
    batch = batch_of(client, lines(3) + b"\n" + wrong)
    assert batch.status == "validating" and batch.metadata == {"for": "tests"}
    done = ended(client, batch)
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (4, 3, 1)
    good, bad = told(client, done.output_file_id), told(client, done.error_file_id)
    assert [line["custom_id"] for line in good] == ["line 0", "line 1", "line 2"]
    for line in good:
        assert line["response"]["status_code"] == 200 and line["error"] is None
        assert client.videos.download_content(line["response"]["body"]["id"]).read()
    (line,) = bad
    assert line["custom_id"] == "wrong" and line["response"]["status_code"] == 400
    assert line["response"]["body"]["error"]["param"] == "num_frames"
    assert done.in_progress_at <= done.finalizing_at <= done.completed_at and done.expires_at
    assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
    assert next(one.id for one in client.batches.list(limit=1)) == batch.id


def test_a_batch_of_images_and_one_of_chat(client, http, runner):
    pictures = batch_of(client, lines(2, "/v1/images/generations", n=2), "/v1/images/generations")
    talk = b"".join(
        lines(1, "/v1/chat/completions", messages=[{"role": "user", "content": text}]).replace(b"line 0", text.encode())
        for text in ("hello", "bad")
    )
    chat = batch_of(client, talk, "/v1/chat/completions")
    for line in told(client, ended(client, pictures).output_file_id):
        urls = [one["url"] for one in line["response"]["body"]["data"]]
        assert len(urls) == 2 and all(http.get(url).headers["content-type"] == "image/png" for url in urls)
    done = ended(client, chat)
    assert told(client, done.output_file_id)[0]["response"]["body"]["said"] == "hello"
    assert told(client, done.error_file_id)[0]["response"]["body"]["error"]["param"] == "messages"


WRONG_LINES = [
    (b"{", "line: it is no JSON"), (b"[1]", "line: it is no JSON object"), (b"{}", "custom_id: field required"),
    (lines(1).replace(b"POST", b"GET"), "method: input should be 'POST'"),
    (lines(1, "/v1/images/generations"), "url: it is /v1/images/generations"),
    (lines(1).replace(b"/v1/videos", b"http://127.0.0.1/"), "url: input should be"),
    (lines(1).replace(b"line 0", b"line 1"), "custom_id: 'line 1' is an earlier line's, too"),
    (b'{"a":' * 100_000, "line: it is no JSON"),
]  # fmt: skip


def test_wrong_lines_fail_the_batch_with_their_numbers(client, runner):
    data = lines(2) + b"\n".join(line.strip() for line, _ in WRONG_LINES)
    failed = ended(client, batch_of(client, data), "failed")
    assert [one.line for one in failed.errors.data] == [at + 3 for at in range(len(WRONG_LINES))]
    for error, (_, text) in zip(failed.errors.data, WRONG_LINES, strict=True):
        assert error.message.startswith(text)
    assert not failed.output_file_id and failed.failed_at


def test_a_batch_without_lines_and_one_with_too_many(client, runner, monkeypatch):
    monkeypatch.setattr("omnivideo.backends.batches.MOST_LINES", 3)
    empty, full = (ended(client, batch_of(client, data), "failed") for data in (b"\n \n", lines(4)))
    assert [one.errors.data[0].code for one in (empty, full)] == ["empty", "too_many_lines"]


def test_a_batch_is_cancelled(client, service, rooms):
    runner = runner_for(rooms, most=2).start()
    try:
        with nobody_works(service[0]):
            batch = batch_of(client, lines(5))
            until(lambda: client.batches.retrieve(batch.id).status == "in_progress")
            assert client.batches.cancel(batch.id).status == "cancelling"
            done = ended(client, batch, "cancelled")
    finally:
        runner.stop()
    assert done.request_counts.failed == 5 and not done.output_file_id
    assert {line["error"]["code"] for line in told(client, done.error_file_id)} == {"batch_cancelled"}
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_a_batch_expires(client, service, rooms, monkeypatch):
    runner = runner_for(rooms, most=2)
    with nobody_works(service[0]):
        batch = batch_of(client, lines(4))
        for _ in range(3):
            runner.look()
        monkeypatch.setattr("omnivideo.backends.batches.WINDOW", -1.0)
        until(lambda: (runner.look(), client.batches.retrieve(batch.id).status == "expired")[1])
    done = client.batches.retrieve(batch.id)
    assert {line["error"]["code"] for line in told(client, done.error_file_id)} == {"batch_expired"}
    assert len(told(client, done.error_file_id)) == 4 and done.expired_at


def test_a_batch_waits_for_room(client, rooms):
    runner = runner_for(rooms)
    runner.jobs.most_each = 1
    runner.start()
    try:
        done = ended(client, batch_of(client, lines(4)))
    finally:
        runner.stop()
    assert len(told(client, done.output_file_id)) == 4 and not done.error_file_id


def deadly(act):
    """The act, after which its caller is no more: nothing there catches this."""

    def died(*given, **more):
        act(*given, **more)
        raise KeyboardInterrupt

    return died


def test_a_batch_whose_runner_dies_is_taken_over_and_no_line_is_done_twice(client, rooms, monkeypatch):
    """Each runner dies after a few rounds, in the middle of whatever it does; nothing of it is stopped or told."""
    drawn: list[str] = []
    submit = Jobs.submit
    monkeypatch.setattr(Jobs, "submit", lambda self, job, *rest: submit(self, job, *rest) and not drawn.append(job.id))
    batch = batch_of(client, lines(10))
    for at in range(60):
        runner = runner_for(rooms, most=4, silent=0.05)
        acts = ("keep_lines", "count", "move", "forget_lines", "add_file")
        dies = acts[at % len(acts)]
        with monkeypatch.context() as mortal:
            mortal.setattr(rooms.records, dies, deadly(getattr(rooms.records, dies)))
            try:
                for _ in range(4):
                    runner.look()
                    time.sleep(0.01)
            except KeyboardInterrupt:
                pass
        for name in list(runner.held):  # the system closes a dead process's files
            runner.let_go(name)
        time.sleep(0.06)
        if client.batches.retrieve(batch.id).status == "completed":
            break
    done = client.batches.retrieve(batch.id)
    assert done.status == "completed" and at > 3
    assert [line["custom_id"] for line in told(client, done.output_file_id)] == [f"line {at}" for at in range(10)]
    assert len(drawn) == len(set(drawn)) == 10 and (done.request_counts.completed, done.error_file_id) == (10, None)


def test_two_runners_share_what_there_is(client, rooms):
    runners = [runner_for(rooms).start() for _ in range(2)]
    try:
        batches = [batch_of(client, lines(3)) for _ in range(3)]
        for batch in batches:
            assert len(told(client, ended(client, batch).output_file_id)) == 3
    finally:
        for runner in runners:
            runner.stop()


# ---------------------------------------------------------------- webhooks


class Ear(BaseHTTPRequestHandler):
    """Hears webhooks; the server's `answers` are the first statuses, 200 afterwards."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append((self.path, dict(self.headers.items()), body))
        status = self.server.answers.pop(0) if self.server.answers else 200
        self.send_response(status)
        self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/elsewhere")
        self.send_header("Content-Length", "1000000000")
        self.end_headers()
        self.close_connection = True

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def ear():
    served = ThreadingHTTPServer(("127.0.0.1", 0), Ear)
    served.daemon_threads, served.block_on_close, served.heard, served.answers = True, False, [], []
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    served.address = f"http://localhost:{served.server_address[1]}"
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


@pytest.fixture
def sender(rooms):
    sender = HookSender(rooms.records, ("localhost",), pause=0.05, first=0.1).start()
    yield sender
    sender.stop()


def test_a_webhook_tells_of_completed_and_failed_videos(client, service, ear, sender, monkeypatch):
    hook = client.webhooks.create(
        name="mine", url=f"{ear.address}/a?b=c", event_types=["video.completed", "video.failed"]
    )
    assert hook.signing_secret.startswith("whsec_")
    (seen,) = client.webhooks.list()
    assert seen.id == hook.id and not hasattr(seen, "signing_secret")
    done = client.videos.create_and_poll(prompt="a ball", **SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(service[0].worker.painter, "ready", lambda job: (_ for _ in ()).throw(MemoryError))
        failed = client.videos.create_and_poll(prompt="a ball", **SMALL)
    until(lambda: len(ear.heard) == 2)
    client.webhooks.delete(hook.id)
    for (path, headers, body), video, kind in zip(
        ear.heard, (done, failed), ("video.completed", "video.failed"), strict=True
    ):
        event = client.webhooks.unwrap(body, headers, secret=hook.signing_secret)
        assert (path, event.type, event.data.id, event.object) == ("/a?b=c", kind, video.id, "event")
        assert event.id == headers["webhook-id"] and abs(event.created_at - time.time()) < 60
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body + b" ", headers, secret=hook.signing_secret)


def test_a_webhook_is_tried_again_and_never_sent_elsewhere(client, ear, sender):
    ear.answers[:] = [500, 302, 404]
    hook = client.webhooks.create(name="mine", url=ear.address, event_types=["video.completed"])
    client.videos.create_and_poll(prompt="a ball", **SMALL)
    until(lambda: len(ear.heard) == 4)
    time.sleep(0.3)
    client.webhooks.delete(hook.id)
    assert {path for path, _, _ in ear.heard} == {"/"} and len(ear.heard) == 4
    assert len({headers["webhook-id"] for _, headers, _ in ear.heard}) == 1
    assert len({body for _, _, body in ear.heard}) == 1


def test_an_end_is_announced_once_whoever_dies(client, rooms, ear):
    hook = client.webhooks.create(name="mine", url=ear.address, event_types=["video.completed"])
    sender = HookSender(rooms.records, ("localhost",))
    sender.announce()
    client.videos.create_and_poll(prompt="a ball", **SMALL)
    with pytest.MonkeyPatch.context() as mortal:
        mortal.setattr(rooms.records, "announced", lambda ids: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sender.announce()
    others = [HookSender(rooms.records, ("localhost",)) for _ in range(2)]
    for other in others:
        other.announce()
    for other in others:
        other.deliver()
    until(lambda: ear.heard)
    for other in others:
        other.pool.shutdown()
        other.deliver()
    time.sleep(0.1)
    client.webhooks.delete(hook.id)
    assert len(ear.heard) == 1


def test_the_wire_as_it_is_documented(http):
    document = http.get("/openapi.json").json()
    for path in ("/v1/videos", "/v1/videos/edits", "/v1/images/edits", "/v1/files"):
        assert "multipart/form-data" in document["paths"][path]["post"]["requestBody"]["content"]
    assert "$defs" not in json.dumps(document)

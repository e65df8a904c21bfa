"""Pictures that are animated and clips that are extended, over HTTP by the unmodified openai client and as JSON."""

import base64
import io

import numpy as np
import openai
import pytest

from omnivideo.manifests import Manifest
from omnivideo.media.artifacts import encode_clip
from omnivideo.media.read import read_media
from tests.support.continuations import declare_everywhere, declare_tasks, make_frames
from tests.support.openai_service import make_client, make_png, refer_to_video, run_service, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
STEP = {"num_inference_steps": 1}
PNG_URL = "data:image/png;base64," + base64.b64encode(make_png()).decode()


@pytest.fixture(scope="module")
def service(omni, tmp_path_factory):
    with declare_everywhere(), run_service(tmp_path_factory.mktemp("service"), declare_tasks(omni)) as made:
        yield made


@pytest.fixture(scope="module")
def video(client):
    return client.videos.create_and_poll(prompt="a ball", extra_body=STEP)


def get_job(context, video_id: str):
    return context.jobs.get_status(video_id).job


def read_clip(client, video_id: str) -> np.ndarray:
    return read_media(client.videos.download_content(video_id).read()).frames


@pytest.mark.parametrize("way", ["form", "json"])
def test_a_picture_is_animated(client, context, way):
    if way == "form":
        created = client.videos.create(prompt="it moves", input_reference=("a.png", make_png()), extra_body=STEP)
    else:
        body = STEP | {"input_reference": {"image_url": PNG_URL}}
        created = client.videos.create(prompt="it moves", extra_body=body)
    assert client.videos.poll(created.id).status == "completed"
    job = get_job(context, created.id)
    assert (job.task, job.source.medium, job.params.given_frames) == ("image-to-video", "image", 1)
    assert created.seconds == "1.125" and len(read_clip(client, created.id)) == 9


def test_the_task_of_a_picture_can_be_chosen(http, context):
    body = {"prompt": "make it blue", "input_reference": {"image_url": PNG_URL}, "task": "video-editing"} | STEP
    assert get_job(context, http.post("/v1/videos", json=body).json()["id"]).task == "video-editing"
    refused = http.post("/v1/videos", json={"prompt": "a", "task": "image-to-video"}).json()["error"]
    assert refused["param"] == "task" and "send one as input_reference" in refused["message"]


@pytest.mark.parametrize("way", ["form", "json"])
def test_a_clip_begins_with_one_picture_and_ends_with_another(http, context, way):
    fields = {"prompt": "from the first to the second", "num_inference_steps": "1"}
    if way == "form":
        files = {"input_reference": ("a.png", make_png()), "last_image": ("b.png", make_png(90))}
        response = http.post("/v1/videos", data=fields, files=files)
    else:
        pictures = {"input_reference": {"image_url": PNG_URL}, "last_image": {"image_url": PNG_URL}}
        response = http.post("/v1/videos", json=fields | pictures)
    job = get_job(context, response.json()["id"])
    assert (job.task, job.last_frame.medium) == ("keyframes-to-video", "image")
    wait_until(lambda: context.jobs.get_status(job.id).state == "done")
    assert job.last_frame.key in context.jobs.collect_referenced_keys(3600) or way == "json"


@pytest.mark.parametrize(("fields", "param", "message"), [
    ({"last_image": {"image_url": PNG_URL}}, "last_image", "begins with a picture; send an input_reference"),
    ({"last_image": {"file_id": "x"}, "input_reference": {"image_url": PNG_URL}}, "last_image.file_id", "no file"),
    ({"task": "keyframes-to-video"}, "task", "image-to-video"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(http, fields, param, message):
    response = http.post("/v1/videos", json={"prompt": "a"} | fields)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
    assert message in response.json()["error"]["message"]


def test_a_video_is_extended_and_extended_again(client, context, video):
    extended = client.videos.extend(prompt="go on", seconds="1", **refer_to_video(video.id, **STEP))
    assert extended.seconds == "2.125" and extended.size == video.size
    assert client.videos.poll(extended.id).status == "completed"
    again = client.videos.extend(prompt="go on", seconds="2", **refer_to_video(extended.id, **STEP))
    assert client.videos.poll(again.id).seconds == "4.125"
    first, second, third = (read_clip(client, one.id) for one in (video, extended, again))
    assert (len(first), len(second), len(third)) == (9, 17, 33)
    status = context.jobs.get_status(again.id)
    assert (status.step, status.steps, status.job.params.passes) == (2, 2, 2)
    manifest = Manifest.parse_stored(context.store.get(status.result.manifest))
    assert (manifest.task, manifest.delivered.frames) == ("video-extension", 33)


def test_an_uploaded_clip_of_odd_size_keeps_its_rate(client, http, context):
    data, _ = encode_clip(make_frames(12, 96, 50), 24)
    upload = ("a.mp4", io.BytesIO(data))
    extended = client.videos.extend(prompt="on", seconds="1", video=upload, extra_body=STEP | {"num_frames": 24})
    assert (extended.size, extended.seconds) == ("96x50", "1.5")
    assert client.videos.poll(extended.id).status == "completed"
    assert len(read_clip(client, extended.id)) == 36


@pytest.mark.parametrize(("fields", "param", "message"), [
    ({}, "video", "required"),
    ({"video": {"id": "x"}}, "video.id", "no video"),
    ({"video": {"image_url": PNG_URL}}, "video", "it is a picture"),
    ({"size": "128x128"}, "size", "keeps the size of its source, 64x64"),
    ({"fps": 24}, "fps", "keeps its 8 frames per second"),
    ({"seconds": 90}, "seconds", "720 frames would be added; allowed: 0.12 to 30.12"),
    ({"last_image": {"image_url": PNG_URL}}, "last_image", "not supported"),
])  # fmt: skip
def test_an_extension_that_is_not_possible_is_refused_by_name(http, video, fields, param, message):
    given = {} if not fields else {"video": {"id": video.id}} | fields
    response = http.post("/v1/videos/extensions", json={"prompt": "on"} | given)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
    assert message in response.json()["error"]["message"]


def test_a_clip_that_is_too_short_is_refused(http):
    data = {"prompt": "on"}
    response = http.post(
        "/v1/videos/extensions", data=data, files={"video": ("a.mp4", encode_clip(make_frames(5), 8)[0])}
    )
    error = response.json()["error"]
    assert (error["param"], error["message"]) == (
        "video", "video: it has 5 frames; this model continues clips of 9 or more"
    )  # fmt: skip


def test_the_same_key_extends_once(http, video):
    body = {"prompt": "on", "video": {"id": video.id}} | STEP
    first, second = (
        http.post("/v1/videos/extensions", json=body, headers={"Idempotency-Key": "one"}).json() for _ in range(2)
    )
    assert first["id"] == second["id"]
    other = http.post("/v1/videos/extensions", json=body | {"num_frames": 4}, headers={"Idempotency-Key": "one"})
    assert other.status_code == 422


def test_a_client_without_a_key_is_refused(service):
    with make_client(service, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.videos.extend(prompt="a", seconds="1", **refer_to_video("x"))

"""Fields that change the result are honoured or refused by name."""

import base64
import time

import pytest

from tests.support.openai_service import QUICK, make_mp4, make_png

UNSUPPORTED = (
    "lora", "lora_path", "lora_scale", "guidance_scale_2", "true_cfg_scale", "strength", "last_image", "style",
    "boundary_ratio", "extra_params", "enable_teacache",
)  # fmt: skip
IMAGE = {"prompt": "a", "num_inference_steps": 1}
PNG_URL = "data:image/png;base64," + base64.b64encode(make_png()).decode()


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        *[("/v1/videos", {name: "x"}, name) for name in UNSUPPORTED],
        ("/v1/videos", {"n": 9}, "n"), ("/v1/videos/sync", {"n": 2}, "n"),
        ("/v1/videos", {"size": "32x32", "width": 64}, "width"),
        ("/v1/videos", {"width": 17, "height": 32}, None), ("/v1/videos", {"width": 5000}, "width"),
        ("/v1/videos", {"reference_url": "http://a.test/a.png"}, "reference_url"),
        ("/v1/videos", {"image_reference": {"file_id": "x"}}, "image_reference.file_id"),
        ("/v1/videos", {"image_reference": {"file_id": "x"}, "video_reference": {"file_id": "x"}}, "video_reference"),
        ("/v1/images/generations", {"background": "transparent"}, "background"),
        ("/v1/images/generations", {"mask": "x"}, "mask"), ("/v1/images/generations", {"lora": "x"}, "lora"),
        ("/v1/images/generations", {"output_format": "gif"}, "output_format"),
        ("/v1/images/generations", {"output_compression": 50}, "output_compression"),
        ("/v1/images/generations", {"quality": "high"}, "quality"),
        ("/v1/images/generations", {"style": "vivid"}, "style"),
        ("/v1/images/generations", {"num_frames": 9}, "num_frames"),
        ("/v1/images/edits", {"image": {"file_id": "x"}, "url": "http://a.test/a.png"}, "url"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_honoured_is_refused_by_name(http, path, fields, param):
    response = http.post(path, json={"prompt": "a"} | fields)
    assert response.status_code == 400, response.text
    assert param is None or response.json()["error"]["param"] == param


@pytest.mark.parametrize(("path", "fields", "param"), [
    ("/v1/videos", {"input_reference": {"image_url": PNG_URL}, "task": "image-to-video"}, "task"),
    ("/v1/videos", {"input_reference": {"image_url": PNG_URL}, "last_image": {"image_url": PNG_URL}}, "last_image"),
    ("/v1/videos/extensions", {"video": {"id": "x"}}, "video"),
])  # fmt: skip
def test_a_task_that_the_weights_cannot_do_is_refused_with_those_that_they_can(http, path, fields, param):
    response = http.post(path, json={"prompt": "a"} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert "its tasks are text-to-video, video-editing, text-to-image, image-editing" in error["message"]


def test_width_and_height_are_honoured(http):
    video = http.post("/v1/videos", json={"prompt": "a", "width": 48, "height": 32} | QUICK).json()
    assert video["size"] == "48x32"
    image = http.post("/v1/images/generations", json=IMAGE | {"width": "32", "height": 48}).json()
    assert image["size"] == "32x48"


@pytest.mark.parametrize("name", ["image_reference", "video_reference"])
def test_references_of_other_servers_are_honoured(http, context, name):
    form = {"files": {name: ("a.mp4", make_mp4()) if "video" in name else ("a.png", make_png())}}
    video = http.post("/v1/videos", data={"prompt": "a", "size": "32x32", "num_inference_steps": "1"}, **form).json()
    assert context.jobs.get_status(video["id"]).job.source.medium == name.partition("_")[0]


def test_a_file_expires(http, context):
    form = {"files": {"file": ("a", b"1")}, "data": {"purpose": "user_data"}}
    expiry = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = http.post("/v1/files", files=form["files"], data=form["data"] | expiry).json()
    assert file["expires_at"] - file["created_at"] == pytest.approx(3600, abs=1) and file["created_at"] <= time.time()
    short = http.post("/v1/files", files=form["files"], data=form["data"] | expiry | {"expires_after[seconds]": "60"})
    assert short.json()["error"]["message"] == "expires_after.seconds: allowed: 3600 to 2592000"
    assert http.get(f"/v1/files/{file['id']}").status_code == 200
    with context.jobs.engine.connect() as connection:
        connection.exec_driver_sql("UPDATE files SET expires_at = 1 WHERE id = ?", (file["id"],))
    for path in (f"/v1/files/{file['id']}", f"/v1/files/{file['id']}/content"):
        assert http.get(path).status_code == 404
    assert file["id"] not in [item["id"] for item in http.get("/v1/files").json()["data"]]

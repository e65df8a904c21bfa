"""Masks, formats and other servers' shapes of image requests; videos that are returned at once, and several of them."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.support.openai_service import QUICK, make_png, wait_until

STEP = {"num_inference_steps": "1"}
WIDTH, HEIGHT = 150, 90


def make_source() -> np.ndarray:
    """Return noise, in which every pixel that is not kept shows."""
    return np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def encode(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def make_mask(may_change: np.ndarray, opacity: int = 255) -> bytes:
    mask = np.zeros((*may_change.shape, 4), np.uint8)
    mask[..., 3] = np.where(may_change, 0, opacity)
    return encode(mask)


def decode_image(response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"]))).convert("RGB"))


def edit_with_mask(http, mask: bytes, source: bytes | None = None, **fields):
    files = {"image": ("a.png", source or encode(make_source())), "mask": ("m.png", mask)}
    return http.post("/v1/images/edits", data={"prompt": "make it blue"} | STEP | fields, files=files)


MAY_CHANGE = np.zeros((HEIGHT, WIDTH), bool)
MAY_CHANGE[20:70, 40:110] = True


@pytest.mark.parametrize("opacity", [255, 1])
@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_only_pixels_of_alpha_0_change(http, opacity, output_format):
    edited = decode_image(edit_with_mask(http, make_mask(MAY_CHANGE, opacity), output_format=output_format))
    differs = (edited != make_source()).any(axis=-1)
    assert edited.shape == (HEIGHT, WIDTH, 3)
    assert not differs[~MAY_CHANGE].any() and differs[MAY_CHANGE].mean() > 0.9


def test_the_next_edit_starts_from_the_masked_picture(http, context):
    image_id = edit_with_mask(http, make_mask(MAY_CHANGE)).json()["id"]
    status = context.jobs.get_status(image_id)
    assert status.result.latents is None and status.job.mask is not None
    assert status.job.mask in context.jobs.collect_referenced_keys(3600)


@pytest.mark.parametrize(
    ("mask", "fields", "param", "message"),
    [
        (make_mask(MAY_CHANGE[:50]), {}, "mask", "it has 150x50 pixels and the image 150x90; allowed: the same size"),
        (encode(make_source()), {}, "mask", "it has no alpha; make it transparent where the image may change"),
        (b"nothing", {}, "mask", None),
        (make_mask(MAY_CHANGE), {"output_format": "jpeg"}, "output_format", None),
        (make_mask(MAY_CHANGE), {"output_format": "webp", "output_compression": "50"}, "output_compression", None),
        (make_mask(MAY_CHANGE), {"size": "64x64"}, "size", "with a mask the result has the image's size, 150x90"),
    ],
)
def test_a_mask_that_cannot_be_honoured_is_refused(http, mask, fields, param, message):
    response = edit_with_mask(http, mask, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message is None or error["message"] == f"{param}: {message}"


@pytest.mark.parametrize(("output_format", "pillow_format"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_images_are_returned_in_the_requested_format(http, output_format, pillow_format):
    body = {"prompt": "a", "size": "96x64", "output_format": output_format} | STEP
    inline = http.post("/v1/images/generations", json=body | {"seed": 1}).json()
    assert inline["output_format"] == output_format
    data = base64.b64decode(inline["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(data)).format == pillow_format
    linked = http.post("/v1/images/generations", json=body | {"seed": 1, "response_format": "url"}).json()
    content = http.get(linked["data"][0]["url"])
    assert content.content == data and content.headers["content-type"] == f"image/{output_format}"


def test_compression_makes_a_file_smaller(http):
    sizes = []
    for compression in (100, 10):
        body = {"prompt": "a", "size": "256x256", "output_format": "jpeg", "output_compression": compression, "seed": 1}
        response = http.post("/v1/images/generations", json=body | STEP).json()
        sizes.append(len(response["data"][0]["b64_json"]))
    assert sizes[1] < sizes[0]


def test_an_image_has_an_id_that_finds_it_again(http):
    response = http.post("/v1/images/generations", json={"prompt": "a", "n": 2} | STEP).json()
    assert response["id"] == response["data"][0]["id"] != response["data"][1]["id"]
    for image in response["data"]:
        assert http.get(f"/v1/images/{image['id']}/content").content == base64.b64decode(image["b64_json"])


PNG_URL = "data:image/png;base64," + base64.b64encode(make_png()).decode()


@pytest.mark.parametrize(
    "source", [{"url": PNG_URL}, {"images": [{"image_url": PNG_URL}]}, {"image": {"image_url": PNG_URL}}]
)
def test_an_image_is_edited_by_its_address(http, source):
    response = http.post("/v1/images/edits", json={"prompt": "make it blue", "num_inference_steps": 1} | source)
    assert decode_image(response).shape == (64, 64, 3)


SOURCE = {"file_id": "x"}


@pytest.mark.parametrize(
    ("path", "fields", "files", "message"),
    [
        ("/v1/images/edits", {}, ["image[]"] * 2, "image: 2 images are given; this model edits 1 at a time"),
        ("/v1/images/edits", {}, ["image"] * 5, "image: 5 images are given; this model edits 1 at a time"),
        ("/v1/images/edits", {}, ["image", "mask", "mask"], "mask: 2 are given; give one"),
        ("/v1/images/edits", {"image": [SOURCE] * 20}, [],
         "image: 20 images are given; this model edits 1 at a time"),
        ("/v1/images/edits", {"images": [SOURCE] * 2}, [],
         "images.1: 2 images are given; this model edits 1 at a time"),
        ("/v1/images/edits", {"url": ["http://a.test/a.png"] * 2}, [],
         "url: 2 images are given; this model edits 1 at a time"),
        ("/v1/videos", {}, ["input_reference"] * 2, "input_reference: 2 are given; give one"),
        ("/v1/videos", {}, ["video_reference[]"] * 3, "video_reference: 3 are given; give one"),
        ("/v1/videos/sync", {"input_reference": [SOURCE] * 2}, [], "input_reference: 2 are given; give one"),
        ("/v1/videos", {"image_reference": SOURCE, "input_reference": SOURCE}, [],
         "image_reference: input_reference is given too; give one of them"),
        ("/v1/videos", {"reference_url": ["http://a.test"] * 2}, [], "reference_url: 2 are given; give one"),
        ("/v1/videos/edits", {}, ["video"] * 2, "video: 2 are given; give one"),
        ("/v1/videos/edits", {"video": SOURCE, "input_reference": SOURCE}, [],
         "input_reference: there is no such field"),
        ("/v1/videos/x/remix", {"input_reference": SOURCE}, [], "input_reference: there is no such field"),
        ("/v1/images/edits", {}, ["image"] * 18, "body: too many files. maximum number of files is 17."),
    ],
)  # fmt: skip
def test_several_sources_are_refused_by_name(http, path, fields, files, message):
    form = [(name, ("a.png", make_png(index))) for index, name in enumerate(files)]
    body = {"files": form, "data": {"prompt": "a"}} if files else {"json": fields | {"prompt": "a"}}
    refused = http.post(path, **body)
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, message)


# ---------------------------------------------------------------- videos


def test_a_video_is_returned_in_the_response(http, context):
    response = http.post("/v1/videos/sync", data={"prompt": "a ball", "size": "32x32"} | STEP)
    assert response.status_code == 200 and response.headers["content-type"] == "video/mp4"
    video_id = response.headers["x-video-id"]
    assert http.get(f"/v1/videos/{video_id}/content").content == response.content
    assert http.get(f"/v1/videos/{video_id}").json()["status"] == "completed"


def test_a_video_is_cancelled_when_the_client_that_waits_for_it_leaves(service, context):
    import httpx

    from tests.support.openai_service import make_http_client

    body = {"prompt": "gone", "num_inference_steps": 200}
    with make_http_client(service) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/videos/sync", json=body, timeout=0.4)
    (job,), _ = context.jobs.list_owned_jobs("admin", "video", None, 1, True)
    wait_until(lambda: context.jobs.get_status(job.id).state == "cancelled")


def test_several_videos_have_consecutive_seeds(http, context):
    video = http.post("/v1/videos", json={"prompt": "a ball", "n": 3, "seed": 7} | QUICK).json()
    assert video["video_ids"][0] == video["id"] and len(video["video_ids"]) == 3
    for index, video_id in enumerate(video["video_ids"]):
        assert context.jobs.get_status(video_id).job.seed == 7 + index
        wait_until(lambda video_id=video_id: http.get(f"/v1/videos/{video_id}").json()["status"] == "completed")
    assert "video_ids" not in http.get(f"/v1/videos/{video['video_ids'][1]}").json()

"""Sizes and lengths: what is requested is delivered, and what is generated is what the model was trained on."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.delivered_shapes import REQUESTS, build_table
from omnivideo.contracts import check_sampling_params, resolve_sampling_params
from omnivideo.errors import InvalidInput
from omnivideo.media.read import read_media
from omnivideo.media.write import write_media
from omnivideo.presets import PRESETS, TINY
from omnivideo.presets.shapes import SourceLength
from tests.support.openai_service import wait_until

DOCS = Path(__file__).parents[2] / "docs" / "service.md"
STEP = {"num_inference_steps": 1}


def generate(http, context, **fields):
    """Generate a clip and return its file and its manifest."""
    created = http.post("/v1/videos", json={"prompt": "a ball"} | STEP | fields)
    assert created.status_code == 200, created.text
    video_id = created.json()["id"]
    wait_until(lambda: http.get(f"/v1/videos/{video_id}").json()["status"] == "completed")
    status = context.jobs.get_status(video_id)
    manifest = json.loads(context.store.get(status.result.manifest))
    return created.json(), read_media(http.get(f"/v1/videos/{video_id}/content").content), manifest


def test_the_table_of_the_documentation_is_that_of_the_presets():
    assert build_table() in DOCS.read_text()


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_every_request_is_generated_at_a_trained_size_and_length(preset):
    for task, overrides in REQUESTS:
        if task not in preset.sampling:
            continue
        try:
            params = resolve_sampling_params(preset, task, **overrides)
        except InvalidInput:
            continue
        assert (params.width, params.height) in preset.trained[task].sizes
        assert params.frames in preset.trained[task].frames
        check_sampling_params(preset, params)


@pytest.mark.parametrize(
    ("fields", "shape", "fps"),
    [
        ({}, (9, 64, 64), 8), ({"seconds": "4"}, (9, 64, 64), 2.25), ({"seconds": "12"}, (9, 64, 64), 0.75),
        ({"seconds": "1", "fps": "8"}, (8, 64, 64), 8), ({"num_frames": 5, "fps": 2.5}, (5, 64, 64), 2.5),
        ({"seconds": 4, "num_frames": 6}, (6, 64, 64), 1.5), ({"size": "640x360"}, (9, 360, 640), 8),
        ({"size": "1280x720", "seconds": 4}, (9, 720, 1280), 2.25), ({"size": "auto"}, (9, 64, 64), 8),
        ({"width": 48}, (9, 64, 48), 8),
    ],
)  # fmt: skip
def test_a_clip_is_delivered_as_requested(http, context, fields, shape, fps):
    video, media, manifest = generate(http, context, **fields)
    assert (media.frames.shape, media.fps) == ((*shape, 3), fps)
    settings, delivered = manifest["settings"], manifest["delivered"]
    assert (settings["width"], settings["height"], settings["frames"], settings["fps"]) == (64, 64, 9, fps)
    assert (delivered["frames"], delivered["height"], delivered["width"]) == shape
    assert video["size"] == f"{shape[2]}x{shape[1]}" and float(video["seconds"]) == pytest.approx(shape[0] / fps)
    assert settings.get("seconds") == (
        float(fields["seconds"]) if "seconds" in fields and "fps" not in fields else None
    )


def test_a_large_picture_of_a_small_model_takes_seconds(http):
    started_at = time.monotonic()
    image = http.post("/v1/images/generations", json={"prompt": "a", "size": "1024x1024"} | STEP)
    assert image.json()["size"] == "1024x1024" and time.monotonic() - started_at < 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seconds": 4, "fps": 8}, "seconds: 4 s at 8 frames per second are 32 frames; this model generates 2 to 9; "
         "leave out fps, or give at most 2.25"),
        ({"seconds": 4, "num_frames": 9, "fps": 8}, "seconds: 4 s at 8 frames per second are 32 frames, not 9; "
         "give two of the three"),
        ({"num_frames": 33}, "num_frames: 33 is more than this model was trained for; allowed: 2 to 9"),
        ({"num_frames": 1}, "num_frames: 1 does not fit text-to-video: a video has 2 to 9"),
        ({"seconds": 60}, "seconds: this model generates 9 frames at 0.5 to 60 per second; allowed: 0.15 to 18"),
        ({"seconds": 60, "num_frames": 9}, "seconds: 9 frames in 60 s are 0.15 per second, of 0.5 to 60; "
         "allowed: 0.15 to 18"),
        ({"size": "641x360"}, "size: its width is not possible; 641 is odd; a clip has even sides"),
        ({"flow_shift": 0.05}, "flow_shift: this model generates clips from 0.2 to 100"),
    ],
)  # fmt: skip
def test_what_cannot_be_generated_is_refused_with_what_can(http, fields, message):
    error = http.post("/v1/videos", json={"prompt": "a ball"} | fields)
    assert (error.status_code, error.json()["error"]["message"]) == (400, message)


def make_clip(folder, frames: int, width: int = 64, height: int = 64, fps: float = 8) -> bytes:
    path = folder / "clip.mp4"
    write_media(path, np.full((frames, height, width, 3), 200, dtype=np.uint8), fps)
    return path.read_bytes()


@pytest.mark.parametrize(("frames", "fps", "expected"), [(9, 8, (9, 8)), (5, 8, (5, 8)), (32, 8, (9, 2.25))])
def test_an_edit_lasts_as_long_as_its_source(http, context, tmp_path, frames, fps, expected):
    files = {"video": ("a.mp4", make_clip(tmp_path, frames, fps=fps))}
    video = http.post("/v1/videos/edits", data={"prompt": "make it blue", "num_inference_steps": "1"}, files=files)
    assert video.status_code == 200, video.text
    params = context.jobs.get_status(video.json()["id"]).job.params
    assert (params.delivered_shape.frames, params.fps, params.frames) == (*expected, 9)


def test_an_edit_of_a_clip_that_is_too_long_is_refused(http, tmp_path):
    files = {"video": ("a.mp4", make_clip(tmp_path, 300, fps=8))}
    error = http.post("/v1/videos/edits", data={"prompt": "make it blue"}, files=files).json()["error"]
    assert (error["param"], "it lasts 37.5 s; this model edits at most 18 s" in error["message"]) == ("video", True)


def test_an_edit_at_another_aspect_ratio_shows_all_of_its_source(tmp_path):
    """The left and the right end of a wide source reach the model, and what is delivered has them again."""
    from omnivideo.media.read import read_fitted_media
    from omnivideo.media.resample import deliver_frames

    pixels = np.zeros((1, 360, 640, 3), np.uint8)
    pixels[:, :, :320], pixels[:, :, 320:] = (200, 0, 0), (0, 0, 200)
    data = io.BytesIO()
    Image.fromarray(pixels[0]).save(data, "PNG")
    params = resolve_sampling_params(TINY, "image-editing", width=640, height=360)
    fitted = read_fitted_media(data.getvalue(), 64, 64, 1, 8, config=TINY.source, delivery=params.delivery)
    assert fitted.shape == (1, 64, 64, 3)
    delivered = deliver_frames(fitted, params.delivery)
    assert delivered.shape == pixels.shape
    assert np.abs(delivered.astype(int) - pixels).mean(axis=-1)[:, :, np.r_[0:300, 340:640]].max() <= 2


def test_a_remix_keeps_the_size_and_length_that_were_delivered(http, context):
    video, _, _ = generate(http, context, size="128x96", num_frames=5)
    remix = http.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "make it blue"} | STEP).json()
    assert (remix["size"], remix["seconds"]) == ("128x96", "0.625")


def test_a_preset_prefers_the_trained_length_near_its_own_rate():
    shapes = TINY.trained["text-to-video"].model_copy(update={"frames": (9, 17)})
    preset = TINY.model_copy(update={"trained": TINY.trained | {"text-to-video": shapes}})
    for seconds, frames in ((1, 9), (2, 17), (4, 17)):
        assert resolve_sampling_params(preset, "text-to-video", seconds=seconds).frames == frames
    assert resolve_sampling_params(preset, "text-to-video", frames=12).frames == 17
    assert resolve_sampling_params(TINY, "video-editing", SourceLength(9, 8.0)) == resolve_sampling_params(
        TINY, "video-editing"
    )


@pytest.mark.parametrize("field", ["seconds", "fps"])
def test_an_image_has_no_length(field):
    with pytest.raises(InvalidInput, match=f"{field}: an image has no length; leave it out"):
        resolve_sampling_params(TINY, "text-to-image", **{field: 4})


def test_an_image_has_any_size(http):
    for size in ("17x33", "1536x1024", "auto"):
        image = http.post("/v1/images/generations", json={"prompt": "a", "size": size, "response_format": "url"} | STEP)
        content = http.get(image.json()["data"][0]["url"]).content
        expected = (64, 64) if size == "auto" else tuple(map(int, size.split("x")))
        assert Image.open(io.BytesIO(content)).size == expected

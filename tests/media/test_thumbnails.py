"""Animated previews of clips."""

import io

import numpy as np
import pytest
from PIL import Image

from omnivideo.contracts import Artifact
from omnivideo.media.artifacts import encode_clip
from omnivideo.media.thumbnails import (
    MAX_ANIMATION_BYTES,
    MAX_ANIMATION_FRAMES,
    create_picture_renderer,
    encode_animation,
)
from omnivideo.storage.objects.memory import MemoryObjectStore


def read_animation(data: bytes) -> tuple[list[np.ndarray], int]:
    """Return the frames and the total duration in ms."""
    image, frames, duration_ms = Image.open(io.BytesIO(data)), [], 0
    for index in range(image.n_frames):
        image.seek(index)
        frames.append(np.asarray(image.convert("RGB")))
        duration_ms += image.info["duration"]
    return frames, duration_ms


def make_ramp(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return a clip whose frames get lighter; a dark bar at a place of its own tells each from the one before."""
    clip = np.stack([np.full((height, width, 3), 55 + 200 * index // count, np.uint8) for index in range(count)])
    for index in range(count):
        left = index * 13 % width
        clip[index, :, left : left + 8] = 0
    return clip


@pytest.mark.parametrize(("count", "fps"), [(9, 8.0), (81, 16.0), (241, 30.0), (5, 7.0)])
def test_an_animation_lasts_as_long_as_its_clip(count, fps):
    clip = make_ramp(count)
    frames, duration_ms = read_animation(encode_animation(clip, fps))
    assert len(frames) == min(count, MAX_ANIMATION_FRAMES)
    assert duration_ms == pytest.approx(1000 * count / fps, abs=1)
    levels = [frame.mean() for frame in frames]
    assert levels[0] == pytest.approx(clip[0].mean(), abs=8), "it begins with the clip"
    assert levels[-1] == pytest.approx(clip[-1].mean(), abs=8), "it ends with the clip"
    assert np.polyfit(range(len(levels)), levels, 1)[0] > 0, "the frames are in order"


def test_an_animation_is_small_whatever_it_shows():
    noise = np.random.default_rng(0).integers(0, 255, (81, 480, 832, 3), dtype=np.uint8)
    data = encode_animation(noise, 16.0)
    assert len(data) <= MAX_ANIMATION_BYTES
    assert len(encode_animation(noise[:3], 16.0)) <= MAX_ANIMATION_BYTES
    assert Image.open(io.BytesIO(encode_animation(make_ramp(5, 480, 832), 16.0))).size == (480, 277)


def test_a_clip_without_a_stored_animation_is_rendered():
    store = MemoryObjectStore()
    data, suffix = encode_clip(make_ramp(81), 16.0)
    fields = {"medium": "video", "width": 64, "height": 48, "frames": 81, "fps": 16.0, "caption": "", "created_by": "x"}
    artifact = Artifact(key=store.put(data, suffix), **fields)
    render = create_picture_renderer(store)
    picture, suffix = render(artifact, "animation")
    frames, duration_ms = read_animation(picture)
    assert suffix == "webp" and len(frames) == MAX_ANIMATION_FRAMES and duration_ms == pytest.approx(5062, abs=5)
    stored = artifact.model_copy(update={"preview": store.put(b"stored beside the clip", "webp")})
    assert render(stored, "animation") == (b"stored beside the clip", "webp")

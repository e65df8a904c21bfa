"""Fitting a source to the model's shape: cropping, selecting frames, and how far a clip is decoded."""

from pathlib import Path

import numpy as np
import pytest

from omnivideo.errors import UnreadableMedia
from omnivideo.media import read
from omnivideo.media.read import DecodedMedia, fit_media, read_fitted_media, read_media
from omnivideo.media.write import write_media
from tests.support import footage
from tests.support.clips import FPS, make_clip, mux_clip, write_animation


def make_numbered_clip(frames: int, fps: float) -> DecodedMedia:
    """Return a clip whose pixels contain the frame numbers."""
    return DecodedMedia(np.repeat(np.arange(frames, dtype=np.uint8), 8 * 8 * 3).reshape(-1, 8, 8, 3), fps, "video")


@pytest.mark.parametrize(
    ("source", "frames", "fps", "expected"),
    [
        (make_numbered_clip(9, 8), 9, 8, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (make_numbered_clip(9, 16), 4, 8, [0, 2, 4, 6]),
        (make_numbered_clip(3, 4), 5, 8, [0, 1, 1, 2, 2]),
        (make_numbered_clip(2, 8), 5, 8, [0, 1, 1, 1, 1]),
        (DecodedMedia(make_numbered_clip(1, 1).frames, None, "image"), 3, 8, [0, 0, 0]),
    ],
)
def test_fitting_selects_frames_by_time(source, frames, fps, expected):
    assert fit_media(source, 8, 8, frames, fps)[:, 0, 0, 0].tolist() == expected


def test_fitting_does_not_change_media_that_fit():
    media = DecodedMedia(make_clip(), FPS, "video")
    assert (fit_media(media, 64, 64, 9, FPS) == make_clip()).all()


@pytest.mark.parametrize(("width", "height"), [(32, 32), (64, 32), (30, 50), (123, 7), (1, 1)])
def test_fitting_crops_at_the_centre(width, height):
    pixels = np.zeros((1, 90, 160, 3), np.uint8)
    pixels[:, 40:50, 75:85] = 255
    fitted = fit_media(DecodedMedia(pixels, None, "image"), width, height, 2, FPS)
    assert fitted.shape == (2, height, width, 3) and fitted.dtype == np.uint8
    weight = fitted[0, :, :, 0].astype(float)
    y, x = np.mgrid[:height, :width]
    centre = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
    assert centre == (pytest.approx((width - 1) / 2, abs=0.1), pytest.approx((height - 1) / 2, abs=0.1))


# ---------------------------------------------------------------- reading and fitting in one pass


SOURCES = {
    "mp4": lambda folder: write_clip(folder / "a.mp4"),
    "mov": lambda folder: mux_clip(folder / "a.mov", make_clip(), "mov", "mpeg4"),
    "mkv": lambda folder: mux_clip(folder / "a.mkv", make_clip(), "matroska", "libx264"),
    "webm": lambda folder: mux_clip(folder / "a.webm", make_clip(), "webm", "libvpx"),
    "avi": lambda folder: mux_clip(folder / "a.avi", make_clip(), "avi", "mpeg4"),
    "fragmented": lambda folder: mux_clip(
        folder / "a.mp4", make_clip(), "mp4", "libx264", {"movflags": "+frag_keyframe+empty_moov"}
    ),
    "pause": lambda folder: footage.write_film(folder / "a.mp4", footage.pan_camera(5, 48), gap=(24, 2)),
    "gif": lambda folder: write_animation(folder / "a.gif", make_clip(), duration=120),
    "png": lambda folder: write_animation(folder / "a.png", make_clip(1)),
}


def write_clip(path: Path) -> Path:
    write_media(path, make_clip(), FPS)
    return path


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(("frames", "fps"), [(1, 8), (5, 8), (3, 4), (9, 12), (17, 2), (4, 7.3)])
def test_reading_only_the_needed_frames_gives_the_same_result(tmp_path, name, frames, fps):
    path = SOURCES[name](tmp_path)
    expected = fit_media(read_media(path), 48, 32, frames, fps)
    assert (read_fitted_media(path, 48, 32, frames, fps) == expected).all()
    assert (read_fitted_media(path.read_bytes(), 48, 32, frames, fps) == expected).all()
    indices = [frames - 1, 0, frames // 2]
    assert (read_fitted_media(path, 48, 32, frames, fps, frame_indices=indices) == expected[indices]).all()


def test_a_clip_is_decoded_no_further_than_needed(tmp_path, monkeypatch):
    write_media(tmp_path / "a.mp4", make_clip(48), 16)
    iterate_clip_frames, decoded_frames = read.iterate_clip_frames, []

    def count_frames(*arguments):
        for timed_frame in iterate_clip_frames(*arguments):
            decoded_frames.append(timed_frame)
            yield timed_frame

    monkeypatch.setattr(read, "iterate_clip_frames", count_frames)
    assert read_fitted_media(tmp_path / "a.mp4", 32, 32, 5, 8).shape == (5, 32, 32, 3)
    assert len(decoded_frames) == 9  # the fifth frame at 8 fps is frame 8 at 16 fps


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_clip_is_refused_before_it_is_decoded(tmp_path, share):
    data = write_clip(tmp_path / "a.mp4").read_bytes()
    with pytest.raises(UnreadableMedia, match=r"^target: the file is "):
        read_fitted_media(data[: int(len(data) * share)], 32, 32, 1, 8, field="target")

"""Scenes are read and written with the times of their frames."""

import numpy as np
import pytest

from omnivideo.media.decode import iterate_clip_frames
from omnivideo.media.limits import MediaGuard
from omnivideo.media.read import read_fitted_media
from omnivideo.training.data.sample import TRAINING_LIMITS
from tests.support import footage


def test_a_clip_with_uneven_frame_times_keeps_them(tmp_path):
    """The clip has one second at 24 fps, a pause of two seconds, and another second: 12 fps on average."""
    from omnivideo.training.curation.reading import write_clip

    path, written = (
        footage.write_film(tmp_path / "pause.mp4", footage.pan_camera(5, 48), gap=(24, 2)),
        tmp_path / "written.mp4",
    )
    assert write_clip(path, (0.0, 4.0), written)["frames"] == 48
    for clip in (path, written):
        demuxer, guard = "mov", MediaGuard("", TRAINING_LIMITS)
        frames, times, _ = zip(*iterate_clip_frames(clip, demuxer, guard), strict=True)
        assert times == pytest.approx([index / 24 + 2 * (index >= 24) for index in range(48)], abs=1e-3)
        fitted = read_fitted_media(clip.read_bytes(), footage.WIDTH, footage.HEIGHT, 9, 2, TRAINING_LIMITS)
        picked = [next(index for index, frame in enumerate(frames) if np.array_equal(frame, image)) for image in fitted]
        assert picked == [0, 12, 23, 23, 23, 23, 24, 36, 47]


def test_the_last_frame_before_an_empty_span_represents_it(tmp_path):
    from omnivideo.training.curation.reading import sample_clip

    path = footage.write_film(tmp_path / "gap.mp4", footage.pan_camera(5, 48), gap=(24, 60))
    shown = sample_clip(
        path, (1.2, 20.0)
    )  # the last frame before the gap is at 0.96 s, nearer than a quarter of 1 / 0.77
    assert len(shown.small_frames) == len(shown.full_frames) == 1

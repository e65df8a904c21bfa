"""How a source becomes pixels, against the authors' outputs."""

import numpy as np
import pytest

from omnivideo.errors import InvalidInput
from omnivideo.media.read import DecodedMedia, fit_media
from omnivideo.media.resample import select_strided_frames
from omnivideo.models.vae import pixels_from_bytes
from omnivideo.presets import OMNIVIDEO2_1_3B, OMNIVIDEO2_A14B, OMNIVIDEO_1_3B, SourceConfig
from tests.support.golden import load_golden
from tests.support.golden_models import measure_error

pytestmark = pytest.mark.golden
CASES = ["0", "1", "2", "3"]


@pytest.mark.parametrize("preset", [OMNIVIDEO_1_3B, OMNIVIDEO2_1_3B, OMNIVIDEO2_A14B], ids=lambda preset: preset.name)
@pytest.mark.parametrize("name", CASES)
def test_pixels(preset, name):
    tensors, about = load_golden("source_reading")
    assert [case["name"] for case in about["cases"]] == CASES
    case = about["cases"][int(name)]
    media = DecodedMedia(tensors[f"{name}.source"].numpy(), None, "image")
    fitted = fit_media(media, case["target_width"], case["target_height"], 1, 8, preset.source)
    assert measure_error(pixels_from_bytes(fitted[None])[0, :, 0], tensors[f"{name}.pixels"][0]) < 1e-6


def test_which_frames():
    for case in load_golden("source_reading")[1]["which_frames"]:
        config = SourceConfig(frames="stride", stride=case["sampling_rate"], skip=case["skip_num"])
        if case["indices"] is None:
            with pytest.raises(InvalidInput, match="takes at least"):
                select_strided_frames(case["total"], case["frame_num"], config)
        else:
            assert select_strided_frames(case["total"], case["frame_num"], config) == case["indices"]


def test_a_clip_is_read_in_strides_and_a_short_one_refused():
    frames = np.repeat(np.arange(40, dtype=np.uint8), 8 * 8 * 3).reshape(-1, 8, 8, 3)
    clip = DecodedMedia(frames, 24.0, "video")
    assert fit_media(clip, 8, 8, 17, 8, OMNIVIDEO_1_3B.source)[:, 0, 0, 0].tolist() == list(range(1, 35, 2))
    with pytest.raises(InvalidInput, match="source: it has 40 frames; an edit of 41 frames takes at least 41"):
        fit_media(clip, 8, 8, 41, 8, OMNIVIDEO2_A14B.source)

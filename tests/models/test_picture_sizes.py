"""The tiny preset's language model sees pictures of every size as it was trained: as squares."""

import numpy as np
import pytest

from benchmarks.picture_sizes import SIZES, draw_shape, is_correct
from omnivideo.models.device import pick_device
from omnivideo.models.mllm import MLLMMedia, MLLMMessage, QwenVisualInput
from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.shipped import find_shipped_weights
from omnivideo.presets import TINY


@pytest.fixture(scope="module")
def bound_mllm():
    return checkpoint.load(find_shipped_weights("tiny"), pick_device("cpu"), "preset").bound_mllm


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_same_shape_is_described_alike_at_every_size(bound_mllm, size):
    for shape, colour in (("circle", "red"), ("square", "blue"), ("star", "yellow"), ("triangle", "green")):
        picture = draw_shape(shape, colour, "grey", size, 13 / 64)
        message = MLLMMessage("describe the picture", (MLLMMedia(picture[None], 1.0, False),))
        description = "".join(bound_mllm.stream_text(message, temperature=0.0, max_tokens=40))
        assert is_correct(description, shape, colour), description


def test_a_frame_is_fitted_by_its_centred_square():
    visual_input = QwenVisualInput(TINY.mllm.vision_input)
    frame = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    assert visual_input.fit_frame(frame, 1).shape == (64, 64, 3)
    wide = np.zeros((64, 128, 3), dtype=np.uint8)
    wide[:, 32:96] = square = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(visual_input.fit_frame(wide, 1), square)
    assert np.array_equal(visual_input.fit_frame(square, 9), square)

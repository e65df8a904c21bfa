"""Counts of parameters, tensors and tokens against the released models, on the meta device."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from omnivideo.clip_sizes import compute_latent_grid, count_decoder_tokens, count_visual_context_tokens
from omnivideo.errors import InvalidInput
from omnivideo.models.bridge import Adapter, VisionHead, VisualContextAdapter
from omnivideo.models.omni import Bridge
from omnivideo.presets import OMNIVIDEO2_1_3B, OMNIVIDEO2_A14B, OMNIVIDEO_1_3B, PRESETS, get_preset


def count(module: torch.nn.Module) -> tuple[int, int]:
    return sum(p.numel() for p in module.parameters()), len(list(module.parameters()))


@pytest.fixture(autouse=True)
def meta():
    with torch.device("meta"):
        yield


def test_released_parts_of_version_1():
    bridge = Bridge(OMNIVIDEO_1_3B)
    assert isinstance(bridge.vision_head, VisionHead) and isinstance(bridge.adapter, Adapter)
    assert count(bridge.vision_head) == (154_840_320, 129)
    assert count(bridge.adapter) == (1_902_141_440, 129)
    assert count(bridge.visual_context) == (6_690_304, 4)
    decoder = WanTransformer3DModel(**OMNIVIDEO_1_3B.decoder)
    parts = (bridge.vision_head, bridge.adapter, bridge.visual_context, decoder)
    totals = [sum(values) for values in zip(*map(count, parts), strict=True)]
    assert totals == [3_482_668_864, 1087]


@pytest.mark.parametrize(
    ("chosen", "expected"), [(OMNIVIDEO2_1_3B, (1_418_996_800, 825)), (OMNIVIDEO2_A14B, (14_288_491_584, 1095))]
)
def test_decoders(chosen, expected):
    assert count(WanTransformer3DModel(**chosen.decoder)) == expected


def test_visual_context_of_the_14b():
    size = OMNIVIDEO2_A14B.visual_context
    assert count(VisualContextAdapter(16, size.hidden_dim, 4096, size.kernel_size, False)) == (22_291_456, 4)


@pytest.mark.parametrize(
    ("size", "grid", "decoder", "context"),
    [
        ((640, 352, 17), (5, 44, 80), 4400, 1100),
        ((480, 480, 1), (1, 60, 60), 900, 225),
        ((832, 480, 41), (11, 60, 104), 17160, 4290),
        ((832, 480, 81), (21, 60, 104), 32760, 8190),
        ((1280, 720, 81), (21, 90, 160), 75600, 18480),
    ],
)
def test_tokens(size, grid, decoder, context):
    assert compute_latent_grid(*size) == grid
    assert count_decoder_tokens(OMNIVIDEO_1_3B, grid) == decoder
    assert count_visual_context_tokens(OMNIVIDEO_1_3B, grid) == context


@pytest.mark.parametrize(("size", "field"), [((65, 64, 9), "width"), ((64, 0, 9), "height"), ((64, 64, 8), "frames")])
def test_sizes_that_do_not_fit_are_named(size, field):
    with pytest.raises(InvalidInput) as caught:
        compute_latent_grid(*size)
    assert caught.value.field == field


def test_presets_are_frozen_and_known_by_name():
    assert get_preset("tiny") is PRESETS["tiny"]
    with pytest.raises(InvalidInput, match="tiny"):
        get_preset("huge")
    with pytest.raises(ValueError, match="frozen"):
        get_preset("tiny").name = "other"

"""Counts of parameters, tensors and tokens against the released models, on the meta device."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from omnivideo.contracts import (
    check_sampling_params,
    compute_latent_grid,
    count_decoder_tokens,
    count_visual_context_tokens,
    resolve_sampling_params,
)
from omnivideo.errors import InvalidInput
from omnivideo.models.bridge import Adapter, VisionHead, VisualContextAdapter
from omnivideo.models.omni import Bridge
from omnivideo.presets import (
    OMNIVIDEO2_1_3B,
    OMNIVIDEO2_A14B,
    OMNIVIDEO_1_3B,
    PRESETS,
    ConditionConfig,
    ExpertsConfig,
    get_preset,
)


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


@pytest.mark.parametrize("preset", [OMNIVIDEO2_1_3B, OMNIVIDEO2_A14B], ids=lambda preset: preset.name)
@pytest.mark.parametrize("task", ["text-to-image", "image-editing"])
def test_what_the_weights_cannot_do_is_said(preset, task):
    with pytest.raises(InvalidInput, match=f"{preset.name} cannot do {task}; its tasks are text-to-video, video-edit"):
        resolve_sampling_params(preset, task)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_the_defaults_of_every_task_fit_the_model(preset):
    for task in preset.sampling:
        resolve_sampling_params(preset, task)


def test_a_negative_prompt_is_refused_where_the_weights_have_a_null_condition():
    with pytest.raises(InvalidInput, match=r"negative_prompt: omnivideo-1\.3b has a null condition of its own"):
        resolve_sampling_params(OMNIVIDEO_1_3B, "text-to-video", negative_prompt="blurry")


def test_an_edit_that_would_lose_its_prompt_is_refused():
    """2560 tokens: 1024 of the adapter, 64 kept for the prompt, the rest for the source."""
    params = resolve_sampling_params(OMNIVIDEO_1_3B, "video-editing")
    check_sampling_params(OMNIVIDEO_1_3B, params.model_copy(update={"frames": 21}))
    with pytest.raises(InvalidInput, match=r"size: .* has 1540 tokens of source; allowed: 1472"):
        check_sampling_params(OMNIVIDEO_1_3B, params.model_copy(update={"frames": 25}))


def test_only_the_last_part_of_a_condition_can_be_cut():
    with pytest.raises(ValueError, match="only the last part, 'text', can be cut"):
        ConditionConfig(min_tokens=1, max_tokens=9, overflow="source")
    with pytest.raises(ValueError, match="markers: allowed for text"):
        ConditionConfig(parts=("text",), min_tokens=1, max_tokens=9)


def test_stock_wan_can_be_described():
    """Text alone, without markers, padded to 512 tokens, and two experts."""
    condition = ConditionConfig(parts=("text",), markers={}, min_tokens=512, max_tokens=512)
    experts = ExpertsConfig(num_decoders=2, boundary=900)
    assert condition.marker_names == () and experts.boundary == 900


def test_presets_are_frozen_and_known_by_name():
    assert get_preset("tiny") is PRESETS["tiny"]
    with pytest.raises(InvalidInput, match="tiny"):
        get_preset("huge")
    with pytest.raises(ValueError, match="frozen"):
        get_preset("tiny").name = "other"

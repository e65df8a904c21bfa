"""The estimates of memory agree with what torch allocates for small models, and with formulas computed by hand."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from weakref import finalize

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omnivideo.models.bridge import VisionHead
from omnivideo.presets import TINY
from omnivideo.training.planning.config import PlanConfig
from omnivideo.training.planning.gpus import GPUS
from omnivideo.training.planning.memory import (
    FIXED_OVERHEAD_GB,
    count_stage_weights,
    estimate_activations,
    estimate_decoder_activations,
    estimate_encoding_bytes,
    estimate_query_transformer_activations,
    estimate_resident_gb,
)
from omnivideo.training.planning.plan import TrainingPlan, build_plan
from tests.support.tiny_decoder import CONDITION_TOKENS, TOKENS, build_tiny_decoder, make_inputs, predict_velocity

STAGE_3 = PlanConfig("stage3", GPUS["H100"], 8)


@pytest.fixture(scope="module")
def plan() -> TrainingPlan:
    return build_plan(STAGE_3)


# ---------------------------------------------------------------- activations


def measure_kept_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Return the bytes that autograd keeps for the backward pass: each storage once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    bytes_by_storage = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            bytes_by_storage[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(bytes_by_storage.values())


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_the_decoder(trained, dtype):
    decoder = build_tiny_decoder(trained).to(dtype)
    inputs = tuple(value.to(dtype) for value in make_inputs(2))
    kept_bytes = measure_kept_bytes(lambda: predict_velocity(decoder, inputs), decoder)
    estimate = estimate_decoder_activations(TINY.decoder, TOKENS, CONDITION_TOKENS, trained, False, dtype.itemsize)
    # RMS norm keeps its input: unchanged on a GPU, in fp32 on a CPU, with the normalised values of trained weights.
    rows = TINY.decoder["num_layers"] * (3 * TOKENS + CONDITION_TOKENS) * 192
    estimate += rows * (4 - dtype.itemsize + (4 if trained else 0))
    if not trained:  # the first block's self-attention precedes the condition, which is what has gradients
        estimate -= TOKENS * 192 * (4 + 4 * dtype.itemsize + 2 * 4)
    assert kept_bytes == pytest.approx(2 * estimate, rel=0.02)


def test_activations_of_the_vision_head():
    size = TINY.vision_head
    head = VisionHead(size.input_dim, size.width, size.num_queries, size.num_layers, size.num_heads).train()
    states = torch.randn(1, 30, size.input_dim)
    kept_bytes = measure_kept_bytes(lambda: head(states), head)
    assert kept_bytes == pytest.approx(estimate_query_transformer_activations(size, 30, 4), rel=0.1)


def test_checkpointing_keeps_only_the_inputs_of_the_blocks():
    decoder, inputs = build_tiny_decoder(), make_inputs()
    decoder.enable_gradient_checkpointing()
    kept_bytes = measure_kept_bytes(lambda: predict_velocity(decoder, inputs), decoder)

    def estimate(layers: int, checkpointing: bool) -> float:
        config = TINY.decoder | {"num_layers": layers}
        return estimate_decoder_activations(config, TOKENS, CONDITION_TOKENS, True, checkpointing, 4)

    recomputed_block = estimate(1, False) - estimate(0, False)  # the backward pass, which is not run, allocates it
    expected = estimate(TINY.decoder["num_layers"], True) - recomputed_block
    assert kept_bytes == pytest.approx(expected, rel=0.15)


# ---------------------------------------------------------------- parameters and memory of a stage


def test_parameters_agree_with_the_released_model(plan):
    """`model.pt` with the six markers is trained; the MLLM and SigLIP2 are frozen, and the rest is cached."""
    assert plan.trained_parameters == 3_482_668_864 + 6 * 4096
    assert plan.frozen_parameters == 8_767_123_696 + 428_225_600
    assert plan.offloaded_parameters == 5_680_910_336 + 126_892_531  # UMT5-XXL and the VAE
    stage2b = build_plan(replace(STAGE_3, recipe="stage2b"))
    assert stage2b.trained_parameters == 1_902_141_440 + 6_690_304 + 6 * 4096
    # Without SigLIP2, because stage 2b aligns nothing.
    assert stage2b.trained_parameters + stage2b.frozen_parameters == plan.trained_parameters + 8_767_123_696
    uncached = build_plan(replace(STAGE_3, cached=False))
    assert uncached.frozen_parameters == plan.frozen_parameters + plan.offloaded_parameters
    assert uncached.offloaded_parameters == 0
    stage1 = build_plan(replace(STAGE_3, recipe="stage1", cached=False))  # it has nothing to cache
    assert stage1.offloaded_parameters == plan.offloaded_parameters


def test_memory_of_zero_1_computed_by_hand(plan):
    """Stage 3 on 8 GPUs trains T = 3,482,693,440 weights and freezes F = 9,195,349,296.

    Resident: 2 T = 6.965, 12 T / 8 = 5.224, 4 T / 8 = 1.741, 2 F = 18.391. Transient: the activations, or the gradients
    with a bucket, 2 (T + 5e8) = 7.965, which is more than three copies of a GPU's own part, 8 T / 8 = 3.483.
    """
    assert list(plan.resident_gb.values()) == pytest.approx([6.965, 5.224, 1.741, 18.391, 2.5], abs=1e-3)
    # For a clip, 30 blocks of 7800 (2 (13 d + 2 f) + 24 d + 96) + 6 d 2560 bytes, d = 1536, f = 8960, have 27.098 GB;
    # the decoder's ends 0.154; vision head, adapter and visual context 0.296 + 0.539 + 0.050. Five images have more,
    # because each of their five conditions is as long as that of the clip.
    clip_gb, still_gb = (estimate_activations(STAGE_3, kind) / 1e9 for kind in ("clip", "still"))
    assert clip_gb == pytest.approx(27.098 + 0.154 + 0.296 + 0.539 + 0.050, abs=2e-3)
    assert list(plan.transient_gb.values()) == pytest.approx([still_gb, 7.965], abs=1e-3)
    assert plan.required_gb == pytest.approx(34.821 + 31.556, abs=2e-3)
    two_gpus = build_plan(replace(STAGE_3, gpus=2))  # here three copies of its own part are more: 8 T / 2
    assert two_gpus.transient_gb["gradients (bf16; own part also fp32)"] == pytest.approx(13.931, abs=1e-3)


def test_memory_of_one_process_computed_by_hand():
    """Stage 2b on one GPU with the plain trainer: T = 1,908,856,320, F = 8,767,123,696 + 1,573,837,120.

    Resident: 4 T = 7.635, 8 T = 15.271, 4 T = 7.635, 2 F = 20.682. Transient: activations with bf16 copies of the
    weights, 2 T = 3.818, or gradients, 4 T.
    """
    config = replace(STAGE_3, recipe="stage2b", gpus=1)
    plan = build_plan(config)
    assert list(plan.resident_gb.values()) == pytest.approx([7.635, 15.271, 7.635, 20.682, 2.5], abs=1e-3)
    activations_gb = estimate_activations(config, "still") / 1e9
    assert list(plan.transient_gb.values()) == pytest.approx([activations_gb + 3.818, 7.635], abs=1e-3)
    assert plan.required_gb == pytest.approx(53.723 + activations_gb + 3.818, abs=2e-3)
    # Stage 2a has no average: it trains the adapter, T = 1.902, and F = 12.250 - 1.902 weights have two bytes.
    stage2a = build_plan(replace(config, recipe="stage2a"))
    assert list(stage2a.resident_gb.values()) == pytest.approx([7.609, 15.217, 0, 20.695, 2.5], abs=1e-3)


@pytest.mark.parametrize(
    ("stage", "gpus", "one_clip_gb", "two_clips_gb", "frozen_gb", "copies_gb"),
    [
        ("stage2b", 1, 57.9, 72.2, 4 * 1.5738, 2 * (1.9089 + 1.4190)),
        ("stage3", 1, 85.4, 108.0, 0.0, 2 * 3.4827),
    ],
)
def test_memory_agrees_with_measurements(stage, gpus, one_clip_gb, two_clips_gb, frozen_gb, copies_gb):
    """The measurements of docs/training.md on an H200 had everything in fp32, and no MLLM on the GPU.

    Two clips minus one are the activations of one clip; without these, the step of one clip is the resident memory.
    Autocast had copies of the frozen decoder as well.
    """
    trained = count_stage_weights("omnivideo-1.3b", stage, True).trained_parameters
    resident_gb = sum(estimate_resident_gb(trained, int(frozen_gb * 1e9), True, gpus).values()) - FIXED_OVERHEAD_GB
    clip_gb = two_clips_gb - one_clip_gb
    assert resident_gb + copies_gb == pytest.approx(one_clip_gb - clip_gb, abs=0.3)
    activations_gb = estimate_activations(replace(STAGE_3, recipe=stage), "clip") / 1e9
    assert 1 < activations_gb / clip_gb < 1.3  # compiled blocks, which were measured, keep less


def test_options_that_save_memory(plan):
    checkpointed = build_plan(replace(STAGE_3, checkpointing=True))
    assert plan.transient_gb["activations"] > 4 * checkpointed.transient_gb["activations"]
    divided = build_plan(replace(STAGE_3, sequence_parallel_size=4))
    assert 0.25 < divided.transient_gb["activations"] / plan.transient_gb["activations"] < 0.4
    uncached = build_plan(replace(STAGE_3, cached=False))
    assert sum(uncached.resident_gb.values()) - sum(plan.resident_gb.values()) == pytest.approx(
        2 * 5.6809 + 4 * 0.1269, abs=1e-3
    )


# ---------------------------------------------------------------- encoding


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of all live tensors, each storage once, and their maximum."""

    def __init__(self):
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.add_tensors(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf._base is None)
        return output

    def add_tensors(self, tensors: Iterable[Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.live_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                finalize(storage, self.remove_storage, storage._cdata, storage.nbytes())

    def remove_storage(self, storage: int, size: int) -> None:
        self.storages.discard(storage)
        self.live_bytes -= size


@pytest.mark.parametrize(("kind", "frames", "batch_size"), [("still", 1, 3), ("clip", 17, 1)])
def test_memory_of_the_vae_while_it_encodes(kind, frames, batch_size):
    config = replace(STAGE_3, width=208, height=128)
    with torch.device("meta"):
        vae, pixels = AutoencoderKLWan(**STAGE_3.preset.vae), torch.empty(batch_size, 3, frames, 128, 208)
    with torch.no_grad(), AllocationTracker() as tracker:
        vae.encode(pixels)
    batches = {"still": min(8, 2 * config.stills_per_gpu), "clip": 1}[kind] / batch_size
    assert estimate_encoding_bytes(config, kind) == pytest.approx(tracker.peak_bytes * batches, rel=0.1)
    uncached = build_plan(replace(STAGE_3, cached=False, checkpointing=True))
    encoding_gb = uncached.transient_gb["encoding (fp32)"]
    assert encoding_gb == estimate_encoding_bytes(STAGE_3, "still") / 1e9 == max(uncached.transient_gb.values())

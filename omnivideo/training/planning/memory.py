"""Estimate the memory that a stage needs on one GPU.

Resident memory is allocated throughout a run. Transient memory is allocated and freed in turn, so only its largest
part counts. docs/plan.md states the formulas. GB are 10^9 bytes.

Symbols: n decoder tokens, c condition tokens, s input tokens and q queries of a query transformer, d width,
f feed-forward width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from omnivideo.presets import QueryTransformerConfig, get_preset
from omnivideo.training.engine.placement import choose_placement
from omnivideo.training.engine.trainer import freeze_except
from omnivideo.training.planning.config import (
    ALIGNED_STAGES,
    KINDS,
    MLLM_TOKENS,
    Kind,
    PlanConfig,
    count_visual_tokens,
)
from omnivideo.training.planning.flops import decoder_width
from omnivideo.training.planning.models import MLLM_CONFIG, build_meta_models
from omnivideo.training.recipes.parts import TRAINABLE_BY_STAGE

FIXED_OVERHEAD_GB = 2.5  # CUDA context, NCCL buffers and workspaces of libraries
VAE_ENCODE_BATCH_SIZE, VAE_CHANNELS = 8, 96  # images that the VAE encodes at once; its channels at full size
GRADIENT_BUCKET_SIZE = 5e8  # gradients that DeepSpeed sends at once
LOGIT_BYTES = 10  # of one logit: in bf16, in fp32, and its gradient


@dataclass(frozen=True)
class StageWeights:
    """The parameters of a stage: those it trains, those of each model, and the frozen ones on the GPU."""

    trained_parameters: int
    parameters_by_part: dict[str, int]
    frozen_parameters: int
    frozen_bytes: int


@cache
def count_stage_weights(preset_name: str, recipe: str, cached: bool) -> StageWeights:
    """Count the parameters of the models that a stage reads, placed by the rule of `choose_placement`."""
    models = build_meta_models(get_preset(preset_name))
    if recipe not in ALIGNED_STAGES:
        del models["visual_encoder"]
    counts = {part: sum(parameter.numel() for parameter in model.parameters()) for part, model in models.items()}
    trained = sum(parameter.numel() for _, parameter in freeze_except(models, TRAINABLE_BY_STAGE[recipe]))
    keeps_encoders_on_cpu = cached or recipe == "stage1"
    placements = [
        (
            parameter.numel(),
            choose_placement(recipe, name, torch.device("cuda"), torch.bfloat16, keeps_encoders_on_cpu),
        )
        for name, parameter in models.named_parameters()
        if not parameter.requires_grad
    ]
    on_gpu = [
        (count, count * placement.dtype.itemsize) for count, placement in placements if placement.device.type == "cuda"
    ]
    return StageWeights(trained, counts, sum(count for count, _ in on_gpu), sum(size for _, size in on_gpu))


def estimate_decoder_activations(
    config: Mapping[str, Any],
    tokens: int,
    condition_tokens: int,
    trained: bool,
    checkpointing: bool,
    bytes_each: int = 2,
) -> float:
    """Return the bytes that the decoder keeps of one sample for the backward pass.

    An activation has `bytes_each` bytes; norms and gates are in fp32.
    """
    n, c, d, f = tokens, condition_tokens, decoder_width(config), config["ffn_dim"]
    heads, size = config["num_attention_heads"], bytes_each
    if trained:
        block = n * (size * (13 * d + 2 * f) + 4 * 6 * d) + 3 * size * c * d
    else:  # the inputs of frozen products and gates are not kept
        block = n * (size * (9 * d + f) + 4 * 3 * d) + 3 * size * c * d
    block += n * 4 * 2 * heads  # the normalisers of the attention scores
    ends = n * (4 * 2 + size) * d + size * c * (config["text_dim"] + 3 * d) if trained else n * 4 * d + size * c * d
    layers = config["num_layers"]
    return float(ends + (layers * size * n * d + block if checkpointing else layers * block))


def estimate_query_transformer_activations(
    size: QueryTransformerConfig, input_tokens: int, bytes_each: int = 2
) -> float:
    """Return the bytes that one run of the vision head or the adapter keeps for the backward pass."""
    s, q, d = input_tokens, size.num_queries, size.width
    return bytes_each * (size.num_layers * (12 * s + 16 * q + 2 * s) * d + s * (size.input_dim + 3 * d))


def estimate_activations(config: PlanConfig, kind: Kind) -> float:
    """Return the bytes of activations of a micro-batch on one GPU."""
    preset, recipe = config.preset, config.recipe
    head, adapter = preset.vision_head, preset.adapter
    assert head is not None and adapter is not None, "a version 1 preset"
    total = 0.0
    if recipe in ALIGNED_STAGES:
        total += estimate_query_transformer_activations(head, MLLM_TOKENS[kind])
    if recipe.startswith("stage1"):
        total += MLLM_TOKENS[kind] * MLLM_CONFIG["text_config"]["vocab_size"] * LOGIT_BYTES
    else:
        runs = count_visual_tokens(preset) if kind == "clip" else 1
        total += estimate_query_transformer_activations(adapter, 1) * runs
    if recipe.startswith(("stage2b", "stage3")):
        tokens = config.count_decoder_tokens(kind) // config.sequence_parallel_size
        condition_tokens = config.count_condition_tokens(kind) // config.sequence_parallel_size
        total += estimate_decoder_activations(
            preset.decoder, tokens, condition_tokens, recipe == "stage3", config.checkpointing
        )
        total += condition_tokens * 2 * (preset.visual_context.hidden_dim + 2 * preset.text_width)
    return total * config.samples_per_gpu(kind)


def estimate_resident_gb(trained: int, frozen_bytes: int, has_ema: bool, gpus: int) -> dict[str, float]:
    """Return the resident memory of one GPU by part, in GB.

    One GPU holds what the plain trainer holds. Several divide the optimizer's states and the average (ZeRO-1).
    """
    trained_per_gpu = trained / gpus
    if gpus == 1:
        parts: dict[str, float] = {"trained weights (fp32)": 4 * trained, "optimizer: two moments (fp32)": 8 * trained}
    else:
        parts = {
            "trained weights (bf16)": 2 * trained,
            "optimizer: master weights, two moments (fp32)": 12 * trained_per_gpu,
        }
    parts["average of the weights (fp32)"] = 4 * trained_per_gpu if has_ema else 0
    parts["frozen weights (bf16)"] = frozen_bytes
    return {name: count / 1e9 for name, count in parts.items()} | {"CUDA, NCCL, workspaces": FIXED_OVERHEAD_GB}


def estimate_transient_gb(config: PlanConfig, trained: int) -> dict[str, float]:
    """Return the transient memory of one GPU by part, in GB.

    Gradients are allocated as activations are freed; the fp32 sums of earlier micro-batches stay allocated. Autocast
    keeps its bf16 copies of fp32 weights for the backward pass. DeepSpeed reduces bf16 gradients bucket by bucket, then
    holds its own part of them three times: unchanged, flattened, and in fp32.
    """
    activation_bytes, gpus = max(estimate_activations(config, kind) for kind in KINDS), config.gpus
    is_accumulating = config.grad_accum_steps > 1
    sums = 4.0 * trained if is_accumulating else 0.0
    if gpus == 1:
        bytes_by_part = {
            "activations, copies of weights (bf16)": activation_bytes + 2 * trained + sums,
            "gradients (fp32)": 4.0 * trained,
        }
    else:
        reduced = 2 * (trained + min(trained, GRADIENT_BUCKET_SIZE))
        gradients = max(reduced, 8 * trained / gpus, 6.0 * trained if is_accumulating else 0.0)
        bytes_by_part = {
            "activations": activation_bytes + sums,
            "gradients (bf16; own part also fp32)": gradients,
        }
    if config.encodes_inline:
        bytes_by_part["encoding (fp32)"] = max(estimate_encoding_bytes(config, kind) for kind in KINDS)
    return {name: count / 1e9 for name, count in bytes_by_part.items()}


def estimate_encoding_bytes(config: PlanConfig, kind: Kind) -> float:
    """Return the bytes that the VAE needs to encode: about ten of its widest activations.

    It encodes four frames of one clip, or several images, at once.
    """
    frame_count = 4 if kind == "clip" else min(VAE_ENCODE_BATCH_SIZE, 2 * config.stills_per_gpu)
    return 10 * 4 * VAE_CHANNELS * config.width * config.height * frame_count

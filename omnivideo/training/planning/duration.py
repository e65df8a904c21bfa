"""Estimate the operations and the time of a step, and count the steps of a run.

docs/plan.md states the formulas and assumptions.
"""

from collections.abc import Mapping

from omnivideo.contracts import count_visual_context_tokens
from omnivideo.training.planning.config import (
    ALIGNED_STAGES,
    EDITING_STAGES,
    FLOW_STAGES,
    KINDS,
    MLLM_TOKENS,
    PAPER_SAMPLE_COUNTS,
    TASKS_BY_STAGE,
    Kind,
    PlanConfig,
    count_visual_tokens,
)
from omnivideo.training.planning.flops import (
    Flops,
    count_decoder_flops,
    count_query_transformer_flops,
    count_visual_context_flops,
    decoder_width,
)
from omnivideo.training.planning.models import (
    count_vae_flops,
    estimate_mllm_flops,
    estimate_text_encoder_flops,
    estimate_visual_encoder_flops,
)

GPUS_PER_NODE = 8  # GPUs that share the fast link
NETWORK_GB_PER_SECOND = 50.0  # from each GPU to other nodes, in one direction (400 Gb/s)


def estimate_sample_flops(config: PlanConfig, kind: Kind, parameters_by_part: Mapping[str, int]) -> tuple[Flops, Flops]:
    """Return the operations of one sample: those that count for MFU, and those that only take time.

    The latter make the targets, or repeat the forward pass for checkpointing. Processes that share a sample's tokens
    divide the decoder's operations; each of them does everything else for the sample.
    """
    model_flops = estimate_bridge_flops(config, kind, parameters_by_part)
    extra_flops = estimate_target_flops(config, kind, parameters_by_part)
    extra_flops += (model_flops + extra_flops) * (config.sequence_parallel_size - 1)
    if config.recipe in FLOW_STAGES:
        tokens, condition_tokens = config.count_decoder_tokens(kind), config.count_condition_tokens(kind)
        forward = count_decoder_flops(config.preset.decoder, tokens, condition_tokens)
        model_flops += forward.with_backward if config.recipe == "stage3" else forward.with_frozen_backward
        extra_flops += forward if config.checkpointing else Flops()
    return model_flops, extra_flops


def estimate_bridge_flops(config: PlanConfig, kind: Kind, parameters_by_part: Mapping[str, int]) -> Flops:
    """Estimate the MLLM's forward pass and the training of the vision head, the adapter and the visual context."""
    preset, recipe = config.preset, config.recipe
    head, adapter = preset.vision_head, preset.adapter
    assert head is not None and adapter is not None, "a version 1 preset"
    tokens = MLLM_TOKENS[kind]
    layer_parameters = parameters_by_part["mllm"] - parameters_by_part["lm_head"] - parameters_by_part["embeddings"]
    flops, head_flops = estimate_mllm_flops(tokens, layer_parameters), count_query_transformer_flops(head, tokens)
    flops += head_flops.with_backward if recipe in ALIGNED_STAGES else head_flops
    if recipe == "stage1":  # no gradients are computed for the inputs of the text head
        flops += Flops(2.0 * tokens * parameters_by_part["lm_head"]) * 2
    else:
        runs = count_visual_tokens(preset) if kind == "clip" else 1
        flops += (count_query_transformer_flops(adapter, 1) * runs).with_backward
    if recipe in FLOW_STAGES:
        context_tokens = count_visual_context_tokens(preset, config.compute_latent_grid(kind))
        flops += count_visual_context_flops(preset, context_tokens).with_backward
    return flops


def estimate_target_flops(config: PlanConfig, kind: Kind, parameters_by_part: Mapping[str, int]) -> Flops:
    """Estimate what makes the targets: the visual encoder, and without a cache the text encoder and the VAE."""
    preset, recipe, flops = config.preset, config.recipe, Flops()
    if recipe in ALIGNED_STAGES:
        frames = count_visual_tokens(preset) if kind == "clip" else 1
        flops += estimate_visual_encoder_flops(frames, parameters_by_part["visual_encoder"])
    if config.encodes_inline:
        frames = config.frames if kind == "clip" else 1
        clips = 2 if recipe in EDITING_STAGES else 1
        layer_parameters = parameters_by_part["text_encoder"] - parameters_by_part["words"]
        flops += estimate_text_encoder_flops(preset.text.max_tokens, layer_parameters)
        # Twice, because TF32 has half the rate of bf16.
        flops += count_vae_flops(preset.name, config.width, config.height, frames) * clips * 2
    return flops


def estimate_step_seconds(
    config: PlanConfig, kind: Kind, trained: int, model_flops: Flops, extra_flops: Flops
) -> dict[str, float]:
    """Return the seconds of one step by part, as if no parts overlapped; in practice a step is shorter."""
    count, gpus = config.samples_per_gpu(kind) * config.grad_accum_steps, config.gpus
    operations = (model_flops + extra_flops).total * count / config.sequence_parallel_size
    exchanged_gb = 2 * 2 * trained * (gpus - 1) / gpus / 1e9  # gradients and weights, both in bf16
    # Bytes per weight: states read (16) and written (12), the average (8), the gradients (4).
    touched_gb = (16 + 12 + 8 + 4) * trained / gpus / 1e9
    times = {
        "compute": operations / (config.gpu.peak_tflops * 1e12 * config.utilisation),
        "gradients and weights": exchanged_gb / find_slowest_link(config),
        "optimizer": touched_gb / config.gpu.memory_gb_per_second,
    }
    if config.sequence_parallel_size > 1:
        times["all-to-all"] = estimate_all_to_all_gb(config, kind) * count / config.gpu.link_gb_per_second
    return times


def find_slowest_link(config: PlanConfig) -> float:
    """Return the bandwidth of the slowest link between the GPUs, in GB/s in one direction."""
    link = config.gpu.link_gb_per_second
    return link if config.gpus <= GPUS_PER_NODE else min(link, NETWORK_GB_PER_SECOND)


def estimate_all_to_all_gb(config: PlanConfig, kind: Kind) -> float:
    """Return the GB that one GPU sends for one sample: queries, keys, values and outputs of every block."""
    decoder, size = config.preset.decoder, config.sequence_parallel_size
    passes = 3 if config.checkpointing else 2
    bytes_per_block = 4 * config.count_decoder_tokens(kind) / size * decoder_width(decoder) * 2 * (size - 1) / size
    return float(bytes_per_block * decoder["num_layers"] * passes / 1e9)


def count_steps(config: PlanConfig) -> dict[Kind, float]:
    """Return the steps of each kind: one epoch of the stage's tasks in Table 1, or `steps` in the same ratio."""
    tasks = {task: count for task, count in PAPER_SAMPLE_COUNTS.items() if task in TASKS_BY_STAGE[config.recipe]}
    clips = sum(count for task, count in tasks.items() if "video" in task)
    samples: dict[Kind, float] = {"still": sum(tasks.values()) - clips, "clip": clips}
    epoch = {
        kind: samples[kind] / (config.samples_per_gpu(kind) * config.grad_accum_steps * config.replicas)
        for kind in KINDS
    }
    if config.steps is None:
        return epoch
    total = sum(epoch.values())
    return {kind: config.steps * steps / total for kind, steps in epoch.items()}

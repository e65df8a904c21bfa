"""Counts of floating point operations, the peaks of the GPUs they run on, and what share of a peak was reached.

A multiply and an add are two operations.  Products with weights and attention are counted (all that
`torch.utils.flop_counter` counts, to the last one); norms, gates and rotations are not.
Letters: N decoder tokens, L condition tokens, S inputs and Q queries of a query transformer, d width, f feed-forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from omnivideo.errors import InvalidInput
from omnivideo.presets import Preset, QueryTransformerConfig, count_decoder_tokens, count_visual_context_tokens


@dataclass(frozen=True)
class Flops:
    """Operations in products with weights, and in attention (scores, and their products with the values)."""

    weights: float = 0.0
    attention: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.weights + other.weights, self.attention + other.attention)

    def __mul__(self, factor: float) -> "Flops":
        return Flops(self.weights * factor, self.attention * factor)

    @property
    def total(self) -> float:
        return self.weights + self.attention

    @property
    def with_backward(self) -> "Flops":
        """Forward and backward: the backward of a product is two of them, by its input and by its weights."""
        return self * 3

    @property
    def with_frozen_backward(self) -> "Flops":
        """Forward and backward through frozen weights, which have no gradients of their own."""
        return Flops(self.weights * 2, self.attention * 3)


def count_decoder_flops(config: Mapping[str, Any], tokens: int, condition_tokens: int) -> Flops:
    """One sample forward through a `WanTransformer3DModel` of this configuration."""
    n, c, d, f = tokens, condition_tokens, decoder_width(config), config["ffn_dim"]
    patch = prod(config["patch_size"])
    block = Flops(
        weights=2 * (4 * n * d * d + 2 * n * d * d + 2 * c * d * d + 2 * n * d * f),
        attention=4 * n * n * d + 4 * n * c * d,
    )
    ends = n * d * patch * (config["in_channels"] + config["out_channels"])
    text = c * (config["text_dim"] * d + d * d)
    time = config["freq_dim"] * d + d * d + 6 * d * d
    return block * config["num_layers"] + Flops(2 * (ends + text + time))


def decoder_width(config: Mapping[str, Any]) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def count_query_transformer_flops(size: QueryTransformerConfig, input_tokens: int) -> Flops:
    """One pass through the vision head or the adapter over `inputs` tokens."""
    s, q, d = input_tokens, size.num_queries, size.width
    encoder = Flops(2 * 12 * s * d * d, 4 * s * s * d)
    decoder = Flops(2 * (14 * q * d * d + 2 * s * d * d), 4 * q * q * d + 4 * q * s * d)
    return (encoder + decoder) * size.num_layers + Flops(2 * s * (size.input_dim * d + d * d))


def count_visual_context_flops(preset: Preset, tokens: int) -> Flops:
    """A source's latents into `tokens` condition tokens."""
    size = preset.visual_context
    patch = preset.decoder["in_channels"] * size.kernel_size**2
    return Flops(2 * tokens * size.hidden_dim * (patch + preset.text_width))


def count_mllm_flops(model: Any, inputs: Mapping[str, Tensor]) -> Flops:
    """A whole batch forward through a `Qwen3VLForConditionalGeneration` to its last hidden states, padding too.

    Of the causal attention's scores half are counted; a frame's patches attend to each other alone.
    """
    rows, tokens = inputs["input_ids"].shape
    text, vision, visual = model.config.text_config, model.config.vision_config, model.model.visual
    scores = 2 * rows * tokens**2 * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    flops = Flops(2 * rows * tokens * count_matrix_weights(model.model.language_model.layers), scores)
    for name in ("image_grid_thw", "video_grid_thw"):
        for frames, height, width in inputs[name].tolist() if name in inputs else ():
            patches = frames * height * width
            weights = count_matrix_weights(visual.patch_embed, visual.blocks)
            weights += count_matrix_weights(visual.merger, visual.deepstack_merger_list) / vision.spatial_merge_size**2
            flops += Flops(2 * patches * weights, 4 * patches * height * width * vision.hidden_size * vision.depth)
    return flops


def count_matrix_weights(*parts: nn.Module) -> int:
    """Weights that every token is multiplied by."""
    return sum(parameter.numel() for part in parts for parameter in part.parameters() if parameter.ndim > 1)


def count_adapter_stage_flops(
    preset: Preset, trained_prefixes: Sequence[str], hidden_tokens: int, is_video: bool
) -> Flops:
    """One sample of a stage that trains what begins with `trained`: the vision head over `hidden` states, and the
    adapter over the visual tokens, of which a batch of stills uses the first."""
    assert preset.vision_head is not None and preset.adapter is not None, "a version 1 preset"
    head = count_query_transformer_flops(preset.vision_head, hidden_tokens)
    adapter = count_query_transformer_flops(preset.adapter, 1) * (preset.vision_head.num_queries if is_video else 1)
    return (head.with_backward if is_trained(trained_prefixes, "bridge.vision_head") else head) + adapter.with_backward


def count_flow_stage_flops(
    preset: Preset,
    trained_prefixes: Sequence[str],
    grid: tuple[int, int, int],
    condition_tokens: int,
    hidden_tokens: int,
    edited_fraction: float = 0.0,
) -> Flops:
    """One sample of the stages that train through the decoder (2b and 3): its latent grid, its condition's tokens, the
    hidden states that it comes from; `edited` is the share of samples that have a source."""
    decoder = count_decoder_flops(preset.decoder, count_decoder_tokens(preset, grid), condition_tokens)
    context = (
        count_visual_context_flops(preset, count_visual_context_tokens(preset, grid)).with_backward * edited_fraction
    )
    decoder_cost = decoder.with_backward if is_trained(trained_prefixes, "decoder") else decoder.with_frozen_backward
    return count_adapter_stage_flops(preset, trained_prefixes, hidden_tokens, grid[0] > 1) + context + decoder_cost


def is_trained(trained_prefixes: Sequence[str], part: str) -> bool:
    return part.startswith(tuple(trained_prefixes))


# ---------------------------------------------------------------- what was reached


def tflops_per_second(operations: float, seconds: float, gpus: int = 1) -> float:
    """TFLOP/s of one GPU, for the operations that all of them did together."""
    return operations / seconds / gpus / 1e12


def compute_mfu(operations: float, seconds: float, peak_tflops: float, gpus: int = 1) -> float:
    """Share of the peak: the model's own operations (`trained`, `passed`), without those done twice to save memory."""
    return tflops_per_second(operations, seconds, gpus) / peak_tflops


@dataclass(frozen=True)
class GPU:
    """Published figures: dense bf16 TFLOP/s, memory in GB, its bandwidth and that of the link to its neighbours
    (one way), in GB/s."""

    name: str
    peak_tflops: float
    memory_gb: float
    memory_gb_per_second: float
    link_gb_per_second: float
    datasheet: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100-40", 312, 40, 1555, 300, "NVIDIA A100 datasheet, SXM4 40 GB"),
        GPU("A100", 312, 80, 2039, 300, "NVIDIA A100 datasheet, SXM4 80 GB"),
        GPU("L40S", 362, 48, 864, 32, "NVIDIA L40S datasheet; PCIe 4.0 x16"),
        GPU("H100-PCIe", 756, 80, 2000, 64, "NVIDIA H100 datasheet, PCIe; half of the figure with sparsity"),
        GPU("H100", 989, 80, 3350, 450, "NVIDIA H100 datasheet, SXM5; half of the figure with sparsity"),
        GPU("H200", 989, 141, 4800, 450, "NVIDIA H200 datasheet, SXM; half of the figure with sparsity"),
        GPU("B200", 2250, 180, 7700, 900, "NVIDIA DGX B200 datasheet, an eighth; half of the figure with sparsity"),
    )
}


def parse_gpus(text: str) -> tuple[int, GPU]:
    """ "8xH100" as a count and a card; raises InvalidInput."""
    count, cross, name = text.partition("x")
    if not (cross and count.isascii() and count.isdigit() and int(count) >= 1):
        raise InvalidInput("gpus", f"{text!r} is not of the form COUNTxNAME, e.g. 8xH100")
    if name not in GPUS:
        raise InvalidInput("gpus", f"{name!r} is not one of {', '.join(GPUS)}")
    return int(count), GPUS[name]

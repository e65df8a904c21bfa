"""Count the floating-point operations of the models, for planning and for the MFU of a run.

A multiplication and an addition are two operations. Products with weights and attention are counted, exactly as
`torch.utils.flop_counter` counts them; norms, gates and rotations are not.

Symbols: n decoder tokens, c condition tokens, s input tokens and q queries of a query transformer, d width,
f feed-forward width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from omnivideo.contracts import count_decoder_tokens, count_visual_context_tokens
from omnivideo.presets import Preset, QueryTransformerConfig


@dataclass(frozen=True)
class Flops:
    """Operations in products with weights, and in attention (the scores and their products with the values)."""

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
        """Return forward and backward: a product has two products in its backward pass, for its input and weights."""
        return self * 3

    @property
    def with_frozen_backward(self) -> "Flops":
        """Return forward and backward through frozen weights, for which no gradients are computed."""
        return Flops(self.weights * 2, self.attention * 3)


def count_decoder_flops(config: Mapping[str, Any], tokens: int, condition_tokens: int) -> Flops:
    """Count the forward pass of one sample through a `WanTransformer3DModel` of this configuration."""
    n, c, d, f = tokens, condition_tokens, decoder_width(config), int(config["ffn_dim"])
    layers, patch = int(config["num_layers"]), prod(config["patch_size"])
    block = Flops(
        weights=2 * (4 * n * d * d + 2 * n * d * d + 2 * c * d * d + 2 * n * d * f),
        attention=4 * n * n * d + 4 * n * c * d,
    )
    ends = n * d * patch * (config["in_channels"] + config["out_channels"])
    text = c * (config["text_dim"] * d + d * d)
    time = config["freq_dim"] * d + d * d + 6 * d * d
    return block * layers + Flops(2 * (ends + text + time))


def decoder_width(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def count_query_transformer_flops(size: QueryTransformerConfig, input_tokens: int) -> Flops:
    """Count one forward pass of the vision head or the adapter over `input_tokens` tokens."""
    s, q, d = input_tokens, size.num_queries, size.width
    encoder = Flops(2 * 12 * s * d * d, 4 * s * s * d)
    decoder = Flops(2 * (14 * q * d * d + 2 * s * d * d), 4 * q * q * d + 4 * q * s * d)
    return (encoder + decoder) * size.num_layers + Flops(2 * s * (size.input_dim * d + d * d))


def count_visual_context_flops(preset: Preset, tokens: int) -> Flops:
    """Count the projection of a source's latents to `tokens` condition tokens."""
    size = preset.visual_context
    patch = preset.decoder["in_channels"] * size.kernel_size**2
    return Flops(2 * tokens * size.hidden_dim * (patch + preset.text_width))


def count_mllm_flops(model: Any, inputs: Mapping[str, Tensor]) -> Flops:
    """Count the forward pass of a batch, padding included, through a `Qwen3VLForConditionalGeneration`.

    It ends at the last hidden states. Half of the scores of causal attention are counted. In the vision encoder the
    patches of a frame attend to each other only.
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
    """Count the weights with which every token is multiplied."""
    return sum(parameter.numel() for part in parts for parameter in part.parameters() if parameter.ndim > 1)


def count_adapter_stage_flops(
    preset: Preset, trained_prefixes: Sequence[str], hidden_tokens: int, is_video: bool
) -> Flops:
    """Count one sample of a stage that trains the parameters under `trained_prefixes`, without the decoder.

    The vision head reads `hidden_tokens` hidden states. The adapter reads the visual tokens; for images it reads the
    first one only.
    """
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
    """Count one sample of a stage that trains through the decoder (2b and 3).

    `grid` is the shape of its latents (frames, height, width) and `edited_fraction` the fraction of samples with a
    source.
    """
    decoder = count_decoder_flops(preset.decoder, count_decoder_tokens(preset, grid), condition_tokens)
    context = (
        count_visual_context_flops(preset, count_visual_context_tokens(preset, grid)).with_backward * edited_fraction
    )
    decoder_cost = decoder.with_backward if is_trained(trained_prefixes, "decoder") else decoder.with_frozen_backward
    return count_adapter_stage_flops(preset, trained_prefixes, hidden_tokens, grid[0] > 1) + context + decoder_cost


def is_trained(trained_prefixes: Sequence[str], part: str) -> bool:
    """Return True if a part such as "decoder" is under one of the prefixes that a stage trains."""
    return part.startswith(tuple(trained_prefixes))

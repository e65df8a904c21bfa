"""The layouts of the authors' published weights, and the mapping from their tensors to ours.

    version 1       transformer/model.pt              wan_model. adapter. ar_vision_head. visual_context_adapter.
    version 2       transformer/pytorch_model.pt      wan_model. vlm_norm. vlm_proj. visual_context_adapter.
      two experts   high_noise_model/model.pt, low_noise_model/model.pt, each with the same prefixes
    markers         special_tokens/tokens.pkl (version 1), special_tokens.pkl (version 2)
    null condition  unconditioned_context/context.pkl (version 1)

Our folder has one part for each of their prefixes. The parts of the low-noise expert end in `_2`.
"""

import re
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from omnivideo.models.bridge import HiddenProjection
from omnivideo.models.omni import Bridge, build_visual_context_adapter
from omnivideo.presets import OMNIVIDEO2_1_3B, OMNIVIDEO2_A14B, OMNIVIDEO_1_3B, Preset

PUBLISHED_PRESETS = (OMNIVIDEO_1_3B.name, OMNIVIDEO2_1_3B.name, OMNIVIDEO2_A14B.name)
NULL_CONTEXT_FILE = "unconditioned_context/context.pkl"
KEY_PREFIXES = {
    "transformer": "wan_model.",
    "vision_head": "ar_vision_head.",
    "adapter": "adapter.",
    "hidden_projection": "vlm_",
    "visual_context": "visual_context_adapter.",
}

# From diffusers' names of Wan's layers to Wan's own. Two norms of a block swap their names.
WAN_KEY_RULES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
        (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
        (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
        (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
        (r"\.scale_shift_table$", ".modulation"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".o."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
        (r"\.norm2\.", ".norm3."),
    )
)


@dataclass(frozen=True)
class TensorLocation:
    """The part and key of a published tensor in our folder, and its shape."""

    part: str
    key: str
    shape: tuple[int, ...]


def to_published_key(part: str, key: str) -> str:
    """Return the published name of a tensor of one of our parts."""
    if part == "transformer":
        for pattern, name in WAN_KEY_RULES:
            key = pattern.sub(name, key)
    if part == "vision_head":
        key = re.sub(r"^adapter\.", "visionHeadAdapter.", key)
    return KEY_PREFIXES[part] + key


def list_weight_files(preset: Preset) -> tuple[str, ...]:
    """Return the published files of tensors, one for each decoder."""
    if preset.version == 1:
        return ("transformer/model.pt",)
    if preset.experts.num_decoders == 1:
        return ("transformer/pytorch_model.pt",)
    return ("high_noise_model/model.pt", "low_noise_model/model.pt")


def get_markers_file(preset: Preset) -> str:
    return "special_tokens/tokens.pkl" if preset.version == 1 else "special_tokens.pkl"


def list_required_markers(preset: Preset) -> tuple[str, ...]:
    """Return the markers that a preset needs; version 2 has no adapter tokens to mark."""
    return preset.condition.marker_names


def build_meta_modules(preset: Preset) -> dict[str, nn.Module]:
    """Return our parts of one published file on the meta device, without allocating memory."""
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"transformer": WanTransformer3DModel(**preset.decoder)}
        if preset.version == 1:
            bridge = Bridge(preset)
            return parts | {name: getattr(bridge, name) for name in ("vision_head", "adapter", "visual_context")}
        parts["hidden_projection"] = HiddenProjection(preset.mllm_width, preset.text_width)
        return parts | {"visual_context": build_visual_context_adapter(preset)}


def locate_tensors(preset: Preset) -> dict[str, TensorLocation]:
    """Return the location in our folder of every tensor of a published file, keyed by its published name."""
    return {
        to_published_key(part, key): TensorLocation(part, key, tuple(value.shape))
        for part, module in build_meta_modules(preset).items()
        for key, value in module.state_dict().items()
    }


def get_part_folder(part: str, decoder_index: int) -> str:
    """Return our subfolder for a part of a decoder; index 0 is the only decoder or the high-noise expert."""
    return part if decoder_index == 0 else f"{part}_{decoder_index + 1}"

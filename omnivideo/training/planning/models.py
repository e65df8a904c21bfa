"""The models at full size: their parameters, counted on the meta device, and the operations of the frozen ones."""

from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from omnivideo.models.omni import Bridge, build_decoder
from omnivideo.presets import Preset, get_preset
from omnivideo.training.planning.flops import Flops

# Qwen3-VL 8B, whose width is that of the preset.
MLLM_CONFIG: dict[str, Any] = {
    "text_config": {
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262_144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                            "mrope_interleaved": True},
    },
    "vision_config": {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 4096, "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
    "tie_word_embeddings": False,
}  # fmt: skip
# The encoder of Wan's text condition.
UMT5_XXL_CONFIG: dict[str, Any] = {
    "vocab_size": 256_384, "d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
# SigLIP2 so400m.
SIGLIP_CONFIG: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip


def build_meta_models(preset: Preset) -> nn.ModuleDict:
    """Build all models on the meta device, under the names that the stages use."""
    with torch.device("meta"):
        parts = {
            "mllm": Qwen3VLForConditionalGeneration(Qwen3VLConfig(**MLLM_CONFIG)),
            "bridge": Bridge(preset),
            "decoder": build_decoder(preset),
            "text_encoder": UMT5EncoderModel(UMT5Config(**UMT5_XXL_CONFIG)),
            "vae": AutoencoderKLWan(**preset.vae),
            "visual_encoder": SiglipVisionModel(SiglipVisionConfig(**SIGLIP_CONFIG)),
        }
    return nn.ModuleDict(parts)


def count_table_parameters() -> dict[str, int]:
    """Count the parameters of the language models that are not multiplied with every token."""
    text = MLLM_CONFIG["text_config"]
    table = text["vocab_size"] * text["hidden_size"]
    words = UMT5_XXL_CONFIG["vocab_size"] * UMT5_XXL_CONFIG["d_model"]
    return {"lm_head": table, "embeddings": table, "words": words}


def estimate_mllm_flops(tokens: int, parameters: int) -> Flops:
    """Estimate the MLLM's forward pass over one sequence; half of the scores of causal attention are counted."""
    text = MLLM_CONFIG["text_config"]
    width = text["num_attention_heads"] * text["head_dim"]
    return Flops(2.0 * parameters * tokens, 2.0 * tokens**2 * width * text["num_hidden_layers"])


def estimate_visual_encoder_flops(frames: int, parameters: int) -> Flops:
    """Estimate the visual encoder's forward pass over some frames."""
    tokens = (SIGLIP_CONFIG["image_size"] // SIGLIP_CONFIG["patch_size"]) ** 2
    width, layers = SIGLIP_CONFIG["hidden_size"], SIGLIP_CONFIG["num_hidden_layers"]
    return Flops(2.0 * parameters * tokens, 4.0 * tokens**2 * width * layers) * frames


def estimate_text_encoder_flops(tokens: int, parameters: int) -> Flops:
    """Estimate the text encoder's forward pass over one text."""
    width = UMT5_XXL_CONFIG["num_heads"] * UMT5_XXL_CONFIG["d_kv"]
    return Flops(2.0 * parameters * tokens, 4.0 * tokens**2 * width * UMT5_XXL_CONFIG["num_layers"])


@cache
def count_vae_flops(preset_name: str, width: int, height: int, frames: int) -> Flops:
    """Count the encoding of one clip with torch's counter on the meta device."""
    with torch.device("meta"):
        vae, pixels = AutoencoderKLWan(**get_preset(preset_name).vae), torch.empty(1, 3, frames, height, width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode(pixels)
    return Flops(float(counter.get_total_flops()))

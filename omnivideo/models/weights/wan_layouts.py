"""The layouts of Wan's own VAE and text encoder, and the mapping from their tensors to diffusers and transformers.

    Wan2.1_VAE.pth                       AutoencoderKLWan
    models_t5_umt5-xxl-enc-bf16.pth      UMT5EncoderModel, whose sizes are read from the tensors

Both files are dictionaries of tensors; nothing is computed, so every tensor keeps its bits.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from omnivideo.errors import CheckpointError
from omnivideo.models.weights.tensor_files import StateDict

VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
Rules = tuple[tuple[re.Pattern[str], str], ...]


def compile_rules(rules: Iterable[tuple[str, str]]) -> Rules:
    return tuple((re.compile(pattern), name) for pattern, name in rules)


# From diffusers' names to Wan's. The layers of a residual block come first: `conv1` has another meaning outside it.
VAE_KEY_RULES = compile_rules(
    (
        (r"\.norm1\.", ".residual.0."),
        (r"\.conv1\.", ".residual.2."),
        (r"\.norm2\.", ".residual.3."),
        (r"\.conv2\.", ".residual.6."),
        (r"\.conv_shortcut\.", ".shortcut."),
        (r"^encoder\.down_blocks\.", "encoder.downsamples."),
        (r"\.mid_block\.resnets\.0\.", ".middle.0."),
        (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.mid_block\.resnets\.1\.", ".middle.2."),
        (r"\.conv_in\.", ".conv1."),
        (r"\.norm_out\.", ".head.0."),
        (r"\.conv_out\.", ".head.2."),
        (r"^quant_conv\.", "conv1."),
        (r"^post_quant_conv\.", "conv2."),
    )
)
UP_BLOCK = re.compile(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.")
# From transformers' names to Wan's.
TEXT_ENCODER_KEY_RULES = compile_rules(
    (
        (r"^shared\.", "token_embedding."),
        (r"^encoder\.final_layer_norm\.", "norm."),
        (r"^encoder\.block\.", "blocks."),
        (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
        (r"\.layer\.0\.SelfAttention\.", ".attn."),
        (r"\.layer\.0\.layer_norm\.", ".norm1."),
        (r"\.layer\.1\.layer_norm\.", ".norm2."),
        (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
        (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
        (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
    )
)


def apply_rules(rules: Rules, key: str) -> str:
    for pattern, name in rules:
        key = pattern.sub(name, key)
    return key


def to_wan_vae_key(key: str, num_res_blocks: int) -> str:
    """Return Wan's name of a tensor of diffusers' VAE. Wan numbers all layers of its decoder in one list."""

    def number_layer(match: re.Match[str]) -> str:
        block, kind, layer = int(match[1]), match[2], int(match[3])
        index = block * (num_res_blocks + 2) + (layer if kind == "resnets" else num_res_blocks + 1)
        return f"decoder.upsamples.{index}."

    return apply_rules(VAE_KEY_RULES, UP_BLOCK.sub(number_layer, key))


def locate_vae_tensors(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return our key and the shape of every tensor of Wan's VAE file, keyed by Wan's names."""
    vae = build_meta_vae(config)
    num_res_blocks = int(vae.config["num_res_blocks"])
    return {to_wan_vae_key(key, num_res_blocks): (key, tuple(value.shape)) for key, value in vae.state_dict().items()}


def build_meta_vae(config: Mapping[str, Any]) -> AutoencoderKLWan:
    with torch.device("meta"):
        return AutoencoderKLWan(**config)


def build_meta_text_encoder(config: UMT5Config) -> UMT5EncoderModel:
    with torch.device("meta"):
        return UMT5EncoderModel(config)


def list_text_encoder_shapes(encoder: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a text encoder's tensors; the token embedding is listed under one of its two names."""
    shapes = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight", None)
    return shapes


def read_text_encoder_config(file: str, state: Mapping[str, Tensor]) -> UMT5Config:
    """Return the configuration of Wan's text encoder, with the sizes of its tensors."""
    try:
        vocab_size, width = state["token_embedding.weight"].shape
        buckets, heads = state["blocks.0.pos_embedding.embedding.weight"].shape
        inner_width, hidden_width = len(state["blocks.0.attn.q.weight"]), len(state["blocks.0.ffn.fc1.weight"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{file} does not hold Wan's text encoder: {error} is missing or misshapen") from None
    layers = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=inner_width // heads,
        d_ff=hidden_width,
        num_layers=len(layers),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
        architectures=["UMT5EncoderModel"],
    )


def locate_text_encoder_tensors(config: UMT5Config) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return our key and the shape of every tensor of Wan's text encoder file, keyed by Wan's names."""
    shapes = list_text_encoder_shapes(build_meta_text_encoder(config))
    return {apply_rules(TEXT_ENCODER_KEY_RULES, key): (key, shape) for key, shape in shapes.items()}


def rename_tensors(state: StateDict, locations: Mapping[str, tuple[str, tuple[int, ...]]]) -> StateDict:
    """Return a file's tensors under our keys; the keys must have been checked."""
    return {our_key: state[key] for key, (our_key, _) in locations.items()}

"""What an MLLM gives to the decoder for one clip, and the file that carries it.

    visual_tokens [1, Q, E]     what the vision head predicts, or
    hidden_states [1, N, M]     the hidden states that the preset keeps, and
    caption [bytes]             the caption of the final clip in UTF-8, if the preset's condition has one

The caption is in the file so that a stored job, which refers to the file by its content, has everything that decides
its pixels. Shapes: N kept positions, M width of the MLLM, Q visual tokens, E their width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors.torch import load, save
from torch import Tensor

from omnivideo.errors import CheckpointError
from omnivideo.presets import Preset

VISUAL_TOKENS, HIDDEN_STATES, CAPTION = "visual_tokens", "hidden_states", "caption"


@dataclass(frozen=True)
class MLLMFeatures:
    """What the MLLM gives to the decoder for one clip.

    `values` are the hidden states [1, N, M] that the preset keeps, or the visual tokens [1, Q, E] that the vision head
    has already predicted from them. `caption` describes the final clip, if the preset's condition has a caption.
    """

    values: Tensor
    kind: Literal["hidden-states", "visual-tokens"]
    caption: str = ""


def encode_features(features: MLLMFeatures) -> bytes:
    """Return the file of features; visual tokens keep their type, hidden states are float32."""
    values = features.values.detach().cpu().contiguous()
    if features.kind == "visual-tokens":
        return save({VISUAL_TOKENS: values})
    return add_caption(save({HIDDEN_STATES: values.float()}), features.caption)


def add_caption(file: bytes, caption: str) -> bytes:
    """Return a file of features with a caption, or the same bytes without one."""
    if not caption:
        return file
    return save(load(file) | {CAPTION: torch.tensor(list(caption.encode()), dtype=torch.uint8)})


def decode_features(tensors: Mapping[str, Tensor]) -> MLLMFeatures:
    """Return the features of a file's tensors."""
    if VISUAL_TOKENS in tensors:
        return MLLMFeatures(tensors[VISUAL_TOKENS], "visual-tokens")
    caption = bytes(tensors[CAPTION].tolist()).decode() if CAPTION in tensors else ""
    return MLLMFeatures(tensors[HIDDEN_STATES], "hidden-states", caption)


def check_features(features: MLLMFeatures, preset: Preset) -> None:
    """Raise CheckpointError for features that an MLLM of another preset has computed."""
    shape: tuple[int, ...] = (preset.mllm_width,)
    if features.kind == "visual-tokens":
        shape = (preset.vision_head.num_queries, preset.vision_head.width) if preset.vision_head else ()
    if not shape or tuple(features.values.shape[-len(shape) :]) != shape:
        text = f"the language model's server has weights that do not fit {preset.name}"
        raise CheckpointError(f"{text}; start it with the same preset's weights as the worker")

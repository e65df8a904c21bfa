"""The file that carries an MLLM's features to the decoder: one safetensors file for each request.

    visual_tokens [1, Q, E]     what a vision head predicts, or
    hidden_states [1, N, M]     the kept positions' hidden states, and
    caption [bytes]             the caption of the requested clip in UTF-8, if the preset's condition has one

The caption is in the file so that a stored job, which refers to the file by its content, has everything that decides
its pixels. Shapes: N kept positions, M width of the MLLM, Q visual tokens, E their width.
"""

import torch
from safetensors.torch import load, save
from torch import Tensor

VISUAL_TOKENS, HIDDEN_STATES, CAPTION = "visual_tokens", "hidden_states", "caption"


def encode_features(tensors: bytes, caption: str | None) -> bytes:
    """Return the file of features with a caption added; without a caption, the same bytes."""
    if caption is None:
        return tensors
    return save(load(tensors) | {CAPTION: encode_caption(caption)})


def encode_hidden_states(states_1NM: Tensor, caption: str | None) -> bytes:
    """Return the file of hidden states in float32, and of the caption if there is one."""
    return encode_features(save({HIDDEN_STATES: states_1NM.detach().float().cpu().contiguous()}), caption)


def encode_caption(caption: str) -> Tensor:
    return torch.tensor(list(caption.encode()), dtype=torch.uint8)


def decode_caption(tensors: dict[str, Tensor]) -> str | None:
    """Return the caption among a file's tensors, or None."""
    return bytes(tensors[CAPTION].tolist()).decode() if CAPTION in tensors else None

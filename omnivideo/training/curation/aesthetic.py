"""The aesthetic predictor: a linear head on CLIP's image embedding, as LAION publishes them. No weights are shipped.

The folder holds `clip/` (transformers' layout of a CLIP model with its image processor) and `head.safetensors` or
`head.pth`: `weight`, `bias` of one layer, or `layers.N.weight`, `layers.N.bias` of several without activations.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from omnivideo.errors import CheckpointError


def score_frames(folder: str, full_frames: Sequence[np.ndarray]) -> float:
    """Return the mean score of the frames, from 0 to 10."""
    clip, processor, layers = load_predictor(folder)
    with torch.no_grad():
        pixels = processor(images=list(full_frames), return_tensors="pt")["pixel_values"]
        embeddings_ND = clip(pixel_values=pixels).image_embeds
        x = embeddings_ND / embeddings_ND.norm(dim=-1, keepdim=True)
        for weight, bias in layers:
            x = torch.nn.functional.linear(x, weight, bias)
    return float(x.mean())


@functools.cache
def load_predictor(folder: str) -> tuple[Any, ...]:
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    try:
        clip = CLIPVisionModelWithProjection.from_pretrained(Path(folder) / "clip", local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(Path(folder) / "clip", local_files_only=True)
        return clip.eval(), processor, load_head(Path(folder))
    except (OSError, ValueError, KeyError, RuntimeError):
        raise CheckpointError("the aesthetic predictor needs clip/ and head.safetensors (or head.pth)") from None


def load_head(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Return the weight and bias of each layer, in order."""
    file = folder / "head.safetensors"
    state = load_file(file) if file.exists() else torch.load(folder / "head.pth", weights_only=True)
    names = [name.removesuffix("weight") for name in state if name.endswith("weight")]
    names.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    return [(state[f"{name}weight"].float(), state[f"{name}bias"].float()) for name in names]

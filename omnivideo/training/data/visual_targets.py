"""TODO docstring of omnivideo/training/data/visual_targets.py."""

import torch
from torch import Tensor
from transformers import SiglipVisionModel


def select_frame_indices(frame_count: int, token_count: int) -> Tensor:
    """Which of a clip's frames its visual tokens stand for: spread evenly."""
    return torch.linspace(0, frame_count - 1, token_count).round().long()


def embed_frames(encoder: SiglipVisionModel, clips_BCFHW: Tensor, token_count: int) -> Tensor:
    """Targets E of Eq. 1: pooled embeddings [B, tokens, D] of the frames that each clip is looked at in."""
    frame_indices, inverse = select_frame_indices(clips_BCFHW.shape[2], token_count).unique(
        return_inverse=True
    )  # a still has one
    frames = clips_BCFHW[:, :, frame_indices].transpose(1, 2)
    pooled = encoder(frames.flatten(0, 1).to(encoder.device)).pooler_output
    return pooled.unflatten(0, (len(clips_BCFHW), len(frame_indices)))[:, inverse]

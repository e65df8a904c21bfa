"""The tiny preset's decoder with random weights, and random inputs for it."""

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from omnivideo.models.omni import build_decoder
from omnivideo.presets import TINY

GRID = (3, 8, 8)  # latent frames, height and width
TOKENS, CONDITION_TOKENS = 48, 40


def build_tiny_decoder(trained: bool = True) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return build_decoder(TINY).requires_grad_(trained).train()


def make_inputs(samples: int = 1) -> tuple[Tensor, ...]:
    """Return latents, times and a condition, which has gradients as if an adapter had computed it."""
    condition = torch.randn(samples, CONDITION_TOKENS, 192, requires_grad=True)
    return torch.randn(samples, 16, *GRID), torch.full((samples,), 500.0), condition


def predict_velocity(decoder: WanTransformer3DModel, inputs: tuple[Tensor, ...]) -> Tensor:
    velocity: Tensor = decoder(*inputs, return_dict=False)[0]
    return velocity

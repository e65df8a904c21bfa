"""Fixed positions on the decoder's token grid, for models that are too small to infer them.

Wan encodes positions only by rotary attention, which is relative: under pure noise a token can locate itself only by
comparing itself with its neighbours. A large model learns to do so; a model of a few million weights needs hours of
training for it. Presets with `absolute_positions` add this table after the patch embedding and to the visual context
tokens. The table has no weights, so checkpoints keep the layout of the stock classes.
Shapes: B batch, D channels, T h w token grid, L positions along one axis.
"""

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

MAX_WAVELENGTH = 64.0  # tokens, in units of 2 pi


def build_axis_table(length: int, dim: int) -> Tensor:
    """Return [L, D] sines and cosines, with wavelengths from 2 pi to 2 pi * MAX_WAVELENGTH tokens; `dim` is even."""
    frequencies_D = MAX_WAVELENGTH ** -torch.linspace(0, 1, dim // 2)
    angles_LD = torch.arange(length)[:, None] * frequencies_D
    return torch.cat([angles_LD.sin(), angles_LD.cos()], dim=1)


def build_grid_positions(dim: int, frames: int, height: int, width: int) -> Tensor:
    """Return [D, T, h, w]: each axis has a third of the channels and counts in tokens."""
    third = dim // 6 * 2
    t = build_axis_table(frames, third)[:, None, None].expand(-1, height, width, -1)
    y = build_axis_table(height, third)[None, :, None].expand(frames, -1, width, -1)
    x = build_axis_table(width, dim - 2 * third)[None, None, :].expand(frames, height, -1, -1)
    return torch.cat([t, y, x], dim=-1).permute(3, 0, 1, 2)


def add_positions(module: nn.Module, args: tuple[Tensor, ...], patches_BDThw: Tensor) -> Tensor:
    """Add the table to the output of a patch embedding; this is a forward hook."""
    table_DThw = build_grid_positions(*patches_BDThw.shape[1:])
    return patches_BDThw + table_DThw.to(patches_BDThw)


def add_absolute_positions(decoder: WanTransformer3DModel) -> WanTransformer3DModel:
    """Register a forward hook that adds the table to the decoder's patch embedding, and return the decoder."""
    decoder.patch_embedding.register_forward_hook(add_positions)
    return decoder

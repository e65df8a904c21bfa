"""Fixed positions on the decoder's token grid, for models too small to find their place by themselves.

Wan knows positions only through rotary attention, which is relative: a token under pure noise can tell where it
is only by comparing itself with its neighbours.  A large model learns that; one of a few million weights spends
hours on it.  Presets with `absolute_positions` add this table after the patch embedding and to the visual
context tokens.  It has no weights, so checkpoints keep the layout of the stock classes.
"""

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn


def build_axis_table(length: int, dim: int) -> Tensor:
    """[length, dim] sines and cosines with wavelengths from 2 pi to 2 pi * 64 tokens; `dim` is even."""
    frequencies = 64.0 ** -torch.linspace(0, 1, dim // 2)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def build_grid_positions(dim: int, frames: int, height: int, width: int) -> Tensor:
    """[dim, frames, height, width]: a third of the channels for each axis, in units of one token."""
    third = dim // 6 * 2
    t = build_axis_table(frames, third)[:, None, None].expand(-1, height, width, -1)
    y = build_axis_table(height, third)[None, :, None].expand(frames, -1, width, -1)
    x = build_axis_table(width, dim - 2 * third)[None, None, :].expand(frames, height, -1, -1)
    return torch.cat([t, y, x], dim=-1).permute(3, 0, 1, 2)


def add_positions(module: nn.Module, args: tuple[Tensor, ...], patches_BDTHW: Tensor) -> Tensor:
    """A forward hook for a patch embedding."""
    table = build_grid_positions(*patches_BDTHW.shape[1:])
    return patches_BDTHW + table.to(patches_BDTHW)


def add_absolute_positions(decoder: WanTransformer3DModel) -> WanTransformer3DModel:
    decoder.patch_embedding.register_forward_hook(add_positions)
    return decoder

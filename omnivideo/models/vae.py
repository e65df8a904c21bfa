"""The video autoencoder: pixels to normalised latents and back, around diffusers' `AutoencoderKLWan`.

Shapes: B batch, C 3 colours, z latent channels, F frames, T = (F - 1) / 4 + 1 latent frames, H W pixels,
h = H / 8, w = W / 8. Pixels are in -1..1.
"""

from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from omnivideo.contracts import VAE_SPATIAL_STRIDE

MAX_UNTILED_PIXELS = 1280 * 720  # of a frame; larger ones are encoded and decoded in overlapping tiles
TILE_SIZE, TILE_STRIDE = 512, 384  # px


def choose_tiling(vae: AutoencoderKLWan, height: int, width: int) -> None:
    """Let the VAE work in tiles if frames of this size are above the limit, which keeps its memory bounded.

    The size alone decides, not the machine's memory: tiles change the pixels slightly.
    """
    if height * width > MAX_UNTILED_PIXELS:
        vae.enable_tiling(TILE_SIZE, TILE_SIZE, TILE_STRIDE, TILE_STRIDE)
    else:
        vae.disable_tiling()


def pixels_from_bytes(clips_BFHWC: np.ndarray) -> Tensor:
    """Return pixels [B, 3, F, H, W] in -1..1 from uint8 [B, F, H, W, 3]."""
    return torch.from_numpy(clips_BFHWC).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def pixels_to_bytes(pixels_BCFHW: Tensor, rounding: Literal["nearest", "truncate"] = "nearest") -> np.ndarray:
    """Return uint8 [B, F, H, W, 3] from pixels in -1..1, rounded to the nearest byte or down."""
    scaled = (pixels_BCFHW.float().clamp(-1, 1) + 1) * 127.5
    rounded = scaled.round() if rounding == "nearest" else scaled
    return rounded.to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()


def get_latent_statistics(vae: AutoencoderKLWan, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return each latent channel's mean and standard deviation [1, z, 1, 1, 1], like `reference`."""
    mean_z, std_z = (
        torch.tensor(getattr(vae.config, key), device=reference.device, dtype=reference.dtype)
        for key in ("latents_mean", "latents_std")
    )
    return mean_z.view(1, -1, 1, 1, 1), std_z.view(1, -1, 1, 1, 1)


def encode_pixels(vae: AutoencoderKLWan, pixels_BCFHW: Tensor) -> Tensor:
    """Return latents [B, z, T, h, w]: the posterior's mode, normalised to mean 0 and variance 1 in each channel."""
    mean, std = get_latent_statistics(vae, pixels_BCFHW)
    choose_tiling(vae, *pixels_BCFHW.shape[-2:])
    latents_BzThw: Tensor = vae.encode(pixels_BCFHW).latent_dist.mode()
    return (latents_BzThw - mean) / std


def decode_latents(vae: AutoencoderKLWan, latents_BzThw: Tensor) -> Tensor:
    """Return pixels [B, 3, F, H, W] in -1..1 from normalised latents."""
    mean, std = get_latent_statistics(vae, latents_BzThw)
    choose_tiling(vae, *(VAE_SPATIAL_STRIDE * size for size in latents_BzThw.shape[-2:]))
    pixels_BCFHW: Tensor = vae.decode(latents_BzThw * std + mean, return_dict=False)[0]
    return pixels_BCFHW


def decode_unclamped(vae: AutoencoderKLWan, z_BzThw: Tensor) -> Tensor:
    """Return pixels [B, 3, F, H, W] from latents that are not normalised, without the clamp that diffusers applies.

    Training needs it: clamped pixels have no gradient.
    """
    vae.clear_cache()
    x_BzThw = vae.post_quant_conv(z_BzThw)
    frames = []
    for index in range(x_BzThw.shape[2]):
        latent_frame = x_BzThw[:, :, index : index + 1]
        frames.append(vae.decoder(latent_frame, feat_cache=vae._feat_map, feat_idx=[0], first_chunk=index == 0))
    vae.clear_cache()
    pixels_BCFHW = torch.cat(frames, dim=2)
    if vae.config.patch_size is None:
        return pixels_BCFHW
    unpatched_BCFHW: Tensor = unpatchify(pixels_BCFHW, patch_size=vae.config.patch_size)
    return unpatched_BCFHW

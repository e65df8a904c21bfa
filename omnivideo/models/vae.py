"""The video autoencoder: pixels to normalised latents and back, around diffusers' `AutoencoderKLWan`.

Shapes: B batch, C = 3 colours or z latent channels, F frames, T = (F - 1) / 4 + 1 latent frames, H W pixels,
h = H / 8, w = W / 8.  Pixels are in -1..1.
"""

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor


def pixels_from_bytes(clips_BFHWC: np.ndarray) -> Tensor:
    """Pixels [B, 3, F, H, W] in -1..1 from uint8 [B, F, H, W, 3]."""
    return torch.from_numpy(clips_BFHWC).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def pixels_to_bytes(pixels_BCFHW: Tensor) -> np.ndarray:
    """uint8 [B, F, H, W, 3] from pixels in -1..1."""
    scaled = ((pixels_BCFHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 4, 1).cpu().numpy()


def get_latent_statistics(vae: AutoencoderKLWan, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, shaped [1, z, 1, 1, 1]."""
    mean, std = (
        torch.tensor(getattr(vae.config, key), device=reference.device, dtype=reference.dtype)
        for key in ("latents_mean", "latents_std")
    )
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def encode_pixels(vae: AutoencoderKLWan, pixels_BCFHW: Tensor) -> Tensor:
    """Normalised latents [B, z, T, h, w]: the mean of the posterior, per channel of mean 0 and deviation 1."""
    mean, std = get_latent_statistics(vae, pixels_BCFHW)
    return (vae.encode(pixels_BCFHW).latent_dist.mode() - mean) / std


def decode_latents(vae: AutoencoderKLWan, latents_BzThw: Tensor) -> Tensor:
    """Pixels [B, 3, F, H, W] in -1..1 from normalised latents."""
    mean, std = get_latent_statistics(vae, latents_BzThw)
    return vae.decode(latents_BzThw * std + mean, return_dict=False)[0]


def decode_unclamped(vae: AutoencoderKLWan, z_BzThw: Tensor) -> Tensor:
    """Pixels from raw latents without diffusers' final clamp, under which saturated pixels would get no gradient."""
    vae.clear_cache()
    x = vae.post_quant_conv(z_BzThw)
    frames = []
    for index in range(x.shape[2]):
        frames.append(
            vae.decoder(x[:, :, index : index + 1], feat_cache=vae._feat_map, feat_idx=[0], first_chunk=index == 0)
        )
    vae.clear_cache()
    pixels = torch.cat(frames, dim=2)
    return pixels if vae.config.patch_size is None else unpatchify(pixels, patch_size=vae.config.patch_size)

"""Latents of rendered scenes, encoded once and reused: 20 ms a clip to encode against under 2 to render.

A cache is a safetensors file named by what it depends on (the scenes and the VAE's weights); the scenes are drawn
again from their seed, so only latents are stored, in half precision.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omnivideo.models.vae import encode, from_bytes
from omnivideo.training.world import Scene, render

CHUNK = 64


def digest(model: nn.Module) -> str:
    """Twelve hex digits over all weights and buffers, in the order of their names."""
    seen = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        seen.update(name.encode())
        seen.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return seen.hexdigest()[:12]


def to_pixels(scenes: Iterable[Scene]) -> Tensor:
    """[B, 3, F, 64, 64] in -1..1."""
    return from_bytes(np.stack([render(scene) for scene in scenes]))


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKLWan, scenes: list[Scene], tell: Callable[[int, int], None] = lambda done, count: None
) -> Tensor:
    """Normalised latents [N, z, T, h, w] in half precision."""
    done = []
    for first in range(0, len(scenes), CHUNK):
        done.append(encode(vae, to_pixels(scenes[first : first + CHUNK]).to(vae.device)).half().cpu())
        tell(min(first + CHUNK, len(scenes)), len(scenes))
    return torch.cat(done)


def cached(
    folder: Path,
    name: str,
    vae: AutoencoderKLWan,
    scenes: list[Scene],
    tell: Callable[[int, int], None] = lambda done, count: None,
) -> Tensor:
    """The latents of these scenes, from the folder's cache where it has them."""
    drawn = hashlib.sha256(repr(scenes).encode()).hexdigest()[:12]
    path = folder / f"{name}-{len(scenes)}-{drawn}-{digest(vae)}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"latents": encode_scenes(vae, scenes, tell)}, partial)
        partial.rename(path)
    return load_file(path)["latents"]


def first_scenes(stream: Iterable[Scene], count: int) -> list[Scene]:
    return list(itertools.islice(stream, count))


def set_statistics(vae: AutoencoderKLWan, latents: Iterable[Tensor]) -> None:
    """Stores each latent channel's mean and deviation in the VAE's config, as Wan's published VAE does."""
    flat = torch.cat([z.float().transpose(0, 1).flatten(1) for z in latents], dim=1)
    vae.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())

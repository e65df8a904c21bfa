"""Latents of rendered scenes, encoded once and cached: a clip takes 20 ms to encode and under 2 ms to render.

A cache is a safetensors file whose name depends on the scenes and the VAE's weights. Scenes are sampled again from
their seed, so only latents are stored, in half precision.
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

from omnivideo.models.vae import encode_pixels, pixels_from_bytes
from omnivideo.synthetic.rendering import render_scene
from omnivideo.synthetic.scenes import Scene

ENCODE_CHUNK_SIZE = 64


def hash_weights(model: nn.Module) -> str:
    """Return twelve hex digits over all weights and buffers, in the order of their names."""
    hasher = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return hasher.hexdigest()[:12]


def pixels_from_scenes(scenes: Iterable[Scene]) -> Tensor:
    """Return the pixels [B, 3, F, 64, 64] of scenes, in -1..1."""
    return pixels_from_bytes(np.stack([render_scene(scene) for scene in scenes]))


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKLWan, scenes: list[Scene], on_progress: Callable[[int, int], None] = lambda done, count: None
) -> Tensor:
    """Return normalised latents [N, z, T, h, w] in half precision."""
    latents = []
    for start in range(0, len(scenes), ENCODE_CHUNK_SIZE):
        latents.append(
            encode_pixels(vae, pixels_from_scenes(scenes[start : start + ENCODE_CHUNK_SIZE]).to(vae.device))
            .half()
            .cpu()
        )
        on_progress(min(start + ENCODE_CHUNK_SIZE, len(scenes)), len(scenes))
    return torch.cat(latents)


def load_or_encode_latents(
    folder: Path,
    name: str,
    vae: AutoencoderKLWan,
    scenes: list[Scene],
    on_progress: Callable[[int, int], None] = lambda done, count: None,
) -> Tensor:
    """Return the latents of scenes from the folder's cache; compute and store them if they are not there."""
    scenes_digest = hashlib.sha256(repr(scenes).encode()).hexdigest()[:12]
    path = folder / f"{name}-{len(scenes)}-{scenes_digest}-{hash_weights(vae)}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"latents": encode_scenes(vae, scenes, on_progress)}, partial)
        partial.rename(path)
    return load_file(path)["latents"]


def take_scenes(stream: Iterable[Scene], count: int) -> list[Scene]:
    return list(itertools.islice(stream, count))


def set_latent_statistics(vae: AutoencoderKLWan, latents: Iterable[Tensor]) -> None:
    """Store mean and deviation of each latent channel in the VAE's config, as Wan's published VAE does."""
    flat = torch.cat([z.float().transpose(0, 1).flatten(1) for z in latents], dim=1)
    vae.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())

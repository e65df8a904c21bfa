"""Foundation: the video autoencoder, in place of Wan's downloaded one.

It first trains on crops around objects (a quarter of the cost of a full frame, with fewer empty pixels), then on full
clips. A second recipe (`vae_decoder`) trains only its decoder: latents keep their meaning, so models trained on them
stay valid, but decode more sharply, even with small errors.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from omnivideo.models.vae import decode_unclamped, encode_pixels, get_latent_statistics
from omnivideo.presets import TINY
from omnivideo.synthetic.rendering import render_object_mask, render_scene
from omnivideo.synthetic.scenes import CLIP_FRAMES, FRAME_SIZE, LONG_CLIP_FRAMES, Scene, sample_scene
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.recipe import Losses, Recipe, single_micro_batch, step_seed

CROP_STRIDE = 8  # px: crops keep an object's position within its latent cell


@dataclass(frozen=True)
class CropPhase:
    """A phase of `steps` batches of `batch_size` crops, with sides of `crop_size` px and `frame_count` frames."""

    steps: int
    batch_size: int
    frame_count: int
    crop_size: int


PHASES = (
    CropPhase(500, 64, 1, 32),
    CropPhase(500, 16, 5, 32),
    CropPhase(1500, 12, CLIP_FRAMES, 32),
    CropPhase(600, 6, LONG_CLIP_FRAMES, 32),
    CropPhase(600, 8, CLIP_FRAMES, FRAME_SIZE),
    CropPhase(600, 4, LONG_CLIP_FRAMES, FRAME_SIZE),
)
CONTINUED_PHASES = PHASES[2:]  # for weights that already know stills and short clips


def find_phase(phases: tuple[CropPhase, ...], step: int) -> CropPhase:
    for phase in phases:
        if step < phase.steps:
            return phase
        step -= phase.steps
    return phases[-1]


def sample_crop(rng: random.Random, scene: Scene, phase: CropPhase) -> tuple[slice, slice, slice]:
    """Return the frames, rows and columns of a crop near an object."""
    first_frame = rng.randint(0, scene.frame_count - phase.frame_count)
    frames = slice(first_frame, first_frame + phase.frame_count)
    obj = rng.choice(scene.objects)
    centre = obj.centre_at(rng.randrange(first_frame, first_frame + phase.frame_count))

    def sample_start(centre: int) -> int:
        jitter = rng.randint(-1, 1) * CROP_STRIDE
        return min(
            max((centre - phase.crop_size // 2 + jitter) // CROP_STRIDE * CROP_STRIDE, 0), FRAME_SIZE - phase.crop_size
        )

    x, y = sample_start(centre[0]), sample_start(centre[1])
    return frames, slice(y, y + phase.crop_size), slice(x, x + phase.crop_size)


def sample_batch(
    step: int, phase: CropPhase, name: str = "vae", make_scene: Callable[[random.Random], Scene] | None = None
) -> tuple[Tensor, Tensor]:
    """Return pixels [B, 3, F, S, S] in -1..1 and the object mask [B, 1, F, S, S] of this process's rows."""
    rng = random.Random(step_seed(f"{name}/data", step))
    crops = []
    for _ in range(phase.batch_size):
        frame_count = max(phase.frame_count, CLIP_FRAMES)
        scene = make_scene(rng) if make_scene else sample_scene(rng, phase.frame_count > 1, frame_count=frame_count)
        crops.append((scene, sample_crop(rng, scene, phase)))
    local_crops = current_rank().take_local_rows(crops)
    pixels = torch.from_numpy(np.stack([render_scene(scene)[crop] for scene, crop in local_crops])).permute(
        0, 4, 1, 2, 3
    )
    mask = torch.from_numpy(np.stack([render_object_mask(scene)[crop] for scene, crop in local_crops]))[:, None]
    return pixels.float() / 127.5 - 1, mask.float()


def compute_image_gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def compute_vae_losses(vae: AutoencoderKLWan, pixels: Tensor, mask: Tensor) -> Losses:
    """Return the error of the reconstruction, and the KL term."""
    mean, logvar = vae._encode(pixels).chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    noise = current_rank().take_local_rows(
        torch.randn(len(mean) * current_rank().world_size, *mean.shape[1:], device=mean.device)
    )
    z = mean + noise * (0.5 * logvar).exp()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    losses = compute_reconstruction_losses(decode_unclamped(vae, z), pixels, mask)
    return losses | {"loss": losses["loss"] + 3e-4 * kl, "kl": kl}


def compute_reconstruction_losses(reconstructed: Tensor, pixels: Tensor, mask: Tensor) -> Losses:
    """Return squared and absolute error, with objects weighted fourfold, plus the error of the image gradients."""
    error, weight = reconstructed - pixels, 1 + 3 * mask
    squared, absolute = (weight * error.square()).mean(), (weight * error.abs()).mean()
    edges = sum(
        (
            (a - b).abs().mean()
            for a, b in zip(compute_image_gradients(reconstructed), compute_image_gradients(pixels), strict=True)
        ),
        start=pixels.new_zeros(()),
    )
    psnr = -10 * torch.log10(F.mse_loss(reconstructed.clamp(-1, 1), pixels) / 4)
    return {"loss": 4 * squared + 0.3 * absolute + 0.3 * edges, "psnr": psnr}


def build_vae_recipe(phases: tuple[CropPhase, ...] = PHASES) -> Recipe:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**TINY.vae)

    def compute_loss(step: int) -> Losses:
        pixels, mask = sample_batch(step, find_phase(phases, step))
        return compute_vae_losses(vae, pixels.to(vae.device), mask.to(vae.device))

    return Recipe(
        "vae",
        vae,
        ("",),
        single_micro_batch(compute_loss),
        steps=sum(phase.steps for phase in phases),
        lr=3e-3,
        adam_lr=2e-3,
        batch_size=lambda step: find_phase(phases, step).batch_size,
    )


# ---------------------------------------------------------------- the decoder alone

MAX_LATENT_OFFSET = 0.3  # standard deviations; the latents of a correct edit are off by 0.1 to 0.3


def compute_difficulty(scene: Scene) -> int:
    """Return a weight for what the decoder renders worst: small objects, stars, pink and grey backgrounds."""
    small_objects = [obj for obj in scene.objects if obj.size == "small"]
    stars = sum(obj.shape == "star" for obj in small_objects)
    fast_objects = sum(obj.speed == "fast" for obj in scene.objects)
    return 1 + len(small_objects) + 2 * stars + 2 * (scene.background in ("pink", "grey")) + 2 * fast_objects


def sample_hard_scene(rng: random.Random, frame_count: int = CLIP_FRAMES) -> Scene:
    candidates = [sample_scene(rng, is_video=True, frame_count=frame_count) for _ in range(4)]
    return rng.choices(candidates, [compute_difficulty(scene) for scene in candidates])[0]


def build_vae_decoder_recipe(vae: AutoencoderKLWan, steps: int = 4000, batch_size: int = 6) -> Recipe:
    """Build the recipe of the decoder alone: full clips, from latents with errors of up to `MAX_LATENT_OFFSET`.

    Every third batch has half as many clips of 17 frames.
    """
    phases = [
        CropPhase(steps, size, frame_count, FRAME_SIZE)
        for size, frame_count in ((batch_size, CLIP_FRAMES), (max(1, batch_size // 2), LONG_CLIP_FRAMES))
    ]

    def get_phase(step: int) -> CropPhase:
        return phases[step % 3 == 2]

    def compute_loss(step: int) -> Losses:
        phase = get_phase(step)
        make_scene = partial(sample_hard_scene, frame_count=phase.frame_count)
        pixels, mask = (tensor.to(vae.device) for tensor in sample_batch(step, phase, "vae_decoder", make_scene))
        with torch.no_grad():
            z = encode_pixels(vae, pixels)
            mean, std = get_latent_statistics(vae, z)
        directions = current_rank().take_local_rows(torch.randn(phase.batch_size, *z.shape[1:], device=z.device))
        magnitudes = current_rank().take_local_rows(
            MAX_LATENT_OFFSET * torch.rand(phase.batch_size, 1, 1, 1, 1, device=z.device)
        )
        return compute_reconstruction_losses(
            decode_unclamped(vae, (z + magnitudes * directions) * std + mean), pixels, mask
        )

    return Recipe(
        "vae_decoder",
        vae,
        ("decoder", "post_quant_conv"),
        single_micro_batch(compute_loss),
        steps,
        lr=2e-3,
        adam_lr=1e-3,
        ema_decay=0.998,
        batch_size=lambda step: get_phase(step).batch_size,
    )

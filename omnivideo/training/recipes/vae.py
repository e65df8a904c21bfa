"""Foundation: the video autoencoder, which stands for Wan's downloaded one.

Trained on crops around objects first (a quarter of the cost of a whole frame, and most of their pixels teach
something), then on whole clips.  Its decoder goes on alone (`vae_decoder`): latents mean the same as before, so that
whatever was trained on them stays, but are drawn more sharply, also where they are a little off.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from omnivideo.models.vae import decode_unclamped, encode, statistics
from omnivideo.presets import TINY
from omnivideo.training.share import share
from omnivideo.training.trainer import Losses, Recipe, at_once, step_seed
from omnivideo.training.world import FRAME, FRAMES, Scene, object_mask, random_scene, render

LATTICE = 8  # px: crops keep an object's place within its latent cell


@dataclass(frozen=True)
class Phase:
    """`steps` batches of `batch` crops of `side` px and `frames` frames."""

    steps: int
    batch: int
    frames: int
    side: int


PHASES = (Phase(500, 64, 1, 32), Phase(500, 16, 5, 32), Phase(1800, 12, 9, 32), Phase(500, 8, 9, FRAME))


def phase_at(phases: tuple[Phase, ...], step: int) -> Phase:
    for phase in phases:
        if step < phase.steps:
            return phase
        step -= phase.steps
    return phases[-1]


def window(rng: random.Random, scene: Scene, phase: Phase) -> tuple[slice, slice, slice]:
    """Frames, rows and columns of a crop near one object."""
    first = rng.randint(0, scene.frames - phase.frames)
    frames = slice(first, first + phase.frames)
    thing = rng.choice(scene.things)
    centre = thing.centre(rng.randrange(first, first + phase.frames))

    def start(at: int) -> int:
        jitter = rng.randint(-1, 1) * LATTICE
        return min(max((at - phase.side // 2 + jitter) // LATTICE * LATTICE, 0), FRAME - phase.side)

    x, y = start(centre[0]), start(centre[1])
    return frames, slice(y, y + phase.side), slice(x, x + phase.side)


def batch(
    step: int, phase: Phase, name: str = "vae", make: Callable[[random.Random], Scene] | None = None
) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, F, S, S] in -1..1 and the object mask [B, 1, F, S, S], of this process's share."""
    rng = random.Random(step_seed(f"{name}/data", step))
    crops = []
    for _ in range(phase.batch):
        scene = make(rng) if make else random_scene(rng, video=phase.frames > 1)
        crops.append((scene, window(rng, scene, phase)))
    mine = share().take(crops)
    pixels = torch.from_numpy(np.stack([render(scene)[at] for scene, at in mine])).permute(0, 4, 1, 2, 3)
    touched = torch.from_numpy(np.stack([object_mask(scene)[at] for scene, at in mine]))[:, None]
    return pixels.float() / 127.5 - 1, touched.float()


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def losses(vae: AutoencoderKLWan, pixels: Tensor, touched: Tensor) -> Losses:
    """Error of the reconstruction, and the KL term."""
    mean, logvar = vae._encode(pixels).chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    noise = share().take(torch.randn(len(mean) * share().world, *mean.shape[1:], device=mean.device))
    z = mean + noise * (0.5 * logvar).exp()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    told = reconstruction(decode_unclamped(vae, z), pixels, touched)
    return told | {"loss": told["loss"] + 3e-4 * kl, "kl": kl}


def reconstruction(drawn: Tensor, pixels: Tensor, touched: Tensor) -> Losses:
    """Squared and absolute error (objects count fourfold), and error of the image gradients."""
    error, weight = drawn - pixels, 1 + 3 * touched
    squared, absolute = (weight * error.square()).mean(), (weight * error.abs()).mean()
    edges = sum(
        ((a - b).abs().mean() for a, b in zip(gradients(drawn), gradients(pixels), strict=True)),
        start=pixels.new_zeros(()),
    )
    psnr = -10 * torch.log10(F.mse_loss(drawn.clamp(-1, 1), pixels) / 4)
    return {"loss": 4 * squared + 0.3 * absolute + 0.3 * edges, "psnr": psnr}


def vae_recipe(phases: tuple[Phase, ...] = PHASES) -> Recipe:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**TINY.vae)

    def loss(step: int) -> Losses:
        pixels, touched = batch(step, phase_at(phases, step))
        return losses(vae, pixels.to(vae.device), touched.to(vae.device))

    return Recipe(
        "vae", vae, ("",), at_once(loss), steps=sum(phase.steps for phase in phases), lr=3e-3, adam_lr=2e-3,
        samples=lambda step: phase_at(phases, step).batch,
    )  # fmt: skip


# ---------------------------------------------------------------- the decoder alone

OFF = 0.3  # deviations that a latent is off at most: where an edit is right, it is by 0.1 to 0.3


def hardness(scene: Scene) -> int:
    """What the decoder draws worst: small things, stars above all, on pink and grey."""
    small = [thing for thing in scene.things if thing.size == "small"]
    stars = sum(thing.shape == "star" for thing in small)
    return 1 + len(small) + 2 * stars + 2 * (scene.background in ("pink", "grey"))


def hard_scene(rng: random.Random) -> Scene:
    some = [random_scene(rng, video=True) for _ in range(4)]
    return rng.choices(some, [hardness(scene) for scene in some])[0]


def vae_decoder_recipe(vae: AutoencoderKLWan, steps: int = 4000, count: int = 6) -> Recipe:
    """`count` whole clips a step, from latents that are off by up to OFF."""
    clip = Phase(steps, count, FRAMES, FRAME)

    def loss(step: int) -> Losses:
        pixels, touched = (part.to(vae.device) for part in batch(step, clip, "vae_decoder", hard_scene))
        with torch.no_grad():
            z = encode(vae, pixels)
            mean, std = statistics(vae, z)
        ways = share().take(torch.randn(count, *z.shape[1:], device=z.device))
        off = share().take(OFF * torch.rand(count, 1, 1, 1, 1, device=z.device))
        return reconstruction(decode_unclamped(vae, (z + off * ways) * std + mean), pixels, touched)

    return Recipe(
        "vae_decoder", vae, ("decoder", "post_quant_conv"), at_once(loss), steps, lr=2e-3, adam_lr=1e-3, ema=0.998,
        samples=lambda step: count,
    )  # fmt: skip

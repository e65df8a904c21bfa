"""One clip from one request: condition, noise, denoising, decoding (paper section 3)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from omnivideo.contracts import Settings, Step
from omnivideo.models.mllm import Media, Message
from omnivideo.models.omni import Omni, Target
from omnivideo.models.sampling import denoise, noise
from omnivideo.models.vae import decode, encode, from_bytes, to_bytes
from omnivideo.presets import latent_grid


@dataclass
class Clip:
    """The result: uint8 [F, H, W, 3], its clean latents [z, T, h, w], and the seconds that each part took."""

    frames: np.ndarray
    latents: Tensor
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[part] = round(seconds.get(part, 0.0) + time.perf_counter() - began, 3)


@torch.no_grad()
def draw(omni: Omni, prompt: str, settings: Settings, source: np.ndarray | None = None) -> Iterator[Step | Clip]:
    """Yields a `Step` after each denoising step and the `Clip` at the end.

    `source` [F, H, W, 3] of the settings' size turns generation mode into editing mode.  Raises ConditionTooLong
    before any denoising.  Two runs with the same arguments on the same machine give identical bytes.
    """
    seconds: dict[str, float] = {}
    video = settings.frames > 1
    with timed(seconds, "source"):
        latents = (
            None if source is None else encode(omni.vae, from_bytes(source[None]).to(omni.vae.device, omni.vae.dtype))
        )
    with timed(seconds, "condition"):
        condition, null = conditions(omni, prompt, settings, source, latents)
    grid = latent_grid(settings.width, settings.height, settings.frames)
    x = noise([settings.seed], (omni.vae.config.z_dim, *grid), omni.device)
    began = time.perf_counter()
    loop = denoise(omni.decoder, x, condition, null, settings.steps, settings.guidance_scale, settings.flow_shift)
    for state in loop:
        spent = time.perf_counter() - began
        x = state.latents
        yield Step(step=state.step, steps=state.steps, left=spent / state.step * (state.steps - state.step))
    seconds["denoising"] = round(time.perf_counter() - began, 3)
    with timed(seconds, "decoding"):
        frames = to_bytes(decode(omni.vae, x))[0]
    assert len(frames) == settings.frames or not video
    yield Clip(frames, x[0], seconds)


def conditions(
    omni: Omni, prompt: str, settings: Settings, source: np.ndarray | None, latents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The condition and the null condition [1, L, D] of a request."""
    video = settings.frames > 1
    media = () if source is None else (Media(source, settings.fps, video),)
    target: Target = "video" if video else "image"
    visual = omni.visual_tokens([(Message(prompt, media), target)])
    condition = omni.condition([prompt], list(omni.adapted(visual, [target])), latents)
    return condition, omni.null_condition(settings.negative_prompt, 1, latents)

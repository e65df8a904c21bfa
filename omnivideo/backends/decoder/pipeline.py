"""One clip from one request: condition, noise, denoising, decoding (paper section 3)."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from omnivideo.contracts import Settings, Step
from omnivideo.models.mllm import Media, Message
from omnivideo.models.omni import Omni, Target
from omnivideo.models.sampling import Point, denoise, noise
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


@dataclass(frozen=True)
class Drawing:
    """After a denoising step: how far it is, how the clean clip looks from here (latents [1, z, T, h, w]), and the
    point from which another process could go on."""

    step: Step
    guess: Tensor
    point: Point


@torch.no_grad()
def draw(
    omni: Omni,
    prompt: str,
    settings: Settings,
    source: np.ndarray | Tensor | None = None,
    visual_1QE: Tensor | None = None,
    begin: Point | None = None,
) -> Iterator[Drawing | Clip]:
    """Yields a `Drawing` after each denoising step and the `Clip` at the end; goes on from `begin` if given.

    `source` turns generation mode into editing mode: pixels [F, H, W, 3] of the settings' size, or the latents
    [z, T, h, w] of a clip that was drawn here, which spares it the way through pixels.  `visual_1QE` are the vision
    head's tokens, read from this prompt and the source's pixels where they are not given.  Raises ConditionTooLong
    before any denoising.  Two runs with the same arguments on the same machine give identical bytes.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "source"):
        latents = None if source is None else source_latents(omni, source)
    with timed(seconds, "condition"):
        if visual_1QE is None:
            assert not isinstance(source, Tensor), "latents cannot be shown to the MLLM"
            visual_1QE = read_visual_tokens(omni, prompt, settings, source)
        condition = omni.condition([prompt], list(omni.adapted(visual_1QE, [target_of(settings)])), latents)
        null = omni.null_condition(settings.negative_prompt, 1, latents)
    for drawing in denoised(omni, [settings.seed], condition, null, settings, begin, seconds):
        yield drawing
        x = drawing.point.latents
    yield clip_of(omni, x, settings, seconds)


@torch.no_grad()
def draw_together(
    omni: Omni, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, visual_BQE: Tensor,
    begin: Point | None = None,
) -> Iterator[Drawing | list[Clip]]:  # fmt: skip
    """As `draw`, several clips in one pass, which differ in prompt and seed alone.

    Each comes out as it would alone but for rounding; the same ones together, in the same order, give identical bytes.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "condition"):
        kinds = [target_of(settings)] * len(prompts)
        condition = omni.condition(prompts, list(omni.adapted(visual_BQE, kinds)))
        null = omni.null_condition(settings.negative_prompt, len(prompts))
    for drawing in denoised(omni, seeds, condition, null, settings, begin, seconds):
        yield drawing
        x = drawing.point.latents
    shared = {part: round(value / len(prompts), 3) for part, value in seconds.items()}
    yield [clip_of(omni, row[None], settings, dict(shared)) for row in x]


def denoised(
    omni: Omni, seeds: Sequence[int], condition_BLD: Tensor, null_BLD: Tensor, settings: Settings,
    begin: Point | None, seconds: dict[str, float],
) -> Iterator[Drawing]:  # fmt: skip
    """Every denoising step; the last one's point has the result."""
    grid = latent_grid(settings.width, settings.height, settings.frames)
    x = begin.latents if begin else noise(list(seeds), (omni.vae.config.z_dim, *grid), omni.device)
    began, first = time.perf_counter(), begin.step if begin else 0
    given = settings.steps, settings.guidance_scale, settings.flow_shift
    for state in denoise(omni.decoder, x, condition_BLD, null_BLD, *given, begin):
        done = state.point.step
        each = (time.perf_counter() - began) / (done - first)
        yield Drawing(Step(step=done, steps=state.steps, left=each * (state.steps - done)), state.guess, state.point)
    seconds["denoising"] = round(time.perf_counter() - began, 3)


def clip_of(omni: Omni, latents_1zThw: Tensor, settings: Settings, seconds: dict[str, float]) -> Clip:
    with timed(seconds, "decoding"):
        frames = to_bytes(decode(omni.vae, latents_1zThw))[0]
    assert len(frames) == settings.frames or settings.frames == 1
    return Clip(frames, latents_1zThw[0], seconds)


def source_latents(omni: Omni, source: np.ndarray | Tensor) -> Tensor:
    """[1, z, T, h, w] of a source."""
    if isinstance(source, Tensor):
        return source[None].to(omni.vae.device, omni.vae.dtype)
    return encode(omni.vae, from_bytes(source[None]).to(omni.vae.device, omni.vae.dtype))


def target_of(settings: Settings) -> Target:
    return "video" if settings.frames > 1 else "image"


def read_visual_tokens(omni: Omni, prompt: str, settings: Settings, source: np.ndarray | None) -> Tensor:
    """V_o [1, Q, E] for a prompt and, in editing mode, its source."""
    media = () if source is None else (Media(source, settings.fps, settings.frames > 1),)
    return omni.visual_tokens([(Message(prompt, media), target_of(settings))])

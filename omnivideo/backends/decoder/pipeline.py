"""One clip from one request: condition, noise, denoising, decoding (paper section 3)."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from omnivideo.contracts import SamplingParams, StepProgress
from omnivideo.models.mllm import MLLMMedia, MLLMMessage
from omnivideo.models.omni import OmniVideoModel, TargetMedium
from omnivideo.models.sampling import DenoisingState, denoise, sample_initial_noise
from omnivideo.models.vae import decode_latents, encode_pixels, pixels_from_bytes, pixels_to_bytes
from omnivideo.ports import Decoder
from omnivideo.presets import compute_latent_grid


@dataclass
class GeneratedClip:
    """The result: uint8 [F, H, W, 3], its clean latents [z, T, h, w], and the seconds that each part took."""

    frames: np.ndarray
    latents: Tensor
    seconds_by_stage: dict[str, float] = field(default_factory=dict)


@contextmanager
def time_stage(seconds_by_stage: dict[str, float], stage: str) -> Iterator[None]:
    started_at = time.perf_counter()
    yield
    seconds_by_stage[stage] = round(seconds_by_stage.get(stage, 0.0) + time.perf_counter() - started_at, 3)


@dataclass(frozen=True)
class DenoisingProgress:
    """After a denoising step: how far it is, how the clean clip looks from here (latents [1, z, T, h, w]), and the
    point from which another process could go on."""

    step: StepProgress
    clean_latents: Tensor
    state: DenoisingState


ClipDecoder = Decoder[Tensor, DenoisingState, GeneratedClip]


@torch.no_grad()
def generate_clip(
    omni: OmniVideoModel,
    prompt: str,
    params: SamplingParams,
    source: np.ndarray | Tensor | None = None,
    visual_1QE: Tensor | None = None,
    initial_state: DenoisingState | None = None,
) -> Iterator[DenoisingProgress | GeneratedClip]:
    """Yields a `DenoisingProgress` after each denoising step and the `GeneratedClip` at the end; goes on
    from `initial_state` if given.

    `source` turns generation mode into editing mode: pixels [F, H, W, 3] of the settings' size, or the latents
    [z, T, h, w] of a clip that was drawn here, which spares it the way through pixels.  `visual_1QE` are the vision
    head's tokens, read from this prompt and the source's pixels where they are not given.  Raises ConditionTooLong
    before any denoising.  Two runs with the same arguments on the same machine give identical bytes.
    """
    seconds_by_stage: dict[str, float] = {}
    with time_stage(seconds_by_stage, "source"):
        latents = None if source is None else encode_source(omni, source)
    with time_stage(seconds_by_stage, "condition"):
        if visual_1QE is None:
            assert not isinstance(source, Tensor), "latents cannot be shown to the MLLM"
            visual_1QE = read_visual_tokens(omni, prompt, params, source)
        condition = omni.build_condition(
            [prompt], list(omni.adapt_visual_tokens(visual_1QE, [medium_from_params(params)])), latents
        )
        null = omni.build_null_condition(params.negative_prompt, 1, latents)
    for progress in run_denoising(omni, [params.seed], condition, null, params, initial_state, seconds_by_stage):
        yield progress
        x = progress.state.latents
    yield decode_clip(omni, x, params, seconds_by_stage)


@torch.no_grad()
def generate_clip_batch(
    omni: OmniVideoModel, prompts: Sequence[str], seeds: Sequence[int], params: SamplingParams, visual_BQE: Tensor,
    initial_state: DenoisingState | None = None,
) -> Iterator[DenoisingProgress | list[GeneratedClip]]:  # fmt: skip
    """As `generate_clip`, several clips in one pass, which differ in prompt and seed alone.

    Each comes out as it would alone but for rounding; the same ones together, in the same order, give identical bytes.
    """
    seconds_by_stage: dict[str, float] = {}
    with time_stage(seconds_by_stage, "condition"):
        media_kinds = [medium_from_params(params)] * len(prompts)
        condition = omni.build_condition(prompts, list(omni.adapt_visual_tokens(visual_BQE, media_kinds)))
        null = omni.build_null_condition(params.negative_prompt, len(prompts))
    for progress in run_denoising(omni, seeds, condition, null, params, initial_state, seconds_by_stage):
        yield progress
        x = progress.state.latents
    shared_seconds = {stage: round(value / len(prompts), 3) for stage, value in seconds_by_stage.items()}
    yield [decode_clip(omni, row[None], params, dict(shared_seconds)) for row in x]


def run_denoising(
    omni: OmniVideoModel, seeds: Sequence[int], condition_BLD: Tensor, null_BLD: Tensor, params: SamplingParams,
    initial_state: DenoisingState | None, seconds_by_stage: dict[str, float],
) -> Iterator[DenoisingProgress]:  # fmt: skip
    """Every denoising step; the last one's point has the result."""
    grid = compute_latent_grid(params.width, params.height, params.frames)
    x = (
        initial_state.latents
        if initial_state
        else sample_initial_noise(list(seeds), (omni.vae.config.z_dim, *grid), omni.device)
    )
    started_at, first_step = time.perf_counter(), initial_state.step if initial_state else 0
    sampler_args = params.steps, params.guidance_scale, params.flow_shift
    for denoising_step in denoise(omni.decoder, x, condition_BLD, null_BLD, *sampler_args, initial_state):
        steps_done = denoising_step.state.step
        seconds_per_step = (time.perf_counter() - started_at) / (steps_done - first_step)
        yield DenoisingProgress(
            StepProgress(
                step=steps_done,
                steps=denoising_step.steps,
                eta_seconds=seconds_per_step * (denoising_step.steps - steps_done),
            ),
            denoising_step.clean_latents,
            denoising_step.state,
        )
    seconds_by_stage["denoising"] = round(time.perf_counter() - started_at, 3)


def decode_clip(
    omni: OmniVideoModel, latents_1zThw: Tensor, params: SamplingParams, seconds_by_stage: dict[str, float]
) -> GeneratedClip:
    with time_stage(seconds_by_stage, "decoding"):
        frames = pixels_to_bytes(decode_latents(omni.vae, latents_1zThw))[0]
    assert len(frames) == params.frames or params.frames == 1
    return GeneratedClip(frames, latents_1zThw[0], seconds_by_stage)


def encode_source(omni: OmniVideoModel, source: np.ndarray | Tensor) -> Tensor:
    """[1, z, T, h, w] of a source."""
    if isinstance(source, Tensor):
        return source[None].to(omni.vae.device, omni.vae.dtype)
    return encode_pixels(omni.vae, pixels_from_bytes(source[None]).to(omni.vae.device, omni.vae.dtype))


def medium_from_params(params: SamplingParams) -> TargetMedium:
    return "video" if params.frames > 1 else "image"


def read_visual_tokens(omni: OmniVideoModel, prompt: str, params: SamplingParams, source: np.ndarray | None) -> Tensor:
    """V_o [1, Q, E] for a prompt and, in editing mode, its source."""
    media = () if source is None else (MLLMMedia(source, params.fps, params.frames > 1),)
    return omni.compute_visual_tokens([(MLLMMessage(prompt, media), medium_from_params(params))])

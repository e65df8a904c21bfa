"""One clip from one request (paper section 3): build the condition, denoise, decode.

Shapes: B clips in one pass, F frames, Q visual tokens of width E, L condition tokens of width D, z T h w latents.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from omnivideo.contracts import MAX_SEED, Medium, SamplingParams, StepProgress, compute_latent_grid
from omnivideo.media.resample import deliver_frames
from omnivideo.models.mllm import MLLMMedia, MLLMMessage
from omnivideo.models.omni import MLLMFeatures, OmniVideoModel, name_part
from omnivideo.models.sampling import DenoisingState, Expert, denoise, sample_initial_noise
from omnivideo.models.vae import decode_latents, encode_pixels, pixels_from_bytes, pixels_to_bytes
from omnivideo.ports import Decoder


@dataclass
class GeneratedClip:
    """A finished clip: uint8 [F, H, W, 3], its clean latents [z, T, h, w], and the seconds that each stage took.

    The frames are those that are delivered, the latents those of everything that was generated.
    """

    frames: np.ndarray
    latents: Tensor
    seconds_by_stage: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DenoisingProgress:
    """The result of one denoising step.

    `clean_latents` [B, z, T, h, w] are the clip as predicted so far. Another process can continue from `state`.
    """

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
    features: MLLMFeatures | None = None,
    initial_state: DenoisingState | None = None,
    last_frame: np.ndarray | Tensor | None = None,
) -> Iterator[DenoisingProgress | GeneratedClip]:
    """Yield the progress after each denoising step, then the clip. Continue after `initial_state` if it is given.

    With a `source` the clip is an edit of it, or a continuation, whose given frames it is. The source is pixels
    [F, H, W, 3] of the requested size, or the latents [z, T, h, w] of a clip that was generated here, which avoids a
    pass through the VAE; so is `last_frame`, which a clip ends with. `features` are what the MLLM made of the prompt
    and the source; by default it is asked here, with the source's pixels.

    The frames of an extension are the given ones and all that follow; each pass continues the frames of the one before.
    The same arguments give identical bytes on the same machine. Raises ConditionTooLong before the first step.
    """
    seconds_by_stage: dict[str, float] = {}
    with time_stage(seconds_by_stage, "source"), name_part("VAE"):
        source_1zThw = None if source is None else encode_source(omni, source)
        last_1zThw = None if last_frame is None else encode_source(omni, last_frame)
    with time_stage(seconds_by_stage, "condition"):
        if features is None:
            assert not isinstance(source, Tensor), "the MLLM cannot see latents"
            features = compute_features(omni, prompt, params, source)
    finished = () if initial_state is None else initial_state.finished
    frames = [decode_clip(omni, x_1zThw, params, seconds_by_stage) for x_1zThw in finished]
    for index in range(len(finished), params.passes):
        if index:  # the last frames of the pass before it are given
            source_1zThw = encode_source(omni, frames[-1][-params.given_frames :])
        with time_stage(seconds_by_stage, "condition"), name_part("adapter"):
            context_1zThw = join_sources(source_1zThw, last_1zThw)
            target = medium_from_params(params)
            experts = omni.build_experts([prompt], [features], params.negative_prompt, target, context_1zThw)
        given = source_1zThw if params.given_frames else None
        seeds = [(params.seed + index) % (MAX_SEED + 1)]
        settings = (seeds, params, initial_state, seconds_by_stage, given, finished)
        x_1zThw = yield from denoise_clips(omni, experts, *settings)
        finished, initial_state = (*finished, x_1zThw), None
        frames.append(decode_clip(omni, x_1zThw, params, seconds_by_stage))
    joined = np.concatenate([frames[0], *(later[params.given_frames :] for later in frames[1:])])
    yield deliver_clip(joined, finished[-1], params, seconds_by_stage)


def join_sources(source_1zThw: Tensor | None, last_1zThw: Tensor | None) -> Tensor | None:
    """Return the latents of which the condition's visual context is made: a first and a last frame stand together."""
    if source_1zThw is None or last_1zThw is None:
        return source_1zThw
    return torch.cat([source_1zThw, last_1zThw], dim=2)


@torch.no_grad()
def generate_clip_batch(
    omni: OmniVideoModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    params: SamplingParams,
    features: Sequence[MLLMFeatures],
    initial_state: DenoisingState | None = None,
) -> Iterator[DenoisingProgress | list[GeneratedClip]]:
    """Generate several clips in one pass, as `generate_clip` does for one. They differ only in prompt and seed.

    Each clip equals the clip that is generated alone, up to rounding. The same clips in the same order give
    identical bytes.
    """
    seconds_by_stage: dict[str, float] = {}
    with time_stage(seconds_by_stage, "condition"), name_part("adapter"):
        experts = omni.build_experts(prompts, features, params.negative_prompt, medium_from_params(params))
    x_BzThw = yield from denoise_clips(omni, experts, seeds, params, initial_state, seconds_by_stage)
    shared_seconds = {stage: round(seconds / len(prompts), 3) for stage, seconds in seconds_by_stage.items()}
    clips = []
    for x_zThw in x_BzThw:
        seconds = dict(shared_seconds)
        clips.append(deliver_clip(decode_clip(omni, x_zThw[None], params, seconds), x_zThw[None], params, seconds))
    yield clips


def denoise_clips(
    omni: OmniVideoModel,
    experts: Sequence[Expert],
    seeds: Sequence[int],
    params: SamplingParams,
    initial_state: DenoisingState | None,
    seconds_by_stage: dict[str, float],
    given_BzThw: Tensor | None = None,
    finished: tuple[Tensor, ...] = (),
) -> Generator[DenoisingProgress, None, Tensor]:
    """Yield the progress of each denoising step, and return the clean latents [B, z, T, h, w].

    `given_BzThw` are the latents of the first frames, `finished` those of the passes before this one.
    """
    if initial_state:
        x_BzThw, first_step = initial_state.latents, initial_state.step
    else:
        grid_Thw = compute_latent_grid(params.width, params.height, params.frames)
        x_BzThw = sample_initial_noise(list(seeds), (omni.vae.config.z_dim, *grid_Thw), omni.device)
        x_BzThw, first_step = x_BzThw.to(omni.latents_dtype), 0
    started_at = time.perf_counter()
    settings = (params.steps, params.guidance_scale, params.flow_shift)
    steps = denoise(experts, x_BzThw, *settings, initial_state, given_BzThw)
    total_steps = params.passes * params.steps
    while True:
        with name_part("decoder"):
            denoising_step = next(steps, None)
        if denoising_step is None:
            break
        completed_steps = denoising_step.state.step
        seconds_per_step = (time.perf_counter() - started_at) / (completed_steps - first_step)
        all_completed_steps = len(finished) * params.steps + completed_steps
        eta_seconds = seconds_per_step * (total_steps - all_completed_steps)
        progress = StepProgress(step=all_completed_steps, steps=total_steps, eta_seconds=eta_seconds)
        x_BzThw, state = denoising_step.state.latents, replace(denoising_step.state, finished=finished)
        yield DenoisingProgress(progress, denoising_step.clean_latents, state)
    seconds = seconds_by_stage.get("denoising", 0.0) + time.perf_counter() - started_at
    seconds_by_stage["denoising"] = round(seconds, 3)
    return x_BzThw  # those of `initial_state`, if it was saved after the last step


def encode_source(omni: OmniVideoModel, source: np.ndarray | Tensor) -> Tensor:
    """Return the latents [1, z, T, h, w] of a source's pixels [F, H, W, 3] or latents [z, T, h, w]."""
    if isinstance(source, Tensor):
        return source[None].to(omni.device, omni.vae.dtype)
    return encode_pixels(omni.vae, pixels_from_bytes(source[None]).to(omni.device, omni.vae.dtype)).to(omni.device)


def compute_features(
    omni: OmniVideoModel, prompt: str, params: SamplingParams, source: np.ndarray | None
) -> MLLMFeatures:
    """Return the MLLM's features of a prompt and, for an edit, the source's pixels [F, H, W, 3]."""
    media = () if source is None else (MLLMMedia(source, params.fps, len(source) > 1),)
    return omni.compute_mllm_features(MLLMMessage(prompt, media), medium_from_params(params))


def decode_clip(
    omni: OmniVideoModel, x_1zThw: Tensor, params: SamplingParams, seconds_by_stage: dict[str, float]
) -> np.ndarray:
    """Return the frames uint8 [F, H, W, 3] of one pass's clean latents, in the size that was generated."""
    with time_stage(seconds_by_stage, "decoding"), name_part("VAE"):
        pixels_1CFHW = decode_latents(omni.vae, x_1zThw.to(omni.vae.dtype))
        frames: np.ndarray = pixels_to_bytes(pixels_1CFHW, omni.preset.byte_rounding)[0]
    assert len(frames) == params.frames or params.frames == 1
    return frames


def deliver_clip(
    frames: np.ndarray, x_1zThw: Tensor, params: SamplingParams, seconds_by_stage: dict[str, float]
) -> GeneratedClip:
    """Return a clip of the delivered size and length; it takes over `seconds_by_stage`."""
    if params.new_frames is not None:
        frames = frames[: params.given_frames + params.new_frames]
    if params.delivery is not None:
        frames = deliver_frames(frames, params.delivery)
    return GeneratedClip(frames, x_1zThw[0], seconds_by_stage)


def medium_from_params(params: SamplingParams) -> Medium:
    return "video" if params.frames > 1 else "image"


@contextmanager
def time_stage(seconds_by_stage: dict[str, float], stage: str) -> Iterator[None]:
    """Add the duration of the `with` block to a stage's seconds."""
    started_at = time.perf_counter()
    yield
    seconds_by_stage[stage] = round(seconds_by_stage.get(stage, 0.0) + time.perf_counter() - started_at, 3)

"""Sampling: from noise to latents with UniPC along the decoder's velocity field (paper Eq. 4 and section 5.1).

Shapes: B batch, z latent channels, T h w latent grid, L condition tokens, D text width of the decoder.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor

MAX_TOKENS_IN_ONE_PASS = 2048  # of all samples, for guidance in one pass


@dataclass(frozen=True)
class DenoisingState:
    """What the loop needs to continue after `step` steps with identical bits; every tensor is [B, z, T, h, w].

    `latents` is the noisy sample, and `previous_sample` is the sample that the last step started from.
    `model_outputs` are the clean samples that the scheduler derived from the last velocities: at most two, oldest
    first. UniPC uses no random numbers, so no generator state is needed. `finished` are the clean latents of the loops
    before this one, where a clip takes several.
    """

    step: int
    latents: Tensor
    previous_sample: Tensor
    model_outputs: tuple[Tensor, ...]
    finished: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class DenoisingStep:
    """The result of one of `steps` steps: the state after it, and the clean sample [B, z, T, h, w] predicted by it."""

    steps: int
    state: DenoisingState
    clean_latents: Tensor


@dataclass(frozen=True)
class Expert:
    """A decoder with the condition and the null condition [B, L, D] that it is given.

    It denoises at timesteps of at least `min_timestep`, up to those of the expert before it. `autocast` is the type
    that it computes in, if that is not the type of its weights.
    """

    decoder: WanTransformer3DModel
    condition_BLD: Tensor
    null_BLD: Tensor
    min_timestep: int = 0
    autocast: torch.dtype | None = None


@torch.no_grad()
def denoise(
    experts: Sequence[Expert],
    noise_BzThw: Tensor,
    steps: int,
    guidance_scale: float,
    flow_shift: float,
    initial_state: DenoisingState | None = None,
    given_BzThw: Tensor | None = None,
) -> Iterator[DenoisingStep]:
    """Yield the result of every step; the latents of the last state are the result.

    `experts` are one decoder, or several in order of falling timesteps. With `initial_state` the loop continues after
    that state and ignores `noise_BzThw`, except for its device. `given_BzThw` are the latents of the first frames,
    which stay as they are: the clip continues them.
    """
    scheduler = create_scheduler(steps, flow_shift, noise_BzThw.device)
    x_BzThw, first_step = noise_BzThw, 0
    if initial_state:
        restore_scheduler(scheduler, initial_state)
        x_BzThw, first_step = initial_state.latents, initial_state.step
    given_frames = 0 if given_BzThw is None else given_BzThw.shape[2]
    x_BzThw = insert_given_frames(x_BzThw, given_BzThw)

    for step in range(first_step, steps):
        timestep, sigma = scheduler.timesteps[step], scheduler.sigmas[step]
        expert = next(expert for expert in experts if timestep >= expert.min_timestep)
        decoder_timestep = expand_timestep(expert.decoder, x_BzThw, timestep, given_frames)
        velocity_BzThw = predict_velocity(expert, x_BzThw, decoder_timestep, guidance_scale)
        clean_BzThw = insert_given_frames(x_BzThw - sigma * velocity_BzThw, given_BzThw)
        x_BzThw = scheduler.step(velocity_BzThw, timestep, x_BzThw, return_dict=False)[0]
        x_BzThw = insert_given_frames(x_BzThw, given_BzThw)
        yield DenoisingStep(steps, capture_state(scheduler, step + 1, x_BzThw), clean_BzThw)


def predict_velocity(expert: Expert, x_BzThw: Tensor, timestep: Tensor, guidance_scale: float) -> Tensor:
    """Return the guided velocity [B, z, T, h, w]: null + scale * (condition - null).

    `timestep` is that of each sample [B] or of each of the decoder's tokens [B, N]. At scale 1 the null pass is
    skipped. A scale s in the released code of version 1 corresponds to s + 1 here.
    """

    def run_decoder(copies: int, condition_BLD: Tensor) -> Tensor:
        inputs = [torch.cat([tensor] * copies) for tensor in (x_BzThw, timestep)] if copies > 1 else (x_BzThw, timestep)
        with autocast_to(expert.autocast, x_BzThw.device):
            velocity_BzThw: Tensor = expert.decoder(*inputs, condition_BLD, return_dict=False)[0]
        return velocity_BzThw.to(x_BzThw.dtype)

    if guidance_scale == 1:
        return run_decoder(1, expert.condition_BLD)
    conditions = expert.condition_BLD, expert.null_BLD
    if fits_in_one_pass(expert, x_BzThw):
        velocity_BzThw, null_BzThw = run_decoder(2, torch.cat(conditions)).chunk(2)
    else:
        velocity_BzThw, null_BzThw = (run_decoder(1, condition_BLD) for condition_BLD in conditions)
    return null_BzThw + guidance_scale * (velocity_BzThw - null_BzThw)


def fits_in_one_pass(expert: Expert, x_BzThw: Tensor) -> bool:
    """Return whether both conditions are computed in one pass, which calls every layer once.

    For few tokens that takes much less time than two passes; for many it takes as long, and more memory.
    """
    patch_t, patch_h, patch_w = expert.decoder.config.patch_size
    num_tokens = x_BzThw[:, 0].numel() // (patch_t * patch_h * patch_w)
    return num_tokens <= MAX_TOKENS_IN_ONE_PASS and expert.condition_BLD.shape == expert.null_BLD.shape


def autocast_to(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which modules compute in `dtype`; None changes nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def expand_timestep(decoder: WanTransformer3DModel, x_BzThw: Tensor, timestep: Tensor, given_frames: int = 0) -> Tensor:
    """Return the timestep of each sample [B]; if the first latent frames are given, of each token [B, N], theirs is 0.

    `timestep` is one number or has one for each sample. Wan 2.2's TI2V models use the same form.
    """
    timestep_B = timestep.expand(len(x_BzThw))
    if not given_frames:
        return timestep_B
    patch_t, patch_h, patch_w = decoder.config.patch_size
    frames, height, width = x_BzThw.shape[2:]
    tokens_per_frame = (height // patch_h) * (width // patch_w)
    timestep_BN = timestep_B[:, None].repeat(1, frames // patch_t * tokens_per_frame)
    timestep_BN[:, : given_frames // patch_t * tokens_per_frame] = 0
    return timestep_BN


def insert_given_frames(x_BzThw: Tensor, given_BzThw: Tensor | None) -> Tensor:
    """Return the latents with the given ones as their first frames."""
    if given_BzThw is None:
        return x_BzThw
    return torch.cat([given_BzThw.to(x_BzThw), x_BzThw[:, :, given_BzThw.shape[2] :]], dim=2)


def sample_initial_noise(seeds: list[int], shape_zThw: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """Return standard normal latents [B, z, T, h, w], one seed for each row.

    They are sampled on the CPU, so that a seed gives the same noise on every device.
    """
    rows = [torch.randn(shape_zThw, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


# ---------------------------------------------------------------- scheduler


def create_scheduler(steps: int, flow_shift: float, device: torch.device | str = "cpu") -> UniPCMultistepScheduler:
    """Return UniPC of order 2 (bh2), ready for `steps` steps from noise to data.

    The noise levels are Wan's own, evenly spaced from 0.999 to 0 and then shifted, which gives the timesteps of the
    released code (999, 995, 991 ... 92 at 50 steps and shift 5). diffusers' default levels start slightly higher.
    """
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
    scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1], device=device)
    # Otherwise the scheduler looks up its first step by timestep, and under a large shift several steps share one.
    scheduler.set_begin_index(0)
    return scheduler


def capture_state(scheduler: UniPCMultistepScheduler, completed_steps: int, x_BzThw: Tensor) -> DenoisingState:
    """Return the state from which `restore_scheduler` continues after `completed_steps` steps."""
    outputs = tuple(output for output in scheduler.model_outputs if output is not None)
    return DenoisingState(completed_steps, x_BzThw, scheduler.last_sample, outputs)


def restore_scheduler(scheduler: UniPCMultistepScheduler, state: DenoisingState) -> None:
    """Set the scheduler's history to that of `state`; everything that it does not contain follows from its step."""
    order, completed_steps, num_outputs = scheduler.config.solver_order, state.step, len(state.model_outputs)
    missing: list[None] = [None] * (order - num_outputs)
    scheduler.model_outputs = [*missing, *state.model_outputs]
    scheduler.timestep_list = [*missing, *scheduler.timesteps[completed_steps - num_outputs : completed_steps]]
    scheduler.last_sample = state.previous_sample
    scheduler.lower_order_nums = min(completed_steps, order)
    scheduler.this_order = min(
        order, len(scheduler.timesteps) - completed_steps + 1, min(completed_steps - 1, order) + 1
    )
    scheduler._step_index = completed_steps

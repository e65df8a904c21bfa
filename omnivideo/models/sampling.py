"""Noise -> schedule -> denoise -> latents, as in the paper's Eq. 4 and section 5.1.

Shapes: B batch, z latent channels, T h w latent grid, L condition tokens, D the decoder's text width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor


@dataclass(frozen=True)
class DenoisingState:
    """All that the loop needs to go on after `step` steps to the same bits.  (UniPC draws nothing at random.)

    `latents` is the noisy sample; `previous_sample` the one that the last step began with; `model_outputs` what the
    scheduler made
    of the decoder's last answers, at most two, oldest first.  All [B, z, T, h, w].
    """

    step: int
    latents: Tensor
    previous_sample: Tensor
    model_outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class DenoisingStep:
    """After one step of `steps`: where the loop is, and `clean_latents`, how the clean sample looks from there."""

    steps: int
    state: DenoisingState
    clean_latents: Tensor


def create_scheduler(steps: int, flow_shift: float, device: torch.device | str = "cpu") -> UniPCMultistepScheduler:
    """UniPC of order 2 (bh2), ready for `steps` steps from noise to data.

    Wan's own noise levels, from 0.999 evenly to 0 and then shifted, so that the timesteps are the released code's
    (999, 995, 991 ... 92 at 50 steps and shift 5); diffusers' default ends a little higher.
    """
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
    scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1], device=device)
    # Else it would look its first step up by the timestep, which under a large shift several steps share.
    scheduler.set_begin_index(0)
    return scheduler


def sample_initial_noise(seeds: list[int], shape_zThw: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """Standard normal latents, each row of the batch from its own seed; drawn on the CPU, so alike on any device."""
    rows = [torch.randn(shape_zThw, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def restore_scheduler(scheduler: UniPCMultistepScheduler, state: DenoisingState) -> None:
    """The scheduler as it was at a point.  What is not kept there follows from the number of the step."""
    order, completed_steps = scheduler.config.solver_order, state.step
    missing: list[Tensor | None] = [None] * (order - len(state.model_outputs))
    scheduler.model_outputs = [*missing, *state.model_outputs]
    scheduler.timestep_list = [None] * len(missing) + list(
        scheduler.timesteps[completed_steps - len(state.model_outputs) : completed_steps]
    )
    scheduler.last_sample = state.previous_sample
    scheduler.lower_order_nums = min(completed_steps, order)
    scheduler.this_order = min(
        order, len(scheduler.timesteps) - completed_steps + 1, min(completed_steps - 1, order) + 1
    )
    scheduler._step_index = completed_steps


@torch.no_grad()
def denoise(
    decoder: WanTransformer3DModel,
    latents_BzThw: Tensor,
    condition_BLD: Tensor,
    null_BLD: Tensor,
    steps: int,
    guidance_scale: float,
    flow_shift: float,
    initial_state: DenoisingState | None = None,
) -> Iterator[DenoisingStep]:
    """Yields after every step; the last one's latents are the result.  Goes on from `initial_state` where one is given.

    Guidance is the usual formula, null + scale * (condition - null); at scale 1 the null pass is left out.
    (The released code's scale s is this one's s + 1.)
    """
    scheduler = create_scheduler(steps, flow_shift, latents_BzThw.device)
    if initial_state:
        restore_scheduler(scheduler, initial_state)
        latents_BzThw = initial_state.latents
    first_step = initial_state.step if initial_state else 0
    for completed_steps, timestep in enumerate(scheduler.timesteps[first_step:], start=first_step + 1):
        timesteps_B = timestep.expand(len(latents_BzThw))
        velocity = decoder(latents_BzThw, timesteps_B, condition_BLD, return_dict=False)[0]
        if guidance_scale != 1:
            null = decoder(latents_BzThw, timesteps_B, null_BLD, return_dict=False)[0]
            velocity = null + guidance_scale * (velocity - null)
        clean_latents = latents_BzThw - scheduler.sigmas[completed_steps - 1] * velocity
        latents_BzThw = scheduler.step(velocity, timestep, latents_BzThw, return_dict=False)[0]
        outputs = tuple(output for output in scheduler.model_outputs if output is not None)
        yield DenoisingStep(
            steps, DenoisingState(completed_steps, latents_BzThw, scheduler.last_sample, outputs), clean_latents
        )

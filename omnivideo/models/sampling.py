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
class Point:
    """All that the loop needs to go on after `step` steps to the same bits.  (UniPC draws nothing at random.)

    `latents` is the noisy sample; `before` the one that the last step began with; `outputs` what the scheduler made
    of the decoder's last answers, at most two, oldest first.  All [B, z, T, h, w].
    """

    step: int
    latents: Tensor
    before: Tensor
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Denoised:
    """After one step of `steps`: where the loop is, and `guess`, how the clean sample looks from there."""

    steps: int
    point: Point
    guess: Tensor


def unipc(steps: int, flow_shift: float, device: torch.device | str = "cpu") -> UniPCMultistepScheduler:
    """UniPC of order 2 (bh2), ready for `steps` steps from noise to data.

    Wan's own noise levels, from 0.999 evenly to 0 and then shifted, so that the timesteps are the released code's
    (999, 995, 991 ... 92 at 50 steps and shift 5); diffusers' default ends a little higher.
    """
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
    scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1], device=device)
    # Else it would look its first step up by the timestep, which under a large shift several steps share.
    scheduler.set_begin_index(0)
    return scheduler


def noise(seeds: list[int], shape_zThw: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """Standard normal latents, each row of the batch from its own seed; drawn on the CPU, so alike on any device."""
    rows = [torch.randn(shape_zThw, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def put_back(scheduler: UniPCMultistepScheduler, point: Point) -> None:
    """The scheduler as it was at a point.  What is not kept there follows from the number of the step."""
    order, done = scheduler.config.solver_order, point.step
    missing: list[Tensor | None] = [None] * (order - len(point.outputs))
    scheduler.model_outputs = [*missing, *point.outputs]
    scheduler.timestep_list = [None] * len(missing) + list(scheduler.timesteps[done - len(point.outputs) : done])
    scheduler.last_sample = point.before
    scheduler.lower_order_nums = min(done, order)
    scheduler.this_order = min(order, len(scheduler.timesteps) - done + 1, min(done - 1, order) + 1)
    scheduler._step_index = done


@torch.no_grad()
def denoise(
    decoder: WanTransformer3DModel,
    latents_BzThw: Tensor,
    condition_BLD: Tensor,
    null_BLD: Tensor,
    steps: int,
    guidance_scale: float,
    flow_shift: float,
    begin: Point | None = None,
) -> Iterator[Denoised]:
    """Yields after every step; the last one's latents are the result.  Goes on from `begin` where one is given.

    Guidance is the usual formula, null + scale * (condition - null); at scale 1 the null pass is left out.
    (The released code's scale s is this one's s + 1.)
    """
    scheduler = unipc(steps, flow_shift, latents_BzThw.device)
    if begin:
        put_back(scheduler, begin)
        latents_BzThw = begin.latents
    first = begin.step if begin else 0
    for done, timestep in enumerate(scheduler.timesteps[first:], start=first + 1):
        at = timestep.expand(len(latents_BzThw))
        velocity = decoder(latents_BzThw, at, condition_BLD, return_dict=False)[0]
        if guidance_scale != 1:
            null = decoder(latents_BzThw, at, null_BLD, return_dict=False)[0]
            velocity = null + guidance_scale * (velocity - null)
        guess = latents_BzThw - scheduler.sigmas[done - 1] * velocity
        latents_BzThw = scheduler.step(velocity, timestep, latents_BzThw, return_dict=False)[0]
        outputs = tuple(output for output in scheduler.model_outputs if output is not None)
        yield Denoised(steps, Point(done, latents_BzThw, scheduler.last_sample, outputs), guess)

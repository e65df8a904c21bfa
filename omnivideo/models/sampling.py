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
class Denoised:
    """The state after one step: `step` of `steps` are done; `latents` is the noisy sample, `guess` the clean one."""

    step: int
    steps: int
    latents: Tensor
    guess: Tensor


def unipc(steps: int, flow_shift: float, device: torch.device | str = "cpu") -> UniPCMultistepScheduler:
    """UniPC of order 2 (bh2), ready for `steps` steps from noise to data.

    Wan's own noise levels, from 0.999 evenly to 0 and then shifted, so that the timesteps are the released code's
    (999, 995, 991 ... 92 at 50 steps and shift 5); diffusers' default ends a little higher.
    """
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
    scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1], device=device)
    return scheduler


def noise(seeds: list[int], shape_zThw: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """Standard normal latents, each row of the batch from its own seed; drawn on the CPU, so alike on any device."""
    rows = [torch.randn(shape_zThw, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


@torch.no_grad()
def denoise(
    decoder: WanTransformer3DModel,
    latents_BzThw: Tensor,
    condition_BLD: Tensor,
    null_BLD: Tensor,
    steps: int,
    guidance_scale: float,
    flow_shift: float,
) -> Iterator[Denoised]:
    """Yields after every step; the last one's `latents` are the result.

    Guidance is the usual formula, null + scale * (condition - null); at scale 1 the null pass is left out.
    (The released code's scale s is this one's s + 1.)
    """
    scheduler = unipc(steps, flow_shift, latents_BzThw.device)
    for done, timestep in enumerate(scheduler.timesteps, start=1):
        at = timestep.expand(len(latents_BzThw))
        velocity = decoder(latents_BzThw, at, condition_BLD, return_dict=False)[0]
        if guidance_scale != 1:
            null = decoder(latents_BzThw, at, null_BLD, return_dict=False)[0]
            velocity = null + guidance_scale * (velocity - null)
        guess = latents_BzThw - scheduler.sigmas[done - 1] * velocity
        latents_BzThw = scheduler.step(velocity, timestep, latents_BzThw, return_dict=False)[0]
        yield Denoised(done, steps, latents_BzThw, guess)

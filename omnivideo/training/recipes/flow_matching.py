"""TODO docstring of omnivideo/training/recipes/flow_matching.py."""

from collections.abc import Callable

import torch
from torch import Tensor

from omnivideo.training.engine.data_parallel import current_rank


def sample_sigma(count: int, high_noise_share: float) -> Tensor:
    """Noise levels [B] in 0..1: logit-normal, but a share `high` as the sampler visits them (shift 5).

    Outlines are learned at middling noise; where things go, and how many there are, is decided above 0.9, where a
    logit-normal draw is rarely.
    """
    logit_normal = torch.sigmoid(torch.randn(count) * 1.1 + 0.5)
    uniform = torch.rand(count)
    return torch.where(torch.rand(count) < high_noise_share, 5 * uniform / (1 + 4 * uniform), logit_normal)


def sample_noise(count: int, like: Tensor, high_noise_share: float) -> tuple[Tensor, Tensor]:
    """Noise levels [B], and noise for so many latents of this kind."""
    sigma = sample_sigma(count, high_noise_share).to(like)
    return sigma, torch.randn(count, *like.shape[1:], dtype=like.dtype, device=like.device)


def flow_matching_loss(
    decoder: Callable[..., tuple[Tensor]],
    latents: Tensor,
    condition: Tensor,
    high_noise_share: float = 0.5,
    sigma_and_noise: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Eq. 4, squared error per sample [B]: the velocity from data to noise at x = (1 - sigma) data + sigma noise.

    Noise has been `drawn` for these latents, or is for the whole batch, of which they are this process's equal share.
    """
    if sigma_and_noise is None:
        global_size = len(latents) * current_rank().world_size
        local_slice = current_rank().local_slice(global_size)
        sigma, noise = (tensor[local_slice] for tensor in sample_noise(global_size, latents, high_noise_share))
    else:
        sigma, noise = sigma_and_noise
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    velocity = decoder(noisy, sigma * 1000, condition, return_dict=False)[0]
    return (velocity - (noise - latents)).square().flatten(1).mean(1)

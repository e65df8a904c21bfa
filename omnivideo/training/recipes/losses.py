"""The losses of the stages: alignment (Eq. 1) with its targets, text alignment (stage 2a), flow matching (Eq. 4).

Eq. 2, the loss of text, is in `data.chat_batch`.

Shapes: B batch, C colours, F frames, H W pixels, Q visual tokens, E width of a visual token, L adapter tokens,
N text tokens, D width of both.
"""

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor
from transformers import SiglipVisionModel

from omnivideo.models.sampling import expand_timestep, insert_given_frames
from omnivideo.training.engine.data_parallel import current_rank


def select_frame_indices(frame_count: int, token_count: int) -> Tensor:
    """Return the index of the frame that each visual token represents; the frames are evenly spaced."""
    return torch.linspace(0, frame_count - 1, token_count).round().long()


def embed_frames(encoder: SiglipVisionModel, clips_BCFHW: Tensor, token_count: int) -> Tensor:
    """Return the targets of Eq. 1: pooled embeddings [B, Q, E] of the frames that the visual tokens represent.

    Each frame is encoded once, even if several tokens represent it, as for an image.
    """
    frame_of_token = select_frame_indices(clips_BCFHW.shape[2], token_count)
    frame_indices, inverse = torch.unique(frame_of_token, return_inverse=True)
    frames = clips_BCFHW[:, :, frame_indices].transpose(1, 2)
    pooled: Tensor = encoder(frames.flatten(0, 1).to(encoder.device)).pooler_output
    return pooled.reshape(len(clips_BCFHW), len(frame_indices), -1)[:, inverse]


def alignment_loss(visual_BQE: Tensor, target_BQE: Tensor) -> Tensor:
    """Eq. 1: squared distance plus cosine distance of the visual tokens to the visual encoder's embeddings.

    The embeddings are normalised to mean 0 and deviation 1: the vision head ends in a layer norm, whose weights would
    have to grow tenfold to reach the raw values.
    """
    target = F.layer_norm(target_BQE, target_BQE.shape[-1:])
    return F.mse_loss(visual_BQE, target) + (1 - F.cosine_similarity(visual_BQE, target, dim=-1)).mean()


def text_alignment_loss(tokens_LD: Tensor, text_ND: Tensor) -> Tensor:
    """Return the distance of adapter tokens from a prompt's text embeddings (stage 2a).

    Attention over the adapter's tokens should reproduce each text embedding, and the two means should agree.
    """
    attended = (text_ND @ tokens_LD.T / text_ND.shape[-1] ** 0.5).softmax(-1) @ tokens_LD
    return F.mse_loss(attended, text_ND) + F.mse_loss(tokens_LD.mean(0), text_ND.mean(0))


def sample_sigma(count: int, high_noise_share: float) -> Tensor:
    """Return noise levels [B] in 0..1: logit-normal, except for a share that follows the sampler's schedule (shift 5).

    Outlines are learned at medium noise. Positions and counts are decided above 0.9, which a logit-normal
    sample rarely reaches.
    """
    logit_normal = torch.sigmoid(torch.randn(count) * 1.1 + 0.5)
    uniform = torch.rand(count)
    return torch.where(torch.rand(count) < high_noise_share, 5 * uniform / (1 + 4 * uniform), logit_normal)


def sample_noise(count: int, like: Tensor, high_noise_share: float) -> tuple[Tensor, Tensor]:
    """Return noise levels [B], and noise for `count` latents of the shape, device and precision of `like` [1, ...]."""
    sigma = sample_sigma(count, high_noise_share).to(like)
    return sigma, torch.randn(count, *like.shape[1:], dtype=like.dtype, device=like.device)


def flow_matching_loss(
    decoder: WanTransformer3DModel,
    latents: Tensor,
    condition: Tensor,
    high_noise_share: float = 0.5,
    sigma_and_noise: tuple[Tensor, Tensor] | None = None,
    given_frames: int = 0,
) -> Tensor:
    """Eq. 4: return the squared error of the velocity for each sample [B], at x = (1 - sigma) data + sigma noise.

    Without `sigma_and_noise`, noise is sampled for the global batch, of which `latents` are this process's equal part.
    The first `given_frames` latent frames have no noise and no error.
    """
    if sigma_and_noise is None:
        global_size = len(latents) * current_rank().world_size
        local_slice = current_rank().local_slice(global_size)
        sigma, noise = (tensor[local_slice] for tensor in sample_noise(global_size, latents, high_noise_share))
    else:
        sigma, noise = sigma_and_noise
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy, timestep = (1 - level) * latents + level * noise, sigma * 1000
    if given_frames:
        noisy = insert_given_frames(noisy, latents[:, :, :given_frames])
        timestep = expand_timestep(decoder, noisy, timestep, given_frames)
    velocity: Tensor = decoder(noisy, timestep, condition, return_dict=False)[0]
    return (velocity - (noise - latents))[:, :, given_frames:].square().flatten(1).mean(1)

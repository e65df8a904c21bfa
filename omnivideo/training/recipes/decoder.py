"""Foundation: the diffusion decoder, for text-to-image and text-to-video.

Stands for Wan's downloaded weights: a plain `WanTransformer3DModel` under the condition of a frozen text encoder.
Image and clip batches take turns; a tenth of the captions give way to the universal negative prompt, which is the
null condition of guidance.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from omnivideo.models.conditions import encode_text, pad_condition
from omnivideo.models.omni import build_decoder
from omnivideo.presets import TINY
from omnivideo.training.language import sample_caption
from omnivideo.training.latents import load_or_encode_latents, take_scenes
from omnivideo.training.recipes.text import NEGATIVE_PROMPT, MAX_TEXT_TOKENS
from omnivideo.training.samples import COMPOSED_SHARE
from omnivideo.training.share import current_rank
from omnivideo.training.trainer import Losses, Recipe, single_micro_batch, step_seed
from omnivideo.training.world import Scene, stream_scenes

STILL_COUNT, CLIP_COUNT = 32_000, 12_000  # scenes in the cache
CAPTION_DROP_RATE = 0.1
LAYOUT_START_STEP = 1200  # first how things look; from here on half of the samples teach where they go


class DecoderFoundation(nn.Module):
    def __init__(self, decoder: WanTransformer3DModel, text_encoder: UMT5EncoderModel):
        super().__init__()
        self.decoder = decoder
        self.text_encoder = text_encoder


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


class CaptionedLatents:
    """Cached latents of one kind with captions made anew each time: `batch(step)` is a function of the step."""

    def __init__(self, folder: Path, vae: AutoencoderKLWan, is_video: bool, count: int, on_progress: Callable[[int, int], None]):
        self.name = "clips" if is_video else "stills"
        self.scenes: list[Scene] = take_scenes(stream_scenes(1, is_video, composed_share=COMPOSED_SHARE), count)
        self.latents = load_or_encode_latents(folder, self.name, vae, self.scenes, on_progress)

    def sample_batch(self, step: int, size: int) -> tuple[Tensor, list[str]]:
        rng = random.Random(step_seed(f"decoder/{self.name}", step))
        indices = rng.sample(range(len(self.scenes)), size)
        texts = [
            NEGATIVE_PROMPT if rng.random() < CAPTION_DROP_RATE else sample_caption(rng, self.scenes[index], is_composed=True).text
            for index in indices
        ]
        return self.latents[current_rank().take_local_rows(indices)].float(), current_rank().take_local_rows(texts)


def build_decoder_recipe(
    stills: CaptionedLatents,
    clips: CaptionedLatents,
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: UMT5EncoderModel,
    steps: int = 9_500,
    batch_sizes: tuple[int, int] = (96, 32),
) -> Recipe:
    torch.manual_seed(2)
    decoder = build_decoder(TINY)
    model = DecoderFoundation(decoder, text_encoder)

    def compute_loss(step: int) -> Losses:
        is_still = step % 2 == 0
        latents, texts = stills.sample_batch(step, batch_sizes[0]) if is_still else clips.sample_batch(step, batch_sizes[1])
        with torch.no_grad():
            text = encode_text(tokenizer, text_encoder, texts, MAX_TEXT_TOKENS)[0]
        condition = pad_condition(text, current_rank().global_max(max(TINY.min_condition_tokens, text.shape[1])), MAX_TEXT_TOKENS)
        error = flow_matching_loss(
            decoder, latents.to(condition.device), condition, 0.5 if step >= LAYOUT_START_STEP else 0.0
        ).mean()
        return {"loss": error, "stills" if is_still else "clips": error}

    return Recipe(
        "decoder", model, ("decoder",), single_micro_batch(compute_loss), steps=steps, lr=1e-2, adam_lr=1e-3, warmup=200, decay_from=0.7,
        ema_decay=0.999, batch_size=lambda step: batch_sizes[step % 2],
    )  # fmt: skip

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

from omnivideo.models.conditions import encode_text, pad
from omnivideo.models.omni import build_decoder
from omnivideo.presets import TINY
from omnivideo.training.language import caption
from omnivideo.training.latents import cached, first_scenes
from omnivideo.training.recipes.text import NEGATIVE_PROMPT, WORDS
from omnivideo.training.samples import COMPOSED
from omnivideo.training.share import share
from omnivideo.training.trainer import Losses, Recipe, at_once, step_seed
from omnivideo.training.world import Scene, scenes

STILLS, CLIPS = 32_000, 12_000  # scenes in the cache
CAPTION_DROP = 0.1
LAYOUT_FROM = 1200  # first how things look; from here on half of the samples teach where they go


class DecoderFoundation(nn.Module):
    def __init__(self, decoder: WanTransformer3DModel, text_encoder: UMT5EncoderModel):
        super().__init__()
        self.decoder = decoder
        self.text_encoder = text_encoder


def draw_sigma(count: int, high: float) -> Tensor:
    """Noise levels [B] in 0..1: logit-normal, but a share `high` as the sampler visits them (shift 5).

    Outlines are learned at middling noise; where things go, and how many there are, is decided above 0.9, where a
    logit-normal draw is rarely.
    """
    middling = torch.sigmoid(torch.randn(count) * 1.1 + 0.5)
    even = torch.rand(count)
    return torch.where(torch.rand(count) < high, 5 * even / (1 + 4 * even), middling)


def draw_noise(count: int, like: Tensor, high: float) -> tuple[Tensor, Tensor]:
    """Noise levels [B], and noise for so many latents of this kind."""
    sigma = draw_sigma(count, high).to(like)
    return sigma, torch.randn(count, *like.shape[1:], dtype=like.dtype, device=like.device)


def flow_matching(
    decoder: Callable[..., tuple[Tensor]],
    latents: Tensor,
    condition: Tensor,
    high: float = 0.5,
    drawn: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Eq. 4, squared error per sample [B]: the velocity from data to noise at x = (1 - sigma) data + sigma noise.

    Noise has been `drawn` for these latents, or is for the whole batch, of which they are this process's equal share.
    """
    if drawn is None:
        whole = len(latents) * share().world
        part = share().part(whole)
        sigma, noise = (one[part] for one in draw_noise(whole, latents, high))
    else:
        sigma, noise = drawn
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    velocity = decoder(noisy, sigma * 1000, condition, return_dict=False)[0]
    return (velocity - (noise - latents)).square().flatten(1).mean(1)


class Captioned:
    """Cached latents of one kind with captions made anew each time: `batch(step)` is a function of the step."""

    def __init__(self, folder: Path, vae: AutoencoderKLWan, video: bool, count: int, tell: Callable[[int, int], None]):
        self.name = "clips" if video else "stills"
        self.scenes: list[Scene] = first_scenes(scenes(1, video, composed=COMPOSED), count)
        self.latents = cached(folder, self.name, vae, self.scenes, tell)

    def batch(self, step: int, size: int) -> tuple[Tensor, list[str]]:
        rng = random.Random(step_seed(f"decoder/{self.name}", step))
        chosen = rng.sample(range(len(self.scenes)), size)
        texts = [
            NEGATIVE_PROMPT if rng.random() < CAPTION_DROP else caption(rng, self.scenes[at], composed=True).text
            for at in chosen
        ]
        return self.latents[share().take(chosen)].float(), share().take(texts)


def decoder_recipe(
    stills: Captioned,
    clips: Captioned,
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: UMT5EncoderModel,
    steps: int = 9_500,
    sizes: tuple[int, int] = (96, 32),
) -> Recipe:
    torch.manual_seed(2)
    decoder = build_decoder(TINY)
    model = DecoderFoundation(decoder, text_encoder)

    def loss(step: int) -> Losses:
        still = step % 2 == 0
        latents, texts = stills.batch(step, sizes[0]) if still else clips.batch(step, sizes[1])
        with torch.no_grad():
            text = encode_text(tokenizer, text_encoder, texts, WORDS)[0]
        condition = pad(text, share().longest(max(TINY.condition_least, text.shape[1])), WORDS)
        error = flow_matching(
            decoder, latents.to(condition.device), condition, 0.5 if step >= LAYOUT_FROM else 0.0
        ).mean()
        return {"loss": error, "stills" if still else "clips": error}

    return Recipe(
        "decoder", model, ("decoder",), at_once(loss), steps=steps, lr=1e-2, adam_lr=1e-3, warmup=200, decay_from=0.7,
        ema=0.999, samples=lambda step: sizes[step % 2],
    )  # fmt: skip

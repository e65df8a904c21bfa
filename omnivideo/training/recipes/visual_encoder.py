"""Foundation: the frozen visual encoder that stage 1 aligns the vision head to, standing for SigLIP2.

A `SiglipVisionModel` over single frames, whose pooled embedding learns to describe: read-outs name every object
in reading order (shape, colour, size, place) and the background.
"""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from omnivideo.training.language import PLACES, reading_order, regions
from omnivideo.training.latents import to_pixels
from omnivideo.training.share import share
from omnivideo.training.trainer import Losses, Recipe, at_once, step_seed
from omnivideo.training.world import BACKGROUNDS, COLOURS, FRAME, SHAPES, SIZES, Scene, random_scene

CONFIG: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "image_size": FRAME, "patch_size": 8,
}  # fmt: skip
SLOTS = 4
FIELDS = (SHAPES, tuple(COLOURS), SIZES, tuple(PLACES))
CLASSES = [1 + len(names) for _ in range(SLOTS) for names in FIELDS] + [len(BACKGROUNDS)]


def scene_labels(scene: Scene) -> list[int]:
    """Classes of a still: four per object in reading order (0 is "no object"), then the background."""
    labels = []
    for thing in reading_order(scene):
        values = (thing.shape, thing.colour, thing.size, regions(thing))
        labels += [1 + names.index(value) for names, value in zip(FIELDS, values, strict=True)]
    labels += [0] * (len(CLASSES) - 1 - len(labels))
    return [*labels, list(BACKGROUNDS).index(scene.background)]


class VisualFoundation(nn.Module):
    """The encoder with read-outs of its pooled embedding, which only its training needs."""

    def __init__(self, encoder: SiglipVisionModel):
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.read = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 512), nn.GELU(), nn.Linear(512, len(CLASSES) * max(CLASSES))
        )

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits [B, labels, classes] from frames in -1..1."""
        pooled = self.encoder(pixels_BCHW).pooler_output
        return self.read(pooled).view(len(pooled), len(CLASSES), max(CLASSES))


def looked_at(frames: int, tokens: int) -> Tensor:
    """Which of a clip's frames its visual tokens stand for: spread evenly."""
    return torch.linspace(0, frames - 1, tokens).round().long()


def embed_frames(encoder: SiglipVisionModel, clips_BCFHW: Tensor, tokens: int) -> Tensor:
    """Targets E of Eq. 1: pooled embeddings [B, tokens, D] of the frames that each clip is looked at in."""
    at, place = looked_at(clips_BCFHW.shape[2], tokens).unique(return_inverse=True)  # a still has one
    frames = clips_BCFHW[:, :, at].transpose(1, 2)
    pooled = encoder(frames.flatten(0, 1).to(encoder.device)).pooler_output
    return pooled.unflatten(0, (len(clips_BCFHW), len(at)))[:, place]


def visual_encoder_recipe(steps: int = 3000, batch: int = 64) -> Recipe:
    torch.manual_seed(4)
    model = VisualFoundation(SiglipVisionModel(SiglipVisionConfig(**CONFIG)))

    def loss(step: int) -> Losses:
        rng = random.Random(step_seed("visual_encoder/data", step))
        chosen = share().take([random_scene(rng, video=False) for _ in range(batch)])
        device = model.encoder.device
        labels = torch.tensor([scene_labels(scene) for scene in chosen], device=device)
        logits = model(to_pixels(chosen)[:, :, 0].to(device))
        right = (logits.argmax(-1) == labels).float()
        value = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": value, "right": right.mean(), "whole": right.all(dim=1).float().mean()}

    return Recipe(
        "visual_encoder", model, ("",), at_once(loss), steps=steps, lr=1e-2, adam_lr=2e-3, warmup=100,
        samples=lambda step: batch,
    )  # fmt: skip

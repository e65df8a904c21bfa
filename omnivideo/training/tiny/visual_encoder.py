"""Foundation: the frozen visual encoder to which stage 1 aligns the vision head, in place of SigLIP2.

It is a `SiglipVisionModel` over single frames. Read-outs of its pooled embedding learn to predict every object in
reading order (shape, colour, size, region) and the background.
"""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from omnivideo.synthetic.captions import REGION_PHRASES, find_region, sort_in_reading_order
from omnivideo.synthetic.scenes import BACKGROUNDS, COLOURS, FRAME_SIZE, SHAPES, SIZES, Scene, sample_scene
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.recipe import Losses, Recipe, single_micro_batch, step_seed
from omnivideo.training.tiny.latents import pixels_from_scenes

CONFIG: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "image_size": FRAME_SIZE, "patch_size": 8,
}  # fmt: skip
OBJECT_SLOTS = 4
SLOT_FIELDS = (SHAPES, tuple(COLOURS), SIZES, tuple(REGION_PHRASES))
CLASS_COUNTS = [1 + len(names) for _ in range(OBJECT_SLOTS) for names in SLOT_FIELDS] + [len(BACKGROUNDS)]


def encode_scene_labels(scene: Scene) -> list[int]:
    """Return the classes of a still: four for each object in reading order (0 is "no object"), then the background."""
    labels = []
    for obj in sort_in_reading_order(scene):
        values = (obj.shape, obj.colour, obj.size, find_region(obj))
        labels += [1 + names.index(value) for names, value in zip(SLOT_FIELDS, values, strict=True)]
    labels += [0] * (len(CLASS_COUNTS) - 1 - len(labels))
    return [*labels, list(BACKGROUNDS).index(scene.background)]


class VisualFoundation(nn.Module):
    """The encoder with read-outs of its pooled embedding, which are used only in training."""

    def __init__(self, encoder: SiglipVisionModel):
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.read = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 512), nn.GELU(), nn.Linear(512, len(CLASS_COUNTS) * max(CLASS_COUNTS))
        )

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return logits [B, labels, classes] for frames in -1..1."""
        pooled = self.encoder(pixels_BCHW).pooler_output
        logits: Tensor = self.read(pooled)
        return logits.view(len(pooled), len(CLASS_COUNTS), max(CLASS_COUNTS))


def build_visual_encoder_recipe(steps: int = 3000, batch_size: int = 64) -> Recipe:
    torch.manual_seed(4)
    model = VisualFoundation(SiglipVisionModel(SiglipVisionConfig(**CONFIG)))

    def compute_loss(step: int) -> Losses:
        rng = random.Random(step_seed("visual_encoder/data", step))
        scenes = current_rank().take_local_rows([sample_scene(rng, is_video=False) for _ in range(batch_size)])
        device = model.encoder.device
        labels = torch.tensor([encode_scene_labels(scene) for scene in scenes], device=device)
        logits = model(pixels_from_scenes(scenes)[:, :, 0].to(device))
        correct = (logits.argmax(-1) == labels).float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "accuracy": correct.mean(), "exact_match": correct.all(dim=1).float().mean()}

    return Recipe(
        "visual_encoder",
        model,
        ("",),
        single_micro_batch(compute_loss),
        steps=steps,
        lr=1e-2,
        adam_lr=2e-3,
        warmup=100,
        batch_size=lambda step: batch_size,
    )

"""The device and precision of each weight in a stage over shards; planning/memory.py counts by the same rule.

On a GPU trained weights are fp32, and frozen weights have the precision of matrix products. The text encoder and the
VAE stay on the CPU, because their outputs come from the cache that `omnivideo data encode` fills; they are moved to the
GPU as soon as a sample is not in the cache (`move_cpu_parts_to_device`).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import SiglipVisionModel

from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.weights.checkpoint import load_parts, load_strict
from omnivideo.training.recipes.parts import TRAINABLE_BY_STAGE

CPU_PARTS = ("text_encoder", "vae")  # their outputs are in the cache
CPU = torch.device("cpu")


@dataclass(frozen=True)
class WeightPlacement:
    device: torch.device
    dtype: torch.dtype


def choose_placement(
    stage: str, name: str, device: torch.device, precision: torch.dtype, cached: bool = True
) -> WeightPlacement:
    """Return the placement of a parameter in a stage; its name begins with its part, such as "decoder.".

    The VAE is always in fp32, as in `omnivideo data encode`, so that latents are the same.
    """
    part = name.partition(".")[0]
    location = CPU if cached and part in CPU_PARTS else device
    is_full_precision = device.type != "cuda" or part == "vae" or name.startswith(TRAINABLE_BY_STAGE[stage])
    return WeightPlacement(location, torch.float32 if is_full_precision else precision)


@dataclass(frozen=True)
class StageLoader:
    """Loads a stage's models from a folder of weights; each part is placed before the next one is read."""

    stage: str
    weights: Path
    device: torch.device
    precision: torch.dtype

    def load_omni(self) -> OmniVideoModel:
        """Load all models but the visual encoder; raise CheckpointError for missing or wrong files."""
        return load_parts(self.weights, self.place_part)

    def load_visual_encoder(self) -> SiglipVisionModel:
        """Load the visual encoder; raise CheckpointError for missing or wrong files."""
        encoder = load_strict(SiglipVisionModel, self.weights, "visual_encoder", None)
        return self.place_part("visual_encoder", encoder).eval().requires_grad_(False)

    @torch.no_grad()
    def place_part(self, name: str, part: nn.Module) -> nn.Module:
        """Move a part to its device and precision, one parameter at a time so that no part is in memory twice."""
        for key, parameter in part.named_parameters():
            placement = choose_placement(self.stage, f"{name}.{key}", self.device, self.precision)
            parameter.data = parameter.data.to(placement.device, placement.dtype)
        return part.to(placement.device)


def move_cpu_parts_to_device(omni: OmniVideoModel) -> OmniVideoModel:
    """Move the text encoder and the VAE to the device of the other parts, for a sample that is not in the cache."""
    for name in CPU_PARTS:
        getattr(omni, name).to(omni.device)
    return omni

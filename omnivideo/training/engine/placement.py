"""Where the weights of a stage over shards lie, and in which precision; `plan.py` counts by the same rule.

On a GPU what is trained is fp32 and what is frozen has the precision of the products.  The text encoder and the VAE
stay on the CPU, since `omnivideo data encode` has kept what they make, until something is not kept (`bring`).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import SiglipVisionModel

from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.weights.checkpoint import load_parts, load_strict
from omnivideo.training.recipes.parts import TRAINABLE_BY_STAGE

CPU_PARTS = ("text_encoder", "vae")  # what they make is in the cache
CPU = torch.device("cpu")


@dataclass(frozen=True)
class WeightPlacement:
    device: torch.device
    dtype: torch.dtype


def choose_placement(
    stage: str, name: str, device: torch.device, precision: torch.dtype, cached: bool = True
) -> WeightPlacement:
    """Of a parameter, named from its part on: mllm, bridge, decoder, text_encoder, vae or visual_encoder.

    Latents are made in fp32, here as by `omnivideo data encode`.
    """
    part = name.partition(".")[0]
    location = CPU if cached and part in CPU_PARTS else device
    is_full_precision = device.type != "cuda" or part == "vae" or name.startswith(TRAINABLE_BY_STAGE[stage])
    return WeightPlacement(location, torch.float32 if is_full_precision else precision)


@dataclass(frozen=True)
class StageLoader:
    """Reads a stage's models from a folder of weights: each part goes where it belongs before the next is read."""

    stage: str
    weights: Path
    device: torch.device
    precision: torch.dtype

    def load_omni(self) -> OmniVideoModel:
        """Raises CheckpointError."""
        return load_parts(self.weights, self.place_part)

    def load_visual_encoder(self) -> SiglipVisionModel:
        """Raises CheckpointError."""
        encoder = load_strict(SiglipVisionModel, self.weights, "visual_encoder", None)
        return self.place_part("visual_encoder", encoder).eval().requires_grad_(False)

    @torch.no_grad()
    def place_part(self, name: str, part: nn.Module) -> nn.Module:
        """A parameter at a time, so that no part is anywhere twice."""
        for key, parameter in part.named_parameters():
            placement = choose_placement(self.stage, f"{name}.{key}", self.device, self.precision)
            parameter.data = parameter.data.to(placement.device, placement.dtype)
        return part.to(placement.device)


def move_cpu_parts_to_device(omni: OmniVideoModel) -> OmniVideoModel:
    """Moves what stays on the CPU to the other parts, for a sample that is not in the cache."""
    for name in CPU_PARTS:
        getattr(omni, name).to(omni.device)
    return omni

"""Where the weights of a stage over shards lie, and in which precision; `plan.py` counts by the same rule.

On a GPU what is trained is fp32 and what is frozen has the precision of the products.  The text encoder and the VAE
stay on the CPU, since `omnivideo data encode` has kept what they make, until something is not kept (`bring`).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import SiglipVisionModel

from omnivideo.models.checkpoint import load_parts, strictly
from omnivideo.models.omni import Omni
from omnivideo.training.recipes.stages import TRAINED

KEPT = ("text_encoder", "vae")  # what they make is in the cache
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    device: torch.device
    dtype: torch.dtype


def place_of(stage: str, name: str, device: torch.device, precision: torch.dtype, cached: bool = True) -> Place:
    """Of a parameter, named from its part on: mllm, bridge, decoder, text_encoder, vae or visual_encoder.

    Latents are made in fp32, here as by `omnivideo data encode`.
    """
    part = name.partition(".")[0]
    where = CPU if cached and part in KEPT else device
    whole = device.type != "cuda" or part == "vae" or name.startswith(TRAINED[stage])
    return Place(where, torch.float32 if whole else precision)


@dataclass(frozen=True)
class Loader:
    """Reads a stage's models from a folder of weights: each part goes where it belongs before the next is read."""

    stage: str
    weights: Path
    device: torch.device
    precision: torch.dtype

    def omni(self) -> Omni:
        """Raises CheckpointError."""
        return load_parts(self.weights, self.put)

    def visual_encoder(self) -> SiglipVisionModel:
        """Raises CheckpointError."""
        encoder = strictly(SiglipVisionModel, self.weights, "visual_encoder", None)
        return self.put("visual_encoder", encoder).eval().requires_grad_(False)

    @torch.no_grad()
    def put(self, name: str, part: nn.Module) -> nn.Module:
        """A parameter at a time, so that no part is anywhere twice."""
        for key, parameter in part.named_parameters():
            place = place_of(self.stage, f"{name}.{key}", self.device, self.precision)
            parameter.data = parameter.data.to(place.device, place.dtype)
        return part.to(place.device)


def bring(omni: Omni) -> Omni:
    """Moves what stays on the CPU to the other parts, for a sample that is not in the cache."""
    for name in KEPT:
        getattr(omni, name).to(omni.device)
    return omni

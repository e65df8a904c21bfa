"""TODO docstring of omnivideo/training/engine/recipe.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from omnivideo.models.omni import OmniVideoModel
from omnivideo.training.engine.optim import (
    OptimizerName,
    cosine_lr_scale,
    trapezoidal_lr_scale,
)

Losses = dict[str, Tensor]  # "loss" is what is minimised; the others are shown


MicroBatchLosses = Sequence[Callable[[], Losses]]


@dataclass
class Recipe:
    """One stage of training.

    `model` holds all weights of the checkpoint; `trainable` names the parameters to train by prefix ("" is all).
    `passes(step)` are the parts that a batch, or this process's share of it (`share.py`), is taken in: each gives its
    named losses, whose average over all is the batch's, so that gradients add up one by one (`at_once`: one part);
    `data` tells its samples and their order from others (a checkpoint does not go on over other ones).
    `samples(step)` is the size of the whole batch, `flops(step)` what the model cost on it, asked after its loss (0 and
    None: not known).  `omni` draws samples with the model's weights, where it can.
    Products are of `precision`, what the optimizer moves is always fp32; `checkpointing` trades time for memory.
    """

    name: str
    model: nn.Module
    trainable: tuple[str, ...]
    micro_batch_losses: Callable[[int], MicroBatchLosses]
    steps: int
    lr: float = 2e-3
    adam_lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 50
    decay_from: float = 0.6
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    precision: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    optimizer: OptimizerName = "muon"
    lr_schedule: Literal["flat", "cosine"] = "flat"
    checkpointing: bool = False
    batch_size: Callable[[int], int] = lambda step: 0
    step_flops: Callable[[int], float] | None = None
    data_digest: str = ""
    omni: OmniVideoModel | None = None

    def compute_losses(self, step: int) -> Losses:
        """Those of all passes."""
        return average_losses([compute_loss() for compute_loss in self.micro_batch_losses(step)])

    def lr_scale(self, step: int) -> float:
        """Share of the peak learning rate."""
        if self.lr_schedule == "cosine":
            return cosine_lr_scale(step, self.steps, self.warmup)
        return trapezoidal_lr_scale(step, self.steps, self.warmup, self.decay_from)


def single_micro_batch(loss: Callable[[int], Losses]) -> Callable[[int], MicroBatchLosses]:
    """The passes of a recipe that takes its batch whole."""
    return lambda step: [partial(loss, step)]


def average_losses(all_losses: Sequence[Losses]) -> Losses:
    """Each loss averaged over the passes that have it."""
    names = dict.fromkeys(name for losses in all_losses for name in losses)
    return {name: torch.stack([losses[name] for losses in all_losses if name in losses]).mean() for name in names}


def step_seed(name: str, step: int) -> int:
    """A seed that depends on the recipe's name and the step only (FNV-1a, as `hash` differs between processes)."""
    value = 0xCBF29CE484222325
    for byte in f"{name}/{step}".encode():
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value % 2**63

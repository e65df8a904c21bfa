"""A recipe: what one stage of training minimises, which parameters it trains, and how it updates them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from omnivideo.models.omni import OmniVideoModel
from omnivideo.training.engine.optim import OptimizerName, cosine_lr_scale, trapezoidal_lr_scale

Losses = dict[str, Tensor]  # "loss" is minimised; the others are only reported
MicroBatchLosses = Sequence[Callable[[], Losses]]


@dataclass
class Recipe:
    """One stage of training.

    `model` holds all weights of the checkpoint. `trainable` lists the prefixes of the parameters to train; "" stands
    for all. `micro_batch_losses(step)` returns a function for each micro-batch of this process's part of the batch
    (data_parallel.py); each computes named losses, whose averages over the micro-batches are the losses of the batch.
    `data_digest` identifies the samples and their order; a checkpoint resumes only over the same ones.
    `batch_size(step)` is the number of samples over all processes, or 0 if unknown. `step_flops(step)` is the number of
    operations of the model in a step and may be called only after its losses; None if unknown. `omni` can generate
    samples with the model's weights; None if the stage cannot. `precision` is that of matrix products; the optimizer
    always works in fp32.
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
        """Return the losses of a step, averaged over its micro-batches."""
        return average_losses([compute_loss() for compute_loss in self.micro_batch_losses(step)])

    def lr_scale(self, step: int) -> float:
        """Return the learning rate at a step as a fraction of its peak."""
        if self.lr_schedule == "cosine":
            return cosine_lr_scale(step, self.steps, self.warmup)
        return trapezoidal_lr_scale(step, self.steps, self.warmup, self.decay_from)


def single_micro_batch(loss: Callable[[int], Losses]) -> Callable[[int], MicroBatchLosses]:
    """Return the micro-batches of a recipe that does not divide its batch."""
    return lambda step: [partial(loss, step)]


def average_losses(all_losses: Sequence[Losses]) -> Losses:
    """Return each loss averaged over the micro-batches that have it."""
    names = dict.fromkeys(name for losses in all_losses for name in losses)
    return {name: torch.stack([losses[name] for losses in all_losses if name in losses]).mean() for name in names}


def step_seed(name: str, step: int) -> int:
    """Return a seed that depends only on the recipe's name and the step (FNV-1a; `hash` differs between processes)."""
    value = 0xCBF29CE484222325
    for byte in f"{name}/{step}".encode():
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value % 2**63

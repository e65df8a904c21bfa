"""The loop that every recipe runs in: progress, checkpoints, resume, loss plots.

A recipe's loss is a function of the step alone (its data, noise and drops are drawn from a generator seeded with
the recipe's name and the step), so a run that was killed goes on from its checkpoint to the same losses.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from omnivideo.errors import CheckpointError
from omnivideo.training.optim import optimizers, rate, set_rate

Losses = dict[str, Tensor]  # "loss" is what is minimised; the others are shown


@dataclass
class Recipe:
    """One stage of training.

    `model` holds all weights of the checkpoint; `trainable` names the parameters to train by prefix ("" is all).
    `loss(step)` returns the named losses of one batch.
    """

    name: str
    model: nn.Module
    trainable: tuple[str, ...]
    loss: Callable[[int], Losses]
    steps: int
    lr: float = 2e-3
    adam_lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 50
    decay_from: float = 0.6
    clip: float = 1.0
    ema: float = 0.0
    precision: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class Progress:
    """Told after every step; `left` is in seconds."""

    step: int
    steps: int
    losses: dict[str, float]
    left: float


def freeze(model: nn.Module, trainable: tuple[str, ...]) -> list[tuple[str, nn.Parameter]]:
    """Leaves exactly the parameters under the given prefixes trainable, and returns them by name."""
    chosen = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(prefix) for prefix in trainable))
        if parameter.requires_grad:
            chosen.append((name, parameter))
    missing = [prefix for prefix in trainable if not any(name.startswith(prefix) for name, _ in chosen)]
    assert not missing, f"no parameter is called {missing}"
    return chosen


class Trainer:
    """One run of a recipe in its folder (`<runs>/<recipe>/`: state.pt, log.jsonl, loss.png)."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe = recipe
        self.folder = folder
        self.step = 0
        self.seconds = 0.0  # of training, in all runs of this folder
        self.named = freeze(recipe.model, recipe.trainable)
        self.built = optimizers(self.named, recipe.lr, recipe.adam_lr, recipe.weight_decay)
        self.average = {name: p.detach().clone() for name, p in self.named} if recipe.ema else {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.state_file.exists():
            self.load()

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def load(self) -> None:
        state = torch.load(self.state_file, map_location=self.recipe.device, weights_only=True)
        if state["names"] != [name for name, _ in self.named]:
            raise CheckpointError(f"the checkpoint of {self.recipe.name} trains other parameters than the recipe")
        self.recipe.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.built, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average = state["average"]
        self.step = state["step"]
        self.seconds = state.get("seconds", 0.0)

    def save(self) -> None:
        state = {
            "names": [name for name, _ in self.named],
            "model": self.recipe.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.built],
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.state_file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.state_file)

    def advance(self) -> dict[str, float]:
        """One optimiser step; returns its losses."""
        recipe = self.recipe
        torch.manual_seed(step_seed(recipe.name, self.step))
        set_rate(self.built, rate(self.step, recipe.steps, recipe.warmup, recipe.decay_from))
        with torch.autocast(recipe.device.type, torch.bfloat16, enabled=recipe.precision == torch.bfloat16):
            losses = recipe.loss(self.step)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_([parameter for _, parameter in self.named], recipe.clip)
        for optimizer in self.built:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.update_average()
        self.step += 1
        return {name: float(value.detach()) for name, value in losses.items()}

    @torch.no_grad()
    def update_average(self) -> None:
        if not self.average:
            return
        # A young average follows closely, else the random start would stay in it for long.
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        mine: list[Tensor] = [parameter for _, parameter in self.named]
        torch._foreach_lerp_([self.average[name] for name, _ in self.named], mine, 1 - decay)

    def run(
        self,
        until: int | None = None,
        every: float = 120.0,
        tell: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """Trains to the recipe's end (or to step `until`), with a checkpoint every `every` seconds and at the end."""
        last, began, first, before = time.monotonic(), time.monotonic(), self.step, self.seconds
        until = self.recipe.steps if until is None else min(until, self.recipe.steps)
        with Log(self.folder / "log.jsonl", self.step) as log:
            while self.step < until:
                losses = self.advance()
                log.write(self.step, losses)
                now = time.monotonic()
                self.seconds = before + now - began
                left = (now - began) / (self.step - first) * (until - self.step)
                tell(Progress(self.step, until, losses, left))
                if now - last > every:
                    self.save()
                    last = now
        self.save()

    def averaged(self) -> nn.Module:
        """The model with its averaged weights in place (for use after training; the run's own are in the file)."""
        parameters = dict(self.recipe.model.named_parameters())
        with torch.no_grad():
            for name, value in self.average.items():
                parameters[name].copy_(value)
        return self.recipe.model


def step_seed(name: str, step: int) -> int:
    """A seed that depends on the recipe's name and the step only (FNV-1a, as `hash` differs between processes)."""
    value = 0xCBF29CE484222325
    for byte in f"{name}/{step}".encode():
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value % 2**63


class Log:
    """One JSON line per step; on resume, lines past the checkpoint are dropped."""

    def __init__(self, path: Path, step: int):
        kept = [line for line in read_lines(path) if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept))
        self.file = path.open("a")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def write(self, step: int, losses: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step} | {k: round(v, 6) for k, v in losses.items()}) + "\n")
        if step % 20 == 0:
            self.file.flush()


def read_lines(path: Path) -> Iterable[str]:
    """Whole lines only: the last one of a killed run may be cut."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()

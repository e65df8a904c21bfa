"""The loop that every recipe runs in: progress, checkpoints, resume, loss plots.

A recipe's loss is a function of the step alone (its data, noise and drops are drawn from a generator seeded with
the recipe's name and the step), so a run that was killed goes on from its checkpoint to the same losses.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Literal

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from omnivideo.errors import CheckpointError, Diverged
from omnivideo.models.bridge import VisionHead
from omnivideo.models.omni import Omni
from omnivideo.training.optim import Kind, Named, cosine, layout, optimizers, rate, set_rate
from omnivideo.training.shards import STATE, Saved, newest, put_state, write_state
from omnivideo.training.share import ALONE, sharing

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Losses = dict[str, Tensor]  # "loss" is what is minimised; the others are shown
Passes = Sequence[Callable[[], Losses]]


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
    passes: Callable[[int], Passes]
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
    optimizer: Kind = "muon"
    shape: Literal["flat", "cosine"] = "flat"
    checkpointing: bool = False
    samples: Callable[[int], int] = lambda step: 0
    flops: Callable[[int], float] | None = None
    data: str = ""
    omni: Omni | None = None

    def loss(self, step: int) -> Losses:
        """Those of all passes."""
        return averaged([one() for one in self.passes(step)])

    def rate(self, step: int) -> float:
        """Share of the peak learning rate."""
        if self.shape == "cosine":
            return cosine(step, self.steps, self.warmup)
        return rate(step, self.steps, self.warmup, self.decay_from)


def at_once(loss: Callable[[int], Losses]) -> Callable[[int], Passes]:
    """The passes of a recipe that takes its batch whole."""
    return lambda step: [partial(loss, step)]


def averaged(found: Sequence[Losses]) -> Losses:
    """Each loss averaged over the passes that have it."""
    names = dict.fromkeys(name for one in found for name in one)
    return {name: torch.stack([one[name] for one in found if name in one]).mean() for name in names}


@dataclass
class Progress:
    """Told after every step; `left` and `seconds` (of this step) are in seconds, `scores` of samples drawn after it."""

    step: int
    steps: int
    losses: dict[str, float]
    left: float
    seconds: float
    scores: dict[str, float] = field(default_factory=dict)


def freeze(model: nn.Module, trainable: tuple[str, ...]) -> Named:
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
    """One run of a recipe in its folder (`<runs>/<recipe>/`: state.pt, log.jsonl, loss.png).

    `distributed.py` has its like for several processes, which differ in what they hold and how they step.
    """

    share = ALONE
    first = True  # the process that writes the log and tells

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe = recipe
        self.folder = folder
        self.step = 0
        self.seconds = 0.0  # of training, in all runs of this folder
        self.named = freeze(recipe.model.to(recipe.device), recipe.trainable)
        if recipe.checkpointing:
            recompute(recipe.model)
        self.prepare()
        folder.mkdir(parents=True, exist_ok=True)
        saved = newest(folder, layout(self.named, recipe.optimizer))
        if saved:
            self.load(saved)

    def prepare(self) -> None:
        """Builds the optimizers, and the averages of what this process holds: here of all."""
        self.mine = self.named
        self.built = self.optimizers(self.mine)
        self.hold(self.mine)

    def optimizers(self, named: Named) -> list[torch.optim.Optimizer]:
        recipe = self.recipe
        return optimizers(named, recipe.lr, recipe.adam_lr, recipe.weight_decay, recipe.optimizer)

    def hold(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Says which weights are averaged here."""
        self.weights = {name: weight.detach() for name, weight in named}
        self.average = {name: weight.clone() for name, weight in self.weights.items()} if self.recipe.ema else {}

    @property
    def state_file(self) -> Path:
        return self.folder / STATE

    def load(self, saved: Saved) -> None:
        """Goes on from a checkpoint; raises CheckpointError for one of another recipe."""
        if saved.names != [name for name, _ in self.named]:
            raise CheckpointError(f"the checkpoint of {self.recipe.name} trains other parameters than the recipe")
        if saved.data != self.recipe.data:
            raise CheckpointError("data: the checkpoint was made with other samples, buckets or another mix")
        self.step, self.seconds = saved.step, saved.seconds
        self.restore(saved)

    def restore(self, saved: Saved) -> None:
        self.recipe.model.load_state_dict(saved.model(self.recipe.model))
        for optimizer, names in zip(self.built, layout(self.mine, self.recipe.optimizer), strict=True):
            put_state(optimizer, names, saved)
        for name, value in self.average.items():
            found = saved.read(name, "average")
            value.copy_(found.view_as(value) if found is not None else value)

    def save(self) -> None:
        state = {
            "names": [name for name, _ in self.named],
            "model": self.recipe.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.built],
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
            "data": self.recipe.data,
        }
        write_state(state, self.state_file)

    def advance(self) -> dict[str, float]:
        """One optimiser step; returns its losses.  Raises Diverged where the loss or its gradient is not finite."""
        recipe = self.recipe
        torch.manual_seed(step_seed(recipe.name, self.step))
        set_rate(self.built, recipe.rate(self.step))
        losses = self.gradients()
        norm = self.update()
        self.update_average()
        self.step += 1
        found = self.share.average({name: float(value) for name, value in losses.items()})
        for name, value in (("loss", found["loss"]), ("gradient's norm", float(norm))):
            if not isfinite(value):
                raise Diverged(f"{name}: {value} at step {self.step}; the last checkpoint stands, try a lower --rate")
        return found

    def gradients(self) -> Losses:
        """Those of this process's share of the batch, pass by pass; returns its losses."""
        recipe, found = self.recipe, list[Losses]()
        with sharing(self.share), attending(recipe):
            with products(recipe):
                passes = list(recipe.passes(self.step))
            count = len(passes)
            while passes:
                one = passes.pop(0)  # its samples are not kept for longer
                with products(recipe):
                    losses = one()
                self.backward(losses["loss"] / count, count > 1)
                found.append({name: value.detach() for name, value in losses.items()})
        return averaged(found)

    def backward(self, loss: Tensor, several: bool) -> None:
        """Adds a pass's gradients to those of the others, where there are `several`."""
        loss.backward()

    def update(self) -> Tensor | float:
        """Moves the weights down the gradient, whose norm is returned."""
        if self.recipe.optimizer == "adamw":
            fill_gradients(self.named)
        norm = nn.utils.clip_grad_norm_([parameter for _, parameter in self.named], self.recipe.clip)
        self.step_all()
        return norm

    def step_all(self) -> None:
        for optimizer in self.built:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update_average(self) -> None:
        if not self.average:
            return
        # A young average follows closely, else the random start would stay in it for long.
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [self.weights[name] for name in self.average], 1 - decay)

    def agreed(self, wanted: bool) -> bool:
        """What the first process wants."""
        return wanted

    def run(
        self,
        until: int | None = None,
        every: float = 120.0,
        tell: Callable[[Progress], None] = lambda progress: None,
        look: Callable[["Trainer"], dict[str, float]] = lambda trainer: {},
    ) -> None:
        """Trains to the recipe's end (or to step `until`), with a checkpoint every `every` seconds and at the end.

        All processes `look` after every step; the first one's scores go into the log.
        """
        last, began, first, before = time.monotonic(), time.monotonic(), self.step, self.seconds
        until = self.recipe.steps if until is None else min(until, self.recipe.steps)
        with Log(self.folder / "log.jsonl", self.step) if self.first else NoLog() as log:
            while self.step < until:
                started = time.monotonic()
                losses = self.advance()
                seconds = time.monotonic() - started
                scores = look(self)
                log.write(self.step, losses | scores)
                now = time.monotonic()
                self.seconds = before + now - began
                left = (now - began) / (self.step - first) * (until - self.step)
                tell(Progress(self.step, until, losses, left, seconds, scores))
                if self.agreed(now - last > every):
                    log.file.flush()  # else a killed run goes on from a step that its log has not come to
                    self.save()
                    last = now
        self.finish()

    def finish(self) -> None:
        self.save()

    def averages(self) -> Iterable[tuple[str, Tensor]]:
        """The averaged weights, whole, by their names; none where the recipe has no average."""
        return self.average.items()

    def averaged(self) -> nn.Module:
        """The model with its averaged weights in place (for use after training; the run's own are in the file)."""
        parameters = dict(self.recipe.model.named_parameters())
        with torch.no_grad():
            for name, value in self.averages():
                parameters[name].copy_(value)
        return self.recipe.model

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The model to be used in between: averaged, in evaluation mode, without gradients; afterwards all is as it
        was, random numbers too."""
        model, cuda = self.recipe.model, self.recipe.device.type == "cuda"
        modes = [(part, part.training) for part in model.modules()]
        # On the CPU: a GPU may have no room for them.
        own = [(one, one.detach().to("cpu", copy=True)) for _, one in self.named] if self.recipe.ema else []
        with torch.no_grad(), torch.random.fork_rng([self.recipe.device] if cuda else []), products(self.recipe):
            try:
                self.averaged().eval()
                yield
            finally:
                for weight, value in own:
                    weight.copy_(value)
                for part, mode in modes:
                    part.training = mode


@contextmanager
def products(recipe: Recipe) -> Iterator[None]:
    """Matrix products in the recipe's precision."""
    bf16 = recipe.precision == torch.bfloat16
    with torch.autocast(recipe.device.type, torch.bfloat16, enabled=bf16), attending(recipe):
        yield


def attending(recipe: Recipe) -> AbstractContextManager:
    """The kernels of attention: in backward passes as well, where checkpointing computes it again."""
    # The fused attention takes four times as long backwards in bf16 on a CPU (torch 2.13).
    plain = recipe.precision == torch.bfloat16 and recipe.device.type == "cpu"
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def fill_gradients(named: Named) -> None:
    """Zeros where a batch does not touch a parameter (a source's, where none is edited): AdamW over flat parts of
    all weights cannot leave one out, so it does not anywhere."""
    for _, parameter in named:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def recompute(model: nn.Module) -> None:
    """Keeps only the inputs of the decoder's blocks and of the vision head, and computes them again for gradients."""
    for part in model.modules():
        if isinstance(part, WanTransformer3DModel):
            part.enable_gradient_checkpointing()
        if isinstance(part, VisionHead):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)  # type: ignore[method-assign]


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


class NoLog(Log):
    """Where another process writes the log."""

    def __init__(self) -> None:
        self.file = open(os.devnull, "a")  # noqa: SIM115


def read_lines(path: Path) -> Iterable[str]:
    """Whole lines only: the last one of a killed run may be cut."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()

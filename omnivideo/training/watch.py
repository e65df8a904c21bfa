"""What a run shows while it runs: speed, memory, TensorBoard and Weights & Biases, and hooks every so many steps.

Shares of the peak (MFU) count the model's own FLOPs, attention with them, and nothing that is computed again; they
are shown where the recipe knows its FLOPs and the device's peak is known.
"""

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omnivideo.errors import InvalidInput, NotInstalled
from omnivideo.training.flops import GPUS
from omnivideo.training.trainer import Progress, Recipe

Tell = Callable[[Progress], None]
KINDS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class Speed:
    """Of one step, over all processes; what is not known is None."""

    samples: float | None
    flops: float | None
    share: float | None
    memory: float  # bytes, at most so far, of this process

    def figures(self) -> dict[str, float]:
        """By the names they are shown under."""
        named = {"samples/s": self.samples, "TFLOP/s": self.flops and self.flops / 1e12, "MFU": self.share}
        return {name: value for name, value in named.items() if value} | {"GB": self.memory / 1e9}


def peak_of(device: str) -> float | None:
    """The bf16 peak of a device in FLOP/s: of the card all parts of whose name are in the device's; the longest."""
    found = [name for name in GPUS if all(part in device for part in name.split("-"))]
    return GPUS[max(found, key=len)].tflops * 1e12 if found else None


def speed(recipe: Recipe, progress: Progress, processes: int) -> Speed:
    at = progress.step - 1
    samples = recipe.samples(at)
    flops = recipe.flops(at) / progress.seconds if recipe.flops else None
    cuda = recipe.device.type == "cuda"
    peak = peak_of(torch.cuda.get_device_name(recipe.device)) if cuda else None
    share = flops / (peak * processes) if flops and peak else None
    return Speed(samples / progress.seconds if samples else None, flops, share, memory(recipe.device))


def memory(device: torch.device) -> float:
    """The most that was in use so far, in bytes: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts it in KiB


def line(progress: Progress, figures: dict[str, float]) -> str:
    """Losses and speed in one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in (progress.losses | figures).items())


def tensorboard(folder: Path, recipe: Recipe) -> Callable[[int, dict[str, float]], None]:
    """Writes scalars to `<run>/tensorboard`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise NotInstalled("--watch tensorboard needs it: pip install omnivideo[train]") from None
    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def wandb(folder: Path, recipe: Recipe) -> Callable[[int, dict[str, float]], None]:
    """Logs to the project "omnivideo", or to a folder where WANDB_MODE is offline; a run goes on under its name."""
    try:
        import wandb as library
    except ImportError:
        raise NotInstalled("--watch wandb needs it: pip install wandb") from None
    run: Any = library.init(project="omnivideo", name=recipe.name, id=recipe.name, resume="allow", dir=folder)
    return lambda step, figures: run.log(figures, step=step)


Watch = Callable[[Path, Recipe], list[Callable[[int, dict[str, float]], None]]]


def watchers(kinds: Sequence[str]) -> Watch:
    """Makes the writers of the kinds named, for a run; raises InvalidInput for other kinds."""
    for kind in kinds:
        if kind not in KINDS:
            raise InvalidInput("watch", f"{kind!r} is not one of {', '.join(KINDS)}")
    makers = {"tensorboard": tensorboard, "wandb": wandb}
    return lambda folder, recipe: [makers[kind](folder, recipe) for kind in dict.fromkeys(kinds)]


def every(steps: int, hook: Callable[[int], None]) -> Tell:
    """Calls a hook with the step, every so many steps: an evaluation, a sample grid."""

    def tell(progress: Progress) -> None:
        if progress.step % steps == 0:
            hook(progress.step)

    return tell

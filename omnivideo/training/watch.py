"""What a run shows while it runs: speed, memory, TensorBoard and Weights & Biases, and a look at its samples.

Shares of the peak (MFU) count the model's own FLOPs, attention with them, and nothing that is computed again; they
are shown where the recipe knows its FLOPs and the device's peak is known.
"""

import resource
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omnivideo.errors import InvalidInput, NotInstalled
from omnivideo.models.omni import Omni
from omnivideo.training.flops import GPUS
from omnivideo.training.loading import KEPT, bring
from omnivideo.training.trainer import Progress, Recipe, Trainer

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


Write = Callable[[int, dict[str, float]], None]


def tensorboard(folder: Path, recipe: Recipe, step: int) -> Write:
    """Writes scalars to `<run>/tensorboard`; what a killed run wrote after `step` is no longer shown."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise NotInstalled("--watch tensorboard needs it: pip install omnivideo[train]") from None
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def wandb(folder: Path, recipe: Recipe, step: int) -> Write:
    """Logs to the project "omnivideo", or to a folder where WANDB_MODE is offline; `<run>/wandb-id` keeps the id under
    which the run goes on."""
    try:
        import wandb as library
    except ImportError:
        raise NotInstalled("--watch wandb needs it: pip install wandb") from None
    kept = folder / "wandb-id"
    if not kept.exists():
        kept.write_text(secrets.token_hex(8))
    run: Any = library.init(project="omnivideo", name=recipe.name, id=kept.read_text(), resume="allow", dir=folder)
    return lambda step, figures: run.log(figures, step=step)


Watch = Callable[[Path, Recipe, int], list[Write]]


def watchers(kinds: Sequence[str]) -> Watch:
    """Makes the writers of the kinds named, for a run that is at a step; raises InvalidInput for other kinds."""
    for kind in kinds:
        if kind not in KINDS:
            raise InvalidInput("watch", f"{kind!r} is not one of {', '.join(KINDS)}")
    makers = {"tensorboard": tensorboard, "wandb": wandb}
    return lambda folder, recipe, step: [makers[kind](folder, recipe, step) for kind in dict.fromkeys(kinds)]


# ---------------------------------------------------------------- samples

DRAWN = "drawn right"  # of the scores the one that stays on the progress line
Draw = Callable[[Omni, Path | None], dict[str, float]]
Look = Callable[[Trainer], dict[str, float]]


def blind(trainer: Trainer) -> dict[str, float]:
    """Looks at nothing."""
    return {}


@contextmanager
def together(omni: Omni) -> Iterator[Omni]:
    """All parts on one device; those that training does without go back to where they lay."""
    places = {name: next(getattr(omni, name).parameters()).device for name in KEPT}
    try:
        yield bring(omni)
    finally:
        for name, place in places.items():
            getattr(omni, name).to(place)


def every(steps: int, draw: Draw) -> Look:
    """Has the model as it stands drawn with every so many steps, to `<run>/samples/STEP.png`, and returns the scores.

    All processes draw the same, since averages and tokens may be dealt out among them; the first writes it down, the
    others are given no path.
    """

    def look(trainer: Trainer) -> dict[str, float]:
        omni = trainer.recipe.omni
        if omni is None or trainer.step % steps:
            return {}
        with trainer.paused(), together(omni):
            return draw(omni, trainer.folder / "samples" / f"{trainer.step:08}.png" if trainer.first else None)

    return look

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

from omnivideo.errors import InvalidInput, MissingDependency
from omnivideo.models.omni import OmniVideoModel
from omnivideo.training.engine.placement import CPU_PARTS, move_cpu_parts_to_device
from omnivideo.training.engine.recipe import Recipe
from omnivideo.training.engine.trainer import Trainer, TrainingProgress
from omnivideo.training.planning.gpus import find_peak_flops

METRIC_WRITERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class Throughput:
    """Of one step, over all processes; what is not known is None."""

    samples_per_second: float | None
    flops_per_second: float | None
    mfu: float | None
    peak_memory_bytes: float  # bytes, at most so far, of this process

    def to_metrics(self) -> dict[str, float]:
        """By the names they are shown under."""
        named = {
            "samples/s": self.samples_per_second,
            "TFLOP/s": self.flops_per_second and self.flops_per_second / 1e12,
            "MFU": self.mfu,
        }
        return {name: value for name, value in named.items() if value} | {"GB": self.peak_memory_bytes / 1e9}


def measure_throughput(recipe: Recipe, progress: TrainingProgress, processes: int) -> Throughput:
    index = progress.step - 1
    samples = recipe.batch_size(index)
    flops = recipe.step_flops(index) / progress.step_seconds if recipe.step_flops else None
    cuda = recipe.device.type == "cuda"
    peak = find_peak_flops(torch.cuda.get_device_name(recipe.device)) if cuda else None
    mfu = flops / (peak * processes) if flops and peak else None
    return Throughput(
        samples / progress.step_seconds if samples else None, flops, mfu, measure_peak_memory(recipe.device)
    )


def measure_peak_memory(device: torch.device) -> float:
    """The most that was in use so far, in bytes: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts it in KiB


def format_progress_line(progress: TrainingProgress, metrics: dict[str, float]) -> str:
    """Losses and speed in one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in (progress.losses | metrics).items())


MetricWriter = Callable[[int, dict[str, float]], None]


def open_tensorboard(folder: Path, recipe: Recipe, step: int) -> MetricWriter:
    """Writes scalars to `<run>/tensorboard`; what a killed run wrote after `step` is no longer shown."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependency("--log-to tensorboard needs it: pip install omnivideo[train]") from None
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write_scalars(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write_scalars


def open_wandb(folder: Path, recipe: Recipe, step: int) -> MetricWriter:
    """Logs to the project "omnivideo", or to a folder where WANDB_MODE is offline; `<run>/wandb-id` keeps the id under
    which the run goes on."""
    try:
        import wandb as library
    except ImportError:
        raise MissingDependency("--log-to wandb needs it: pip install wandb") from None
    id_file = folder / "wandb-id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8))
    run: Any = library.init(project="omnivideo", name=recipe.name, id=id_file.read_text(), resume="allow", dir=folder)
    return lambda step, metrics: run.log(metrics, step=step)


MetricWriterFactory = Callable[[Path, Recipe, int], list[MetricWriter]]


def build_writer_factory(kinds: Sequence[str]) -> MetricWriterFactory:
    """Makes the writers of the kinds named, for a run that is at a step; raises InvalidInput for other kinds."""
    for kind in kinds:
        if kind not in METRIC_WRITERS:
            raise InvalidInput("log-to", f"{kind!r} is not one of {', '.join(METRIC_WRITERS)}")
    openers = {"tensorboard": open_tensorboard, "wandb": open_wandb}
    return lambda folder, recipe, step: [openers[kind](folder, recipe, step) for kind in dict.fromkeys(kinds)]


# ---------------------------------------------------------------- samples

OVERALL_SCORE = "drawn right"  # of the scores the one that stays on the progress line
SampleRenderer = Callable[[OmniVideoModel, Path | None], dict[str, float]]
SampleHook = Callable[[Trainer], dict[str, float]]


def skip_samples(trainer: Trainer) -> dict[str, float]:
    """Looks at nothing."""
    return {}


@contextmanager
def all_parts_on_one_device(omni: OmniVideoModel) -> Iterator[OmniVideoModel]:
    """All parts on one device; those that training does without go back to where they lay."""
    devices = {name: next(getattr(omni, name).parameters()).device for name in CPU_PARTS}
    try:
        yield move_cpu_parts_to_device(omni)
    finally:
        for name, device in devices.items():
            getattr(omni, name).to(device)


def build_sample_hook(interval_steps: int, render_samples: SampleRenderer) -> SampleHook:
    """Has the model as it stands drawn with every so many steps, to `<run>/samples/STEP.png`, and returns the scores.

    All processes draw the same, since averages and tokens may be dealt out among them; the first writes it down, the
    others are given no path.
    """

    def sample_hook(trainer: Trainer) -> dict[str, float]:
        omni = trainer.recipe.omni
        if omni is None or trainer.step % interval_steps:
            return {}
        with trainer.evaluation_mode(), all_parts_on_one_device(omni):
            scores = render_samples(
                omni, trainer.folder / "samples" / f"{trainer.step:08}.png" if trainer.is_main_process else None
            )
        return scores | ({OVERALL_SCORE: sum(scores.values()) / len(scores)} if scores else {})

    return sample_hook

"""Monitoring of a run: throughput, memory, TensorBoard and Weights & Biases, and generated samples.

MFU counts the model's operations including attention, but not those that checkpointing repeats. It is shown if the
recipe knows its operations and the device's peak is known.
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
    """The throughput of one step over all processes; unknown values are None.

    `peak_memory_bytes` is the maximum of this process so far.
    """

    samples_per_second: float | None
    flops_per_second: float | None
    mfu: float | None
    peak_memory_bytes: float

    def to_metrics(self) -> dict[str, float]:
        """Return the known values under the names that are shown."""
        metrics = {
            "samples/s": self.samples_per_second,
            "TFLOP/s": self.flops_per_second and self.flops_per_second / 1e12,
            "MFU": self.mfu,
        }
        return {name: value for name, value in metrics.items() if value} | {"GB": self.peak_memory_bytes / 1e9}


def measure_throughput(recipe: Recipe, progress: TrainingProgress, processes: int) -> Throughput:
    """Return the throughput of the step that `progress` reports."""
    index = progress.step - 1
    samples = recipe.batch_size(index)
    flops = recipe.step_flops(index) / progress.step_seconds if recipe.step_flops else None
    is_cuda = recipe.device.type == "cuda"
    peak = find_peak_flops(torch.cuda.get_device_name(recipe.device)) if is_cuda else None
    mfu = flops / (peak * processes) if flops and peak else None
    return Throughput(
        samples / progress.step_seconds if samples else None, flops, mfu, measure_peak_memory(recipe.device)
    )


def measure_peak_memory(device: torch.device) -> float:
    """Return the maximum memory of the GPU, or else of the process, so far in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts it in KiB


def format_progress_line(progress: TrainingProgress, metrics: dict[str, float]) -> str:
    """Return losses and metrics as one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in (progress.losses | metrics).items())


MetricWriter = Callable[[int, dict[str, float]], None]


def open_tensorboard(folder: Path, recipe: Recipe, step: int) -> MetricWriter:
    """Return a writer to `<run>/tensorboard`; what a killed run wrote after `step` is no longer shown."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependency("--log-to tensorboard needs TensorBoard: pip install omnivideo[train]") from None
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write_scalars(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write_scalars


def open_wandb(folder: Path, recipe: Recipe, step: int) -> MetricWriter:
    """Return a writer to the W&B project "omnivideo", or to a folder if WANDB_MODE is offline.

    The file `<run>/wandb-id` keeps the id, so that a resumed run continues the same W&B run.
    """
    try:
        import wandb as library
    except ImportError:
        raise MissingDependency("--log-to wandb needs Weights & Biases: pip install wandb") from None
    id_file = folder / "wandb-id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8))
    run: Any = library.init(project="omnivideo", name=recipe.name, id=id_file.read_text(), resume="allow", dir=folder)
    return lambda step, metrics: run.log(metrics, step=step)


MetricWriterFactory = Callable[[Path, Recipe, int], list[MetricWriter]]


def build_writer_factory(kinds: Sequence[str]) -> MetricWriterFactory:
    """Return a function that opens writers of these kinds for a run at a step; raise InvalidInput for unknown kinds."""
    for kind in kinds:
        if kind not in METRIC_WRITERS:
            raise InvalidInput("log-to", f"{kind!r} is not one of {', '.join(METRIC_WRITERS)}")
    openers = {"tensorboard": open_tensorboard, "wandb": open_wandb}
    return lambda folder, recipe, step: [openers[kind](folder, recipe, step) for kind in dict.fromkeys(kinds)]


# ---------------------------------------------------------------- samples

OVERALL_SCORE = "samples correct"  # the score that stays on the progress line
SampleRenderer = Callable[[OmniVideoModel, Path | None], dict[str, float]]
SampleHook = Callable[[Trainer], dict[str, float]]


def skip_samples(trainer: Trainer) -> dict[str, float]:
    """Generate no samples and return no scores."""
    return {}


@contextmanager
def all_parts_on_one_device(omni: OmniVideoModel) -> Iterator[OmniVideoModel]:
    """Keep all models on one device; afterwards move back those that training does not need there."""
    devices = {name: next(getattr(omni, name).parameters()).device for name in CPU_PARTS}
    try:
        yield move_cpu_parts_to_device(omni)
    finally:
        for name, device in devices.items():
            getattr(omni, name).to(device)


def build_sample_hook(interval_steps: int, render_samples: SampleRenderer) -> SampleHook:
    """Return a hook that generates samples every `interval_steps` steps and returns their scores.

    All processes generate the same samples, because averages and tokens may be distributed over them. The main process
    writes them to `<run>/samples/STEP.png`; the others pass no path.
    """

    def sample_hook(trainer: Trainer) -> dict[str, float]:
        omni = trainer.recipe.omni
        if omni is None or trainer.step % interval_steps:
            return {}
        with trainer.evaluation_mode(), all_parts_on_one_device(omni):
            path = trainer.folder / "samples" / f"{trainer.step:08}.png"
            scores = render_samples(omni, path if trainer.is_main_process else None)
        return scores | ({OVERALL_SCORE: sum(scores.values()) / len(scores)} if scores else {})

    return sample_hook

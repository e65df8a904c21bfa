"""A training run of any preset: the folders of its checkpoints, and the training of a recipe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from omnivideo.errors import CheckpointError
from omnivideo.training.config import TrainingConfig
from omnivideo.training.engine.checkpoint import STATE_FILE_NAME
from omnivideo.training.engine.distributed.processes import ProcessContext
from omnivideo.training.engine.monitor import (
    OVERALL_SCORE,
    SampleHook,
    SampleRenderer,
    build_sample_hook,
    build_writer_factory,
    format_progress_line,
    measure_throughput,
    skip_samples,
)
from omnivideo.training.engine.plots import plot_losses
from omnivideo.training.engine.progress_bar import LoggedProgress
from omnivideo.training.engine.recipe import Recipe
from omnivideo.training.engine.trainer import PRECISIONS, Trainer, TrainingProgress

SINGLE_PROCESS = ProcessContext()


@dataclass(frozen=True)
class RunContext:
    """A configuration with the processes and the console that it runs with; the same for every preset.

    `render_samples` generates the samples that `config.sample_every` requests.
    """

    config: TrainingConfig
    processes: ProcessContext = SINGLE_PROCESS
    console: Console = field(default_factory=Console)
    render_samples: SampleRenderer | None = None

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)

    def get_folder(self, recipe_name: str) -> Path:
        """Return the folder of a recipe's run."""
        return self.config.runs / recipe_name

    def has_run(self, recipe_name: str) -> bool:
        """Return True if a recipe has a checkpoint."""
        return (self.get_folder(recipe_name) / STATE_FILE_NAME).exists()

    def get_state_file(self, recipe_name: str) -> Path:
        """Return the checkpoint of a recipe; raise CheckpointError if there is none."""
        if not self.has_run(recipe_name):
            raise CheckpointError(f"recipe {recipe_name} has not been trained yet: omnivideo train {recipe_name}")
        return self.get_folder(recipe_name) / STATE_FILE_NAME

    def build_and_train(self, build_recipe: Callable[[], Recipe]) -> None:
        """Build a recipe, first in the main process, which may fill caches for the others, and train it."""
        with self.processes.main_process_first():
            recipe = self.apply_config(build_recipe())
        self.train_recipe(recipe)

    def apply_config(self, recipe: Recipe) -> Recipe:
        """Return a recipe with the configuration's values, and with a compiled decoder if the configuration says so."""
        config = self.config
        if config.compiled:
            compile_decoder(recipe.model)
        changes: dict[str, Any] = {
            "optimizer": config.optimizer,
            "checkpointing": config.checkpointing,
            "steps": config.steps,
            "precision": PRECISIONS[config.precision] if config.precision else None,
        }
        return replace(
            recipe,
            device=self.device,
            lr=recipe.lr * config.lr_scale,
            adam_lr=recipe.adam_lr * config.lr_scale,
            **{name: value for name, value in changes.items() if value is not None},
        )

    def train_recipe(self, recipe: Recipe) -> None:
        """Train a recipe to its end, or to the step that the configuration names, and plot its losses.

        The main process shows the progress, in a file as lines, and writes the metrics.
        """
        config, folder = self.config, self.get_folder(recipe.name)
        trainer = self.processes.create_trainer(recipe, folder)
        if not self.processes.is_main_process:
            trainer.run(config.stop_at_step, config.save_every, sample_hook=self.sample_hook)
            return
        self.print_trainable_parts(trainer)
        columns = (
            TextColumn(recipe.name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )  # fmt: skip
        with LoggedProgress(*columns, console=self.console) as bar:
            row = bar.add_task("", total=recipe.steps, completed=trainer.step)
            writers = build_writer_factory(config.log_to)(folder, recipe, trainer.step)
            last_scores: dict[str, float] = {}

            def show_progress(progress: TrainingProgress) -> None:
                metrics = measure_throughput(recipe, progress, self.processes.world_size).to_metrics()
                last_scores.update((name, value) for name, value in progress.scores.items() if name == OVERALL_SCORE)
                line = format_progress_line(progress, last_scores | metrics)
                bar.update(row, completed=progress.step, description=line)
                for write in writers:
                    write(progress.step, progress.losses | progress.scores | metrics)

            trainer.run(config.stop_at_step, config.save_every, show_progress, self.sample_hook)
        plot_losses(folder / "log.jsonl", folder / "loss.png", recipe.name)

    @contextmanager
    def show_preparation(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Show how much of something is prepared before a recipe's first step; in a file as lines.

        The callback takes the number done and the total. A bar appears with its first call, and another one when the
        number starts again.
        """
        columns = (
            TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        )  # fmt: skip
        with LoggedProgress(*columns, console=self.console) as bar:

            def on_progress(done: int, total: int) -> None:
                if not bar.tasks or done < bar.tasks[-1].completed:
                    bar.add_task("", total=total)
                bar.update(bar.tasks[-1].id, completed=done)

            yield on_progress

    @property
    def sample_hook(self) -> SampleHook:
        if self.config.sample_every is None or self.render_samples is None:
            return skip_samples
        return build_sample_hook(self.config.sample_every, self.render_samples)

    def print_trainable_parts(self, trainer: Trainer) -> None:
        count = sum(parameter.numel() for _, parameter in trainer.trainable_parameters)
        parts = sorted({".".join(name.split(".")[:2]) for name, _ in trainer.trainable_parameters})
        self.console.print(f"[bold]{trainer.recipe.name}[/bold]: {count:,} trainable weights in {', '.join(parts)}")


def compile_decoder(model: nn.Module) -> None:
    """Compile the blocks of a model's decoder, if it has one: they share one compiled block."""
    for module in model.modules():
        if isinstance(module, WanTransformer3DModel):
            module.compile_repeated_blocks()

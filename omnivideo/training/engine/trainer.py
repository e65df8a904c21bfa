"""The training loop: steps, progress, checkpoints and resuming.

A recipe's loss is a function of the step alone, because its data, noise and dropout come from a generator that is
seeded with the recipe's name and the step. So a run that was killed resumes from its checkpoint with the same losses.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from omnivideo.errors import CheckpointError, TrainingDiverged
from omnivideo.models.bridge import VisionHead
from omnivideo.training.engine.checkpoint import (
    STATE_FILE_NAME,
    Checkpoint,
    find_latest_checkpoint,
    load_optimizer_state,
    write_state_file,
)
from omnivideo.training.engine.data_parallel import SINGLE_RANK, use_rank
from omnivideo.training.engine.optim import (
    NamedParameters,
    build_optimizers,
    group_names_by_optimizer,
    set_lr_scale,
)
from omnivideo.training.engine.recipe import Losses, Recipe, average_losses, step_seed

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class TrainingProgress:
    """The state of a run after a step; `scores` are those of samples that were generated after it."""

    step: int
    total_steps: int
    losses: dict[str, float]
    eta_seconds: float
    step_seconds: float
    scores: dict[str, float] = field(default_factory=dict)


def freeze_except(model: nn.Module, prefixes: tuple[str, ...]) -> NamedParameters:
    """Make exactly the parameters under the given prefixes trainable, and return them by name."""
    trainable_parameters = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(prefix) for prefix in prefixes))
        if parameter.requires_grad:
            trainable_parameters.append((name, parameter))
    missing = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name, _ in trainable_parameters)]
    assert not missing, f"no parameter has a name that starts with {missing}"
    return trainable_parameters


class Trainer:
    """Trains a recipe in its folder, `<runs>/<recipe>/`, with state.pt, log.jsonl and loss.png.

    The trainers in distributed/ do so with several processes; they hold other parts and update them differently.
    """

    data_parallel_rank = SINGLE_RANK
    is_main_process = True  # the process that writes the log and reports progress

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe = recipe
        self.folder = folder
        self.step = 0
        self.trained_seconds = 0.0  # over all runs in this folder
        self.trainable_parameters = freeze_except(recipe.model.to(recipe.device), recipe.trainable)
        if recipe.checkpointing:
            enable_checkpointing(recipe.model)
        self.set_up_optimizers()
        folder.mkdir(parents=True, exist_ok=True)
        names = group_names_by_optimizer(self.trainable_parameters, recipe.optimizer)
        checkpoint = find_latest_checkpoint(folder, names)
        if checkpoint:
            self.resume_from(checkpoint)

    def set_up_optimizers(self) -> None:
        """Build the optimizers and the averages of the parameters that this process updates."""
        self.local_parameters = self.trainable_parameters
        self.optimizers = self.create_optimizers(self.local_parameters)
        self.track_ema(self.local_parameters)

    def create_optimizers(self, parameters: NamedParameters) -> list[torch.optim.Optimizer]:
        recipe = self.recipe
        return build_optimizers(parameters, recipe.lr, recipe.adam_lr, recipe.weight_decay, recipe.optimizer)

    def track_ema(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Average these weights if the recipe has an average."""
        self.weights = {name: weight.detach() for name, weight in parameters}
        self.ema_weights = (
            {name: weight.clone() for name, weight in self.weights.items()} if self.recipe.ema_decay else {}
        )

    @property
    def state_file(self) -> Path:
        return self.folder / STATE_FILE_NAME

    def resume_from(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint; raise CheckpointError if it was written with different parameters or data."""
        if checkpoint.parameter_names != [name for name, _ in self.trainable_parameters]:
            raise CheckpointError(f"the checkpoint of {self.recipe.name} trains different parameters from the recipe")
        if checkpoint.data_digest != self.recipe.data_digest:
            raise CheckpointError("data: the checkpoint was made with other samples or buckets, or with another mix")
        self.step, self.trained_seconds = checkpoint.step, checkpoint.trained_seconds
        self.restore_state(checkpoint)

    def restore_state(self, checkpoint: Checkpoint) -> None:
        self.recipe.model.load_state_dict(checkpoint.read_model_state(self.recipe.model))
        for optimizer, names in zip(
            self.optimizers, group_names_by_optimizer(self.local_parameters, self.recipe.optimizer), strict=True
        ):
            load_optimizer_state(optimizer, names, checkpoint)
        for name, value in self.ema_weights.items():
            tensor = checkpoint.read_tensor(name, "average")
            value.copy_(tensor.view_as(value) if tensor is not None else value)

    def save(self) -> None:
        state = {
            "names": [name for name, _ in self.trainable_parameters],
            "model": self.recipe.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.ema_weights,
            "step": self.step,
            "seconds": self.trained_seconds,
            "data": self.recipe.data_digest,
        }
        write_state_file(state, self.state_file)

    def train_step(self) -> dict[str, float]:
        """Take one step and return its losses; raise TrainingDiverged if the loss or its gradient is not finite."""
        recipe = self.recipe
        torch.manual_seed(step_seed(recipe.name, self.step))
        set_lr_scale(self.optimizers, recipe.lr_scale(self.step))
        losses = self.accumulate_gradients()
        norm = self.update_weights()
        self.update_ema()
        self.step += 1
        mean_losses = self.data_parallel_rank.average_losses({name: float(value) for name, value in losses.items()})
        for name, value in (("loss", mean_losses["loss"]), ("gradient's norm", float(norm))):
            if not isfinite(value):
                raise TrainingDiverged(
                    f"{name}: {value} at step {self.step}; resume from the last checkpoint with a lower --lr-scale"
                )
        return mean_losses

    def accumulate_gradients(self) -> Losses:
        """Compute the gradients of this process's part of the batch by micro-batches, and return its losses."""
        recipe, micro_batch_losses = self.recipe, list[Losses]()
        with use_rank(self.data_parallel_rank), attention_backend(recipe):
            with autocast_context(recipe):
                pending = list(recipe.micro_batch_losses(self.step))
            count = len(pending)
            while pending:
                compute_loss = pending.pop(0)  # so that its samples are freed after use
                with autocast_context(recipe):
                    losses = compute_loss()
                self.backward(losses["loss"] / count, count > 1)
                micro_batch_losses.append({name: value.detach() for name, value in losses.items()})
        return average_losses(micro_batch_losses)

    def backward(self, loss: Tensor, is_accumulating: bool) -> None:
        """Add the gradients of a micro-batch; `is_accumulating` is True if the step has several."""
        loss.backward()  # type: ignore[no-untyped-call]

    def update_weights(self) -> Tensor | float:
        """Clip the gradients, update the weights, and return the norm of the gradients before clipping."""
        if self.recipe.optimizer == "adamw":
            fill_missing_gradients(self.trainable_parameters)
        norm = nn.utils.clip_grad_norm_(
            [parameter for _, parameter in self.trainable_parameters], self.recipe.max_grad_norm
        )
        self.step_optimizers()
        return norm

    def step_optimizers(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update_ema(self) -> None:
        if not self.ema_weights:
            return
        # Early in a run the average follows closely, so that the random initial weights soon lose their influence.
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(
            list(self.ema_weights.values()), [self.weights[name] for name in self.ema_weights], 1 - decay
        )

    def broadcast_decision(self, decision: bool) -> bool:
        """Return the decision of the main process."""
        return decision

    def run(
        self,
        stop_at_step: int | None = None,
        save_every_seconds: float = 120.0,
        on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
        sample_hook: Callable[["Trainer"], dict[str, float]] = lambda trainer: {},
    ) -> None:
        """Train to the end of the recipe, or to a step, and save every `save_every_seconds` and at the end.

        All processes call `sample_hook` after every step; the main process logs its scores.
        """
        last_save = run_start = time.monotonic()
        first_step, seconds_before = self.step, self.trained_seconds
        stop_at_step = self.recipe.steps if stop_at_step is None else min(stop_at_step, self.recipe.steps)
        with TrainingLog(self.folder / "log.jsonl", self.step) if self.is_main_process else NullTrainingLog() as log:
            while self.step < stop_at_step:
                step_start = time.monotonic()
                losses = self.train_step()
                step_seconds = time.monotonic() - step_start
                scores = sample_hook(self)
                log.write(self.step, losses | scores)
                now = time.monotonic()
                self.trained_seconds = seconds_before + now - run_start
                eta_seconds = (now - run_start) / (self.step - first_step) * (stop_at_step - self.step)
                on_progress(TrainingProgress(self.step, stop_at_step, losses, eta_seconds, step_seconds, scores))
                if self.broadcast_decision(now - last_save > save_every_seconds):
                    log.file.flush()  # otherwise the log of a killed run could end before its checkpoint
                    self.save()
                    last_save = now
        self.finish_run()

    def finish_run(self) -> None:
        self.save()

    def iter_ema_weights(self) -> Iterable[tuple[str, Tensor]]:
        """Return the full averaged weights by name; there are none if the recipe has no average."""
        return self.ema_weights.items()

    def apply_ema_weights(self) -> nn.Module:
        """Copy the averaged weights into the model and return it.

        Training must not continue from it; the weights of the run are in its checkpoint.
        """
        parameters = dict(self.recipe.model.named_parameters())
        with torch.no_grad():
            for name, value in self.iter_ema_weights():
                parameters[name].copy_(value)
        return self.recipe.model

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Use the model during training: averaged, in evaluation mode, without gradients.

        Afterwards weights, modes and the state of the random generators are restored.
        """
        model, is_cuda = self.recipe.model, self.recipe.device.type == "cuda"
        modes = [(module, module.training) for module in model.modules()]
        # They are copied to the CPU because a GPU may not have enough free memory.
        original_values = (
            [(parameter, parameter.detach().to("cpu", copy=True)) for _, parameter in self.trainable_parameters]
            if self.recipe.ema_decay
            else []
        )
        with (
            torch.no_grad(),
            torch.random.fork_rng([self.recipe.device] if is_cuda else []),
            autocast_context(self.recipe),
        ):
            try:
                self.apply_ema_weights().eval()
                yield
            finally:
                for weight, value in original_values:
                    weight.copy_(value)
                for module, mode in modes:
                    module.training = mode


@contextmanager
def autocast_context(recipe: Recipe) -> Iterator[None]:
    """Compute matrix products in the recipe's precision."""
    is_bf16 = recipe.precision == torch.bfloat16
    with torch.autocast(recipe.device.type, torch.bfloat16, enabled=is_bf16), attention_backend(recipe):
        yield


def attention_backend(recipe: Recipe) -> AbstractContextManager[None]:
    """Return a context that selects the attention kernels.

    It must cover backward passes as well, because checkpointing computes attention again there.
    """
    # In bf16 on a CPU, the backward pass of fused attention takes four times as long (torch 2.13).
    use_math_kernel = recipe.precision == torch.bfloat16 and recipe.device.type == "cpu"
    return sdpa_kernel(SDPBackend.MATH) if use_math_kernel else nullcontext()


def fill_missing_gradients(parameters: NamedParameters) -> None:
    """Set missing gradients to zero, e.g. those of the visual context in a batch without edits.

    AdamW over flattened weights (ZeRO) cannot skip a parameter, so AdamW in one process does not skip it either.
    """
    for _, parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def enable_checkpointing(model: nn.Module) -> None:
    """Keep only the inputs of the decoder's blocks and of the vision head, and recompute the rest for gradients."""
    for module in model.modules():
        if isinstance(module, WanTransformer3DModel):
            module.enable_gradient_checkpointing()
        if isinstance(module, VisionHead):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


class TrainingLog:
    """A file with one JSON line per step; on resuming, lines after the checkpoint's step are removed."""

    def __init__(self, path: Path, step: int):
        lines = [line for line in read_complete_lines(path) if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in lines))
        self.file = path.open("a")

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def write(self, step: int, losses: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step} | {name: round(value, 6) for name, value in losses.items()}) + "\n")
        if step % 20 == 0:
            self.file.flush()


class NullTrainingLog(TrainingLog):
    """The log of a process that is not the main process: it writes nothing."""

    def __init__(self) -> None:
        self.file = open(os.devnull, "a")  # noqa: SIM115


def read_complete_lines(path: Path) -> Iterable[str]:
    """Return the complete lines of a file; the last line of a killed run may be incomplete."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()

"""The loop that every recipe runs in: progress, checkpoints, resume, loss plots.

A recipe's loss is a function of the step alone (its data, noise and drops are drawn from a generator seeded with
the recipe's name and the step), so a run that was killed goes on from its checkpoint to the same losses.
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
    """Told after every step; `left` and `seconds` (of this step) are in seconds, `scores` of samples drawn after it."""

    step: int
    total_steps: int
    losses: dict[str, float]
    eta_seconds: float
    step_seconds: float
    scores: dict[str, float] = field(default_factory=dict)


def freeze_except(model: nn.Module, prefixes: tuple[str, ...]) -> NamedParameters:
    """Leaves exactly the parameters under the given prefixes trainable, and returns them by name."""
    trainable_parameters = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(prefix) for prefix in prefixes))
        if parameter.requires_grad:
            trainable_parameters.append((name, parameter))
    missing = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name, _ in trainable_parameters)]
    assert not missing, f"no parameter is called {missing}"
    return trainable_parameters


class Trainer:
    """One run of a recipe in its folder (`<runs>/<recipe>/`: state.pt, log.jsonl, loss.png).

    `distributed.py` has its like for several processes, which differ in what they hold and how they step.
    """

    data_parallel_rank = SINGLE_RANK
    is_main_process = True  # the process that writes the log and tells

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe = recipe
        self.folder = folder
        self.step = 0
        self.trained_seconds = 0.0  # of training, in all runs of this folder
        self.trainable_parameters = freeze_except(recipe.model.to(recipe.device), recipe.trainable)
        if recipe.checkpointing:
            enable_checkpointing(recipe.model)
        self.set_up_optimizers()
        folder.mkdir(parents=True, exist_ok=True)
        saved = find_latest_checkpoint(folder, group_names_by_optimizer(self.trainable_parameters, recipe.optimizer))
        if saved:
            self.resume_from(saved)

    def set_up_optimizers(self) -> None:
        """Builds the optimizers, and the averages of what this process holds: here of all."""
        self.local_parameters = self.trainable_parameters
        self.optimizers = self.create_optimizers(self.local_parameters)
        self.track_ema(self.local_parameters)

    def create_optimizers(self, parameters: NamedParameters) -> list[torch.optim.Optimizer]:
        recipe = self.recipe
        return build_optimizers(parameters, recipe.lr, recipe.adam_lr, recipe.weight_decay, recipe.optimizer)

    def track_ema(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Says which weights are averaged here."""
        self.weights = {name: weight.detach() for name, weight in parameters}
        self.ema_weights = (
            {name: weight.clone() for name, weight in self.weights.items()} if self.recipe.ema_decay else {}
        )

    @property
    def state_file(self) -> Path:
        return self.folder / STATE_FILE_NAME

    def resume_from(self, saved: Checkpoint) -> None:
        """Goes on from a checkpoint; raises CheckpointError for one of another recipe."""
        if saved.parameter_names != [name for name, _ in self.trainable_parameters]:
            raise CheckpointError(f"the checkpoint of {self.recipe.name} trains other parameters than the recipe")
        if saved.data_digest != self.recipe.data_digest:
            raise CheckpointError("data: the checkpoint was made with other samples, buckets or another mix")
        self.step, self.trained_seconds = saved.step, saved.trained_seconds
        self.restore_state(saved)

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
        """One optimiser step; returns its losses.  Raises Diverged where the loss or its gradient is not finite."""
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
                    f"{name}: {value} at step {self.step}; the last checkpoint stands, try a lower --lr-scale"
                )
        return mean_losses

    def accumulate_gradients(self) -> Losses:
        """Those of this process's share of the batch, pass by pass; returns its losses."""
        recipe, micro_batch_losses = self.recipe, list[Losses]()
        with use_rank(self.data_parallel_rank), attention_backend(recipe):
            with autocast_context(recipe):
                pending = list(recipe.micro_batch_losses(self.step))
            count = len(pending)
            while pending:
                compute_loss = pending.pop(0)  # its samples are not kept for longer
                with autocast_context(recipe):
                    losses = compute_loss()
                self.backward(losses["loss"] / count, count > 1)
                micro_batch_losses.append({name: value.detach() for name, value in losses.items()})
        return average_losses(micro_batch_losses)

    def backward(self, loss: Tensor, is_accumulating: bool) -> None:
        """Adds a pass's gradients to those of the others, where there are `several`."""
        loss.backward()

    def update_weights(self) -> Tensor | float:
        """Moves the weights down the gradient, whose norm is returned."""
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
        # A young average follows closely, else the random start would stay in it for long.
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(
            list(self.ema_weights.values()), [self.weights[name] for name in self.ema_weights], 1 - decay
        )

    def broadcast_decision(self, decision: bool) -> bool:
        """What the first process wants."""
        return decision

    def run(
        self,
        stop_at_step: int | None = None,
        save_every_seconds: float = 120.0,
        on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
        sample_hook: Callable[["Trainer"], dict[str, float]] = lambda trainer: {},
    ) -> None:
        """Trains to the recipe's end (or to step `until`), with a checkpoint every `every` seconds and at the end.

        All processes `look` after every step; the first one's scores go into the log.
        """
        last_save, run_start, first_step, seconds_before = (
            time.monotonic(),
            time.monotonic(),
            self.step,
            self.trained_seconds,
        )
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
                    log.file.flush()  # else a killed run goes on from a step that its log has not come to
                    self.save()
                    last_save = now
        self.finish_run()

    def finish_run(self) -> None:
        self.save()

    def iter_ema_weights(self) -> Iterable[tuple[str, Tensor]]:
        """The averaged weights, whole, by their names; none where the recipe has no average."""
        return self.ema_weights.items()

    def apply_ema_weights(self) -> nn.Module:
        """The model with its averaged weights in place (for use after training; the run's own are in the file)."""
        parameters = dict(self.recipe.model.named_parameters())
        with torch.no_grad():
            for name, value in self.iter_ema_weights():
                parameters[name].copy_(value)
        return self.recipe.model

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """The model to be used in between: averaged, in evaluation mode, without gradients; afterwards all is as it
        was, random numbers too."""
        model, cuda = self.recipe.model, self.recipe.device.type == "cuda"
        modes = [(module, module.training) for module in model.modules()]
        # On the CPU: a GPU may have no room for them.
        original_values = (
            [(parameter, parameter.detach().to("cpu", copy=True)) for _, parameter in self.trainable_parameters]
            if self.recipe.ema_decay
            else []
        )
        with (
            torch.no_grad(),
            torch.random.fork_rng([self.recipe.device] if cuda else []),
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
    """Matrix products in the recipe's precision."""
    bf16 = recipe.precision == torch.bfloat16
    with torch.autocast(recipe.device.type, torch.bfloat16, enabled=bf16), attention_backend(recipe):
        yield


def attention_backend(recipe: Recipe) -> AbstractContextManager:
    """The kernels of attention: in backward passes as well, where checkpointing computes it again."""
    # The fused attention takes four times as long backwards in bf16 on a CPU (torch 2.13).
    use_math_kernel = recipe.precision == torch.bfloat16 and recipe.device.type == "cpu"
    return sdpa_kernel(SDPBackend.MATH) if use_math_kernel else nullcontext()


def fill_missing_gradients(parameters: NamedParameters) -> None:
    """Zeros where a batch does not touch a parameter (a source's, where none is edited): AdamW over flat parts of
    all weights cannot leave one out, so it does not anywhere."""
    for _, parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def enable_checkpointing(model: nn.Module) -> None:
    """Keeps only the inputs of the decoder's blocks and of the vision head, and computes them again for gradients."""
    for module in model.modules():
        if isinstance(module, WanTransformer3DModel):
            module.enable_gradient_checkpointing()
        if isinstance(module, VisionHead):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


class TrainingLog:
    """One JSON line per step; on resume, lines past the checkpoint are dropped."""

    def __init__(self, path: Path, step: int):
        lines = [line for line in read_complete_lines(path) if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in lines))
        self.file = path.open("a")

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def write(self, step: int, losses: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step} | {k: round(v, 6) for k, v in losses.items()}) + "\n")
        if step % 20 == 0:
            self.file.flush()


class NullTrainingLog(TrainingLog):
    """Where another process writes the log."""

    def __init__(self) -> None:
        self.file = open(os.devnull, "a")  # noqa: SIM115


def read_complete_lines(path: Path) -> Iterable[str]:
    """Whole lines only: the last one of a killed run may be cut."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()

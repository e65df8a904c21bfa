"""Checkpoints: one file from a single process, or one file from each of several processes.

    <run>/state.pt                     one process, full tensors
    <run>/shards/00001200/0-of-2.pt    rank 0 of 2, parts of flattened tensors by the name of the parameter

Both are written under another name and then renamed, so a run that is killed while writing leaves the previous one.
Tensors are read by name and range (`Checkpoint.read_tensor`), so any number of processes can resume from the shards.
The kinds of tensors are "weight", "average", and those of the optimizer ("exp_avg", "momentum_buffer", ...), in fp32.
"""

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from omnivideo.errors import CheckpointError
from omnivideo.training.engine.optim import Muon

STATE_FILE_NAME = "state.pt"
SHARDS_FOLDER_NAME = "shards"
OPTIMIZER_MISMATCH = "the checkpoint was written with a different optimizer from the recipe's"
SHARD_FILE_PATTERN = re.compile(r"(\d+)-of-(\d+)\.pt")


@dataclass
class ParameterShard:
    """A part of one parameter: its flattened tensors from index `start` on, and the steps of its optimizer."""

    name: str
    start: int
    tensors: dict[str, Tensor]
    optimizer_steps: float | None = None


class Checkpoint(Protocol):
    """A checkpoint whose tensors can be read in parts."""

    parameter_names: list[str]
    step: int
    trained_seconds: float
    data_digest: str

    def read_tensor(self, name: str, kind: str, start: int = 0, stop: int | None = None) -> Tensor | None:
        """Return a range of a flattened tensor, or None if the parameter has no tensor of this kind."""

    def list_optimizer_tensors(self, name: str) -> set[str]:
        """Return the kinds of a parameter's optimizer tensors; there are none if it was never updated."""

    def read_optimizer_steps(self, name: str) -> float | None:
        """Return how often Adam updated a parameter, or None if it was never updated or has no such count."""

    def read_model_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return all weights by name; weights that are not in the checkpoint are those of `model`."""


class SingleFileCheckpoint:
    """A state.pt; `names_by_optimizer` lists the parameters in the state of each optimizer."""

    def __init__(self, path: Path, names_by_optimizer: list[list[str]]):
        self.state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        self.parameter_names, self.step = self.state["names"], self.state["step"]
        self.trained_seconds, self.data_digest = self.state.get("seconds", 0.0), self.state.get("data", "")
        self.names_by_optimizer = names_by_optimizer
        if len(names_by_optimizer) != len(self.state["optimizers"]):
            raise CheckpointError(OPTIMIZER_MISMATCH)

    def find_optimizer_state(self, name: str) -> dict[str, Tensor]:
        for names, optimizer_state in zip(self.names_by_optimizer, self.state["optimizers"], strict=True):
            if name in names:
                state: dict[str, Tensor] = optimizer_state["state"].get(names.index(name), {})
                return state
        return {}

    def read_tensor(self, name: str, kind: str, start: int = 0, stop: int | None = None) -> Tensor | None:
        stored = {"weight": self.state["model"].get(name), "average": self.state["average"].get(name)}
        tensor = stored[kind] if kind in stored else self.find_optimizer_state(name).get(kind)
        return None if tensor is None else tensor.flatten()[start:stop]

    def list_optimizer_tensors(self, name: str) -> set[str]:
        return self.find_optimizer_state(name).keys() - {"step"}

    def read_optimizer_steps(self, name: str) -> float | None:
        optimizer_steps = self.find_optimizer_state(name).get("step")
        return None if optimizer_steps is None else float(optimizer_steps)

    def read_model_state(self, model: nn.Module) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state["model"]
        return state


class ShardedCheckpoint:
    """A folder of shards, which are mapped into memory and read on demand."""

    def __init__(self, folder: Path):
        files = [
            torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in list_shard_files(folder)
        ]
        self.parameter_names, self.step, self.trained_seconds = (files[0][key] for key in ("names", "step", "seconds"))
        self.data_digest = files[0].get("data", "")
        self.shards_by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for file in files:
            for name, shard in file["held"].items():
                self.shards_by_name[name].append(shard)

    def read_tensor(self, name: str, kind: str, start: int = 0, stop: int | None = None) -> Tensor | None:
        pieces = [
            (shard["start"], shard["tensors"][kind]) for shard in self.shards_by_name[name] if kind in shard["tensors"]
        ]
        if not pieces:
            return None
        stop = max(begin + len(tensor) for begin, tensor in pieces) if stop is None else stop
        out = torch.zeros(stop - start, dtype=pieces[0][1].dtype)
        for begin, tensor in pieces:
            low, high = max(start, begin), min(stop, begin + len(tensor))
            if low < high:
                out[low - start : high - start] = tensor[low - begin : high - begin]
        return out

    def list_optimizer_tensors(self, name: str) -> set[str]:
        return {kind for shard in self.shards_by_name[name] for kind in shard["tensors"]} - {"weight", "average"}

    def read_optimizer_steps(self, name: str) -> float | None:
        steps: float | None = self.shards_by_name[name][0]["steps"]
        return steps

    def read_model_state(self, model: nn.Module) -> dict[str, Tensor]:
        state = dict(model.state_dict())
        for name in self.parameter_names:
            weight = self.read_tensor(name, "weight")
            assert weight is not None, name
            state[name] = weight.view(state[name].shape)
        return state


def list_shard_files(folder: Path) -> list[Path]:
    """Return the files of all processes; raise CheckpointError if one is missing."""
    files = sorted(path for path in folder.iterdir() if SHARD_FILE_PATTERN.fullmatch(path.name))
    sizes = {path.stem.partition("-of-")[2] for path in files}
    if len(sizes) != 1 or int(sizes.pop()) != len(files):
        raise CheckpointError(f"the shards of step {int(folder.name)} are not complete: {len(files)} files")
    return files


def list_complete_shard_folders(run_folder: Path) -> list[Path]:
    """Return the folders of complete shards of a run, the latest last."""
    return sorted(path for path in (run_folder / SHARDS_FOLDER_NAME).glob("*") if path.name.isdigit())


def find_latest_checkpoint(run_folder: Path, names_by_optimizer: list[list[str]]) -> Checkpoint | None:
    """Return the checkpoint to resume from: the file or the shards, whichever has more steps; None without any."""
    checkpoints: list[Checkpoint] = [ShardedCheckpoint(path) for path in list_complete_shard_folders(run_folder)[-1:]]
    if (run_folder / STATE_FILE_NAME).exists():
        checkpoints.append(SingleFileCheckpoint(run_folder / STATE_FILE_NAME, names_by_optimizer))
    return max(checkpoints, key=lambda checkpoint: checkpoint.step, default=None)


def create_partial_folder(run_folder: Path, step: int) -> None:
    """Create an empty folder for the shards of a step; `commit_shards` makes it valid."""
    folder = partial_folder(run_folder, step)
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed while writing
    folder.mkdir(parents=True)


def step_folder(run_folder: Path, step: int) -> Path:
    return run_folder / SHARDS_FOLDER_NAME / f"{step:08d}"


def partial_folder(run_folder: Path, step: int) -> Path:
    return step_folder(run_folder, step).with_suffix(".partial")


def write_shard(
    run_folder: Path, step: int, rank: int, world_size: int, metadata: dict[str, Any], shards: Iterator[ParameterShard]
) -> None:
    """Write the shard file of one process."""
    shards_by_name = {
        shard.name: {"start": shard.start, "steps": shard.optimizer_steps, "tensors": shard.tensors} for shard in shards
    }
    torch.save(
        metadata | {"step": step, "held": shards_by_name},
        partial_folder(run_folder, step) / f"{rank}-of-{world_size}.pt",
    )


def commit_shards(run_folder: Path, step: int) -> None:
    """Make the folder of a step valid once every process has written its file, and remove older ones."""
    folder = step_folder(run_folder, step)
    partial_folder(run_folder, step).rename(folder)
    for path in (run_folder / SHARDS_FOLDER_NAME).iterdir():
        if path != folder:
            shutil.rmtree(path)


def load_optimizer_state(optimizer: torch.optim.Optimizer, names: list[str], checkpoint: Checkpoint) -> None:
    """Load the state of an optimizer over full parameters, whose names are in its order.

    Raises CheckpointError if the checkpoint was written with a different optimizer.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict()
    pairs = enumerate(zip(names, parameters, strict=True))
    state["state"] = {
        index: read_parameter_state(name, parameter, checkpoint)
        for index, (name, parameter) in pairs
        if checkpoint.list_optimizer_tensors(name)
    }
    expected = {"momentum_buffer"} if isinstance(optimizer, Muon) else {"exp_avg", "exp_avg_sq"}
    if any(checkpoint.list_optimizer_tensors(name) - expected for name in names):
        raise CheckpointError(OPTIMIZER_MISMATCH)
    optimizer.load_state_dict(state)


def read_parameter_state(name: str, parameter: Tensor, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the optimizer's state of one full parameter."""
    tensors = {kind: checkpoint.read_tensor(name, kind) for kind in checkpoint.list_optimizer_tensors(name)}
    state = {kind: value.clone().view(parameter.shape) for kind, value in tensors.items() if value is not None}
    steps = checkpoint.read_optimizer_steps(name)
    return state if steps is None else state | {"step": torch.tensor(steps)}


def build_single_file_state(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    names_by_optimizer: list[list[str]],
) -> dict[str, Any]:
    """Return the content of state.pt from any checkpoint; `optimizers` are over placeholders of the parameters."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    averages = {name: checkpoint.read_tensor(name, "average") for name in checkpoint.parameter_names}
    for optimizer, names in zip(optimizers, names_by_optimizer, strict=True):
        load_optimizer_state(optimizer, names, checkpoint)
    return {
        "names": checkpoint.parameter_names,
        "model": checkpoint.read_model_state(model),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "average": {name: value.view(shapes[name]) for name, value in averages.items() if value is not None},
        "step": checkpoint.step,
        "seconds": checkpoint.trained_seconds,
        "data": checkpoint.data_digest,
    }


def write_state_file(state: dict[str, Any], path: Path) -> None:
    """Write state.pt and replace the previous file in one step."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)

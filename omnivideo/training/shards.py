"""Checkpoints: one file of one process, or one file from each of several, readable on any number of processes.

    <run>/state.pt                     one process, whole tensors
    <run>/shards/00001200/0-of-2.pt    what rank 0 of 2 held: parts of flattened tensors, by the parameter's name

Both appear by a rename, so a run that is killed while writing leaves the one before.  Whoever goes on from them reads
parts by name (`Saved.read`), wherever they lie, so shards can be read by any other number of processes.
Kinds of tensors: "weight", "average", and the optimizer's ("exp_avg", "momentum_buffer", ...), all fp32.
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
from omnivideo.training.optim import Muon

STATE = "state.pt"
SHARDS = "shards"
OTHER_OPTIMIZER = "the checkpoint is of another optimizer than the recipe's"
SHARD = re.compile(r"(\d+)-of-(\d+)\.pt")


@dataclass
class Held:
    """What a process holds of one parameter: its flattened tensors from `start` on, and the optimizer's steps."""

    name: str
    start: int
    tensors: dict[str, Tensor]
    steps: float | None = None


class Saved(Protocol):
    """A checkpoint that can be read in parts."""

    names: list[str]
    step: int
    seconds: float
    data: str

    def read(self, name: str, kind: str, start: int = 0, stop: int | None = None) -> Tensor | None:
        """A part of a flattened tensor; None where there is none of this kind."""

    def kinds(self, name: str) -> set[str]:
        """The optimizer's tensors of a parameter; none where it never moved."""

    def steps(self, name: str) -> float | None:
        """How often Adam moved a parameter."""

    def model(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights of the model by name; those that are not in the checkpoint are the model's own."""


class OneFile:
    """state.pt; `layout` names the parameters in each of its optimizers' states."""

    def __init__(self, path: Path, layout: list[list[str]]):
        self.state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        self.names, self.step = self.state["names"], self.state["step"]
        self.seconds, self.data = self.state.get("seconds", 0.0), self.state.get("data", "")
        self.layout = layout
        if len(layout) != len(self.state["optimizers"]):
            raise CheckpointError(OTHER_OPTIMIZER)

    def optimizer(self, name: str) -> dict[str, Tensor]:
        for names, saved in zip(self.layout, self.state["optimizers"], strict=True):
            if name in names:
                return saved["state"].get(names.index(name), {})
        return {}

    def read(self, name: str, kind: str, start: int = 0, stop: int | None = None) -> Tensor | None:
        places = {"weight": self.state["model"].get(name), "average": self.state["average"].get(name)}
        found = places[kind] if kind in places else self.optimizer(name).get(kind)
        return None if found is None else found.flatten()[start:stop]

    def kinds(self, name: str) -> set[str]:
        return self.optimizer(name).keys() - {"step"}

    def steps(self, name: str) -> float | None:
        found = self.optimizer(name).get("step")
        return None if found is None else float(found)

    def model(self, model: nn.Module) -> dict[str, Tensor]:
        return self.state["model"]


class Shards:
    """A folder of shards, read lazily."""

    def __init__(self, folder: Path):
        files = [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in shard_files(folder)]
        self.names, self.step, self.seconds = (files[0][key] for key in ("names", "step", "seconds"))
        self.data = files[0].get("data", "")
        self.parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for file in files:
            for name, part in file["held"].items():
                self.parts[name].append(part)

    def read(self, name: str, kind: str, start: int = 0, stop: int | None = None) -> Tensor | None:
        found = [(part["start"], part["tensors"][kind]) for part in self.parts[name] if kind in part["tensors"]]
        if not found:
            return None
        stop = max(begin + len(tensor) for begin, tensor in found) if stop is None else stop
        out = torch.zeros(stop - start, dtype=found[0][1].dtype)
        for begin, tensor in found:
            low, high = max(start, begin), min(stop, begin + len(tensor))
            if low < high:
                out[low - start : high - start] = tensor[low - begin : high - begin]
        return out

    def kinds(self, name: str) -> set[str]:
        return {kind for part in self.parts[name] for kind in part["tensors"]} - {"weight", "average"}

    def steps(self, name: str) -> float | None:
        return self.parts[name][0]["steps"]

    def model(self, model: nn.Module) -> dict[str, Tensor]:
        state = dict(model.state_dict())
        for name in self.names:
            weight = self.read(name, "weight")
            assert weight is not None, name
            state[name] = weight.view(state[name].shape)
        return state


def shard_files(folder: Path) -> list[Path]:
    """One file of each process; raises CheckpointError where one is missing."""
    found = sorted(path for path in folder.iterdir() if SHARD.fullmatch(path.name))
    sizes = {path.stem.partition("-of-")[2] for path in found}
    if len(sizes) != 1 or int(sizes.pop()) != len(found):
        raise CheckpointError(f"the shards of step {int(folder.name)} are not complete: {len(found)} files")
    return found


def finished(run: Path) -> list[Path]:
    """The run's folders of shards, the newest last."""
    return sorted(path for path in (run / SHARDS).glob("*") if path.name.isdigit())


def newest(run: Path, layout: list[list[str]]) -> Saved | None:
    """The checkpoint that a run goes on from: of the file and the shards, the one that is further."""
    found: list[Saved] = [Shards(path) for path in finished(run)[-1:]]
    if (run / STATE).exists():
        found.append(OneFile(run / STATE, layout))
    return max(found, key=lambda saved: saved.step, default=None)


def begin_shards(run: Path, step: int) -> None:
    """An empty folder for a step's shards, that does not count yet."""
    folder = partial_folder(run, step)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote
    folder.mkdir(parents=True)


def step_folder(run: Path, step: int) -> Path:
    return run / SHARDS / f"{step:08d}"


def partial_folder(run: Path, step: int) -> Path:
    return step_folder(run, step).with_suffix(".partial")


def write_shard(run: Path, step: int, rank: int, world: int, about: dict[str, Any], held: Iterator[Held]) -> None:
    """This process's file."""
    parts = {one.name: {"start": one.start, "steps": one.steps, "tensors": one.tensors} for one in held}
    torch.save(about | {"step": step, "held": parts}, partial_folder(run, step) / f"{rank}-of-{world}.pt")


def finish_shards(run: Path, step: int) -> None:
    """Makes the folder of a step count, once every process has written, and removes the others."""
    done = step_folder(run, step)
    partial_folder(run, step).rename(done)
    for other in (run / SHARDS).iterdir():
        if other != done:
            shutil.rmtree(other)


def put_state(optimizer: torch.optim.Optimizer, names: list[str], saved: Saved) -> None:
    """Loads an optimizer over whole parameters, named in its order."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict()
    pairs = enumerate(zip(names, parameters, strict=True))
    state["state"] = {at: state_of(name, parameter, saved) for at, (name, parameter) in pairs if saved.kinds(name)}
    expected = {"momentum_buffer"} if isinstance(optimizer, Muon) else {"exp_avg", "exp_avg_sq"}
    if any(saved.kinds(name) - expected for name in names):
        raise CheckpointError(OTHER_OPTIMIZER)
    optimizer.load_state_dict(state)


def state_of(name: str, parameter: Tensor, saved: Saved) -> dict[str, Tensor]:
    """The optimizer's state of one whole parameter."""
    found = {kind: saved.read(name, kind) for kind in saved.kinds(name)}
    state = {kind: value.clone().view(parameter.shape) for kind, value in found.items() if value is not None}
    steps = saved.steps(name)
    return state if steps is None else state | {"step": torch.tensor(steps)}


def whole_state(saved: Saved, model: nn.Module, built: list[torch.optim.Optimizer], layout: list[list[str]]) -> dict:
    """What state.pt holds, from any checkpoint; `built` are optimizers over stand-ins for the parameters."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    averages = {name: saved.read(name, "average") for name in saved.names}
    for optimizer, names in zip(built, layout, strict=True):
        put_state(optimizer, names, saved)
    return {
        "names": saved.names,
        "model": saved.model(model),
        "optimizers": [optimizer.state_dict() for optimizer in built],
        "average": {name: value.view(shapes[name]) for name, value in averages.items() if value is not None},
        "step": saved.step,
        "seconds": saved.seconds,
        "data": saved.data,
    }


def write_state(state: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)

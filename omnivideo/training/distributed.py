"""Several processes on one recipe: ZeRO stage 1 (each keeps a part of the optimizer's states), with the losses of one.

`omnivideo train RECIPE --processes N` starts N processes of itself; torchrun, or any launcher that sets RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, does as well.  Each process draws the whole batch and takes its
share (`share.py`); gradients are averaged over all.  Who keeps what depends on the recipe's optimizer:

- "adamw": DeepSpeed's ZeRO-1, from the recipe's own settings.  It cuts the flattened weights into equal parts; in bf16
  each process keeps the fp32 weights, Adam's moments and the average of its part.
- "muon": whole matrices.  Muon orthogonalises a matrix as a whole, which a part of its flattened form has not: every
  parameter has one owner, which gets its gradient, moves it, and sends it to the others.

Checkpoints are sharded (`shards.py`) and go on with any number of processes; the end of a run writes state.pt too.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from omnivideo.errors import CheckpointError, InvalidInput, NotInstalled
from omnivideo.training.optim import Named, layout
from omnivideo.training.sequence import split_sequence
from omnivideo.training.shards import (
    OTHER_OPTIMIZER,
    Held,
    Saved,
    begin_shards,
    finish_shards,
    newest,
    step_folder,
    whole_state,
    write_shard,
    write_state,
)
from omnivideo.training.share import Share
from omnivideo.training.trainer import Recipe, Trainer, fill_gradients

BUCKET = 2**25  # weights that travel at once
SETTLING = 0.2  # s
PATIENCE = timedelta(hours=2)  # for the first process, which may have data to make


class World:
    """One process alone."""

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def trainer(self, recipe: Recipe, folder: Path) -> Trainer:
        return Trainer(recipe, folder)

    def gathered(self, mine: list) -> list:
        """What all processes have."""
        return mine

    def first_alone(self) -> Any:
        """A context that the first process passes through before the others: what it wrote is there for them."""
        return nullcontext()


class Together(World):
    """One of several processes; `sequence` of them at a time share each sample's tokens."""

    def __init__(self, sequence: int, device: torch.device):
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        check_sizes(self.size, sequence)
        self.share = Dealt(self.rank // sequence, self.size // sequence, device)
        self.sequence = self.group_of(sequence) if sequence > 1 else None

    def group_of(self, size: int) -> dist.ProcessGroup:
        """The group of `size` neighbours that this process is in."""
        prepare_deepspeed(self.device)
        groups = [dist.new_group(list(range(at, at + size))) for at in range(0, self.size, size)]
        return groups[self.rank // size]

    def trainer(self, recipe: Recipe, folder: Path) -> Trainer:
        if self.sequence is not None:
            split_sequence(decoder_of(recipe), self.sequence)
        return (ZeroTrainer if recipe.optimizer == "adamw" else OwnerTrainer)(recipe, folder, self)

    def gathered(self, mine: list) -> list:
        every: list[list] = [[]] * self.size
        dist.all_gather_object(every, mine)
        return [one for some in every for one in some]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        if not self.first:
            dist.barrier()
        yield
        if self.first:
            dist.barrier()


class Dealt(Share):
    """A share of several; what is asked of all shares is asked of all processes."""

    def __init__(self, rank: int, world: int, device: torch.device):
        self.rank, self.world, self.device = rank, world, device

    def mean(self, counts: Tensor) -> Tensor:
        total = counts.detach().double()
        dist.all_reduce(total)
        return (total / dist.get_world_size()).float()

    def longest(self, length: int) -> int:
        found = torch.tensor(length, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def average(self, losses: Mapping[str, float]) -> dict[str, float]:
        every: list[dict[str, float]] = [{}] * dist.get_world_size()
        dist.all_gather_object(every, dict(losses))
        names = dict.fromkeys(name for one in every for name in one)
        return {name: mean_of([one[name] for one in every if name in one]) for name in names}


def mean_of(values: list[float]) -> float:
    return sum(values) / len(values)


def decoder_of(recipe: Recipe) -> WanTransformer3DModel:
    decoder = getattr(recipe.model, "decoder", None)
    if not isinstance(decoder, WanTransformer3DModel):
        raise InvalidInput("sequence", f"recipe {recipe.name} has no decoder whose tokens could be shared; use 1")
    return decoder


# ---------------------------------------------------------------- trainers


class Several(Trainer, ABC):
    """What both ways of keeping parts have in common: who speaks, and the checkpoints."""

    def __init__(self, recipe: Recipe, folder: Path, world: Together):
        self.world, self.share, self.first = world, world.share, world.first
        super().__init__(recipe, folder)

    @abstractmethod
    def held(self) -> Iterator[Held]: ...

    def agreed(self, wanted: bool) -> bool:
        flag = torch.tensor(int(wanted), device=self.recipe.device)
        dist.broadcast(flag, 0)
        return bool(flag)

    def save(self) -> None:
        """Every process its shard; they count once all are written.  Those of this very step are there already where
        a run's last step is saved twice."""
        if step_folder(self.folder, self.step).exists():
            return
        about = {"names": [name for name, _ in self.named], "seconds": self.seconds, "data": self.recipe.data}
        if self.first:
            begin_shards(self.folder, self.step)
        dist.barrier()
        write_shard(self.folder, self.step, self.world.rank, self.world.size, about, self.held())
        dist.barrier()
        if self.first:
            finish_shards(self.folder, self.step)
        dist.barrier()

    def averages(self) -> Iterator[tuple[str, Tensor]]:
        mine = {one.name: one for one in self.held()}
        for name, parameter in self.named if self.recipe.ema else ():
            whole = torch.zeros(parameter.numel(), device=parameter.device)
            if name in mine:
                part = mine[name].tensors["average"]
                whole[mine[name].start : mine[name].start + len(part)] = part
            dist.all_reduce(whole)
            yield name, whole.view_as(parameter)

    def finish(self) -> None:
        self.save()
        if self.first:
            self.export()
        dist.barrier()

    def export(self) -> None:
        """state.pt from the shards, for one process and for the recipes that come after."""
        names = layout(self.named, self.recipe.optimizer)
        blank = [(name, nn.Parameter(torch.empty(one.shape))) for name, one in self.named]
        saved = newest(self.folder, names)
        assert saved is not None, "it has just been saved"
        write_state(whole_state(saved, self.recipe.model, self.optimizers(blank), names), self.state_file)


class OwnerTrainer(Several):
    """Every parameter has one owner, which alone has its optimizer's state and its average."""

    def prepare(self) -> None:
        self.owners = owners(self.named, self.world.size)
        self.mine = [pair for pair in self.named if self.owners[pair[0]] == self.world.rank]
        self.built = self.optimizers(self.mine)
        self.hold(self.mine)
        self.buckets = list(buckets(self.named, self.owners))

    def held(self) -> Iterator[Held]:
        states = {id(one): state for optimizer in self.built for one, state in optimizer.state.items()}
        for name, parameter in self.mine:
            state = states.get(id(parameter), {})
            tensors = {kind: value for kind, value in state.items() if kind != "step"} | {"weight": parameter.detach()}
            if self.average:
                tensors["average"] = self.average[name]
            steps = float(state["step"]) if "step" in state else None
            yield Held(name, 0, {kind: value.flatten() for kind, value in tensors.items()}, steps)

    def update(self) -> Tensor:
        self.collect()
        norm = self.clip()
        self.step_all()
        self.publish()
        return norm

    @torch.no_grad()
    def collect(self) -> None:
        """Brings every gradient's mean to its owner; a parameter that no share touched has none."""
        touched = torch.tensor([one.grad is not None for _, one in self.named], device=self.recipe.device).int()
        dist.all_reduce(touched, dist.ReduceOp.MAX)
        used = {name for (name, _), mark in zip(self.named, touched.tolist(), strict=True) if mark}
        for owner, bucket in self.buckets:
            chosen = [one for name, one in bucket if name in used]
            if not chosen:
                continue
            fill_gradients([("", one) for one in chosen])
            flat = torch.cat([one.grad.flatten() for one in chosen if one.grad is not None]) / self.world.size
            dist.reduce(flat, owner)
            for one, mean in zip(chosen, flat.split([one.numel() for one in chosen]), strict=True):
                one.grad = mean.view_as(one) if owner == self.world.rank else None

    @torch.no_grad()
    def clip(self) -> Tensor:
        """As torch's clip_grad_norm_, over the gradients of all owners."""
        grads = [one.grad for _, one in self.mine if one.grad is not None]
        squared = torch.zeros((), device=self.recipe.device)
        for norm in torch._foreach_norm(grads) if grads else ():
            squared += norm.square()
        dist.all_reduce(squared)
        norm = squared.sqrt()
        scale = (self.recipe.clip / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale)
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Sends what the owners moved to all."""
        for owner, bucket in self.buckets:
            flat = torch.cat([one.flatten() for _, one in bucket])
            dist.broadcast(flat, owner)
            for (_, one), value in zip(bucket, flat.split([one.numel() for _, one in bucket]), strict=True):
                one.copy_(value.view_as(one))


def owners(named: Named, world: int) -> dict[str, int]:
    """An owner for each parameter, by name, so that all have about as many weights: the largest go first."""
    loads, chosen = [0] * world, {}
    for name, parameter in sorted(named, key=lambda pair: (-pair[1].numel(), pair[0])):
        chosen[name] = loads.index(min(loads))
        loads[chosen[name]] += parameter.numel()
    return chosen


def buckets(named: Named, owned: Mapping[str, int]) -> Iterator[tuple[int, Named]]:
    """Parameters of one owner that travel together."""
    for owner in sorted(set(owned.values())):
        bucket: Named = []
        for name, parameter in named:
            if owned[name] == owner:
                bucket.append((name, parameter))
            if sum(one.numel() for _, one in bucket) >= BUCKET:
                yield owner, bucket
                bucket = []
        if bucket:
            yield owner, bucket


class ZeroTrainer(Several):
    """DeepSpeed's ZeRO-1 over AdamW."""

    def prepare(self) -> None:
        deepspeed = prepare_deepspeed(self.recipe.device)
        self.mine = self.named
        self.built = self.optimizers(self.named)
        self.engine = deepspeed.initialize(
            model=self.recipe.model, optimizer=self.built[0], config=settings(self.recipe)
        )[0]
        self.engine.optimizer.get_grad_norm_direct = norm_of
        self.hold((str(at), group["params"][0]) for at, group in enumerate(self.built[0].param_groups))
        self.sums: dict[str, Tensor] = {}

    def parts(self) -> Iterator[tuple[str, int, Any, int, slice]]:
        """This process's part of each parameter it has one of: its name, where the part begins in the flattened
        parameter, its fp32 weights, its group, and its place in the group's flat tensors."""
        for name, parameter in self.named:
            found = parameter._hp_mapping  # type: ignore[attr-defined]
            if found is not None:
                at = found.hp_fragment_address
                place = slice(at.start, at.start + at.numel)
                yield name, found.lp_fragment_address.start, found.hp_fragment, found.param_group_index, place

    def state(self, group: int) -> dict[str, Tensor]:
        return self.built[0].state.get(self.built[0].param_groups[group]["params"][0], {})

    def held(self) -> Iterator[Held]:
        for name, start, weight, group, place in self.parts():
            state = self.state(group)
            tensors = {kind: value[place] for kind, value in state.items() if kind != "step"} | {"weight": weight}
            if self.average:
                tensors["average"] = self.average[str(group)][place]
            yield Held(name, start, tensors, float(state["step"]) if "step" in state else None)

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        if any(saved.kinds(name) - {"exp_avg", "exp_avg_sq"} for name in saved.names):
            raise CheckpointError(OTHER_OPTIMIZER)
        self.recipe.model.load_state_dict(saved.model(self.recipe.model))
        for group in self.built[0].param_groups:
            flat = group["params"][0]
            steps = torch.tensor(float(saved.step), device=flat.device if group["fused"] else "cpu")
            blank = {kind: torch.zeros_like(flat) for kind in ("exp_avg", "exp_avg_sq")}
            self.built[0].state[flat] = blank | {"step": steps}
        for one in self.held():
            for kind, tensor in one.tensors.items():
                value = saved.read(one.name, kind, one.start, one.start + len(tensor))
                if value is not None:
                    tensor.copy_(value)

    def backward(self, loss: Tensor, several: bool) -> None:
        """Gradients of several passes add up in fp32.  (DeepSpeed's way to that is another optimizer than ZeRO's.)"""
        self.engine.backward(loss)
        for name, parameter in self.named if several else ():
            if parameter.grad is not None:
                self.sums[name] = self.sums[name].add_(parameter.grad) if name in self.sums else parameter.grad.float()
                parameter.grad = None

    def update(self) -> float:
        for name, parameter in self.named if self.sums else ():
            if name in self.sums:
                parameter.grad = self.sums.pop(name).to(parameter.dtype)
        fill_gradients(self.named)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())


@torch.no_grad()
def norm_of(gradients: list[Tensor], *_: Any) -> Tensor:
    """The norm of all processes' gradients together, each holding its own.

    In DeepSpeed's place, which launches some kernels for every parameter.
    """
    norms = torch._foreach_norm(gradients, dtype=torch.float32)
    squared = torch.stack(norms).double().square().sum()
    dist.all_reduce(squared)
    return squared.sqrt().float()


def settings(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's configuration of a recipe.

    The batch and the learning rate are not in it: recipes draw their batches, and the trainer sets the rate.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,  # gradients are reduced in step(), when none is missing any more
        "gradient_clipping": recipe.clip,
        # Its search for infinities waits for a kernel for every parameter (0.2 s); the trainer looks at the norm.
        "bf16": {"enabled": recipe.precision == torch.bfloat16, "check_grad_overflow": False},
        "zero_optimization": {"stage": 1, "overlap_comm": False, "contiguous_gradients": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def prepare_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told which device to use; raises NotInstalled."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError:
        raise NotInstalled("ZeRO-1 over AdamW needs DeepSpeed: pip install omnivideo[train]") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":  # nothing of it needs compiling: its shared-memory collectives are for inference
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


# ---------------------------------------------------------------- processes


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def check_sizes(processes: int, sequence: int) -> None:
    if sequence < 1 or processes % sequence:
        raise InvalidInput("sequence", f"{sequence} is not a divisor of {processes} processes")


@contextmanager
def together(processes: int, sequence: int, device: str = "cpu") -> Iterator[World]:
    """The world that a launcher put this process in, or one of it alone."""
    if not launched():
        check_sizes(1, sequence)
        yield World()
        return
    if processes not in (1, int(os.environ["WORLD_SIZE"])):
        raise InvalidInput("processes", f"{processes} is not the launcher's {os.environ['WORLD_SIZE']}")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Together(sequence, torch.device(device))
    finally:
        dist.destroy_process_group()
        # DeepSpeed keeps hold of the groups, so gloo's threads go on.  One that lets go of an exchange's tensors while
        # the interpreter ends asks for it in vain, which aborts the process: they get the time to do it before.
        time.sleep(SETTLING)


def launch(processes: int, command: list[str]) -> int:
    """Runs a command as several processes; the first that fails ends the others, and its code is returned."""
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    about = {"OMP_NUM_THREADS": threads} | os.environ | about | {"LOCAL_WORLD_SIZE": str(processes)}
    running = [
        subprocess.Popen(command, env=about | {"RANK": str(at), "LOCAL_RANK": str(at)}, preexec_fn=end_with_parent)
        for at in range(processes)
    ]
    try:
        return watch(running)
    finally:
        for one in running:
            one.kill()
            one.wait()


def watch(running: list[subprocess.Popen]) -> int:
    """Waits for all, or for the first that fails: its exit code, 128 + n where a signal n ended it."""
    while True:
        codes = [one.poll() for one in running]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            code = failed[0] if failed else 0
            return 128 - code if code < 0 else code
        time.sleep(0.1)


def end_with_parent() -> None:
    """In a child: Linux ends it when its parent ends, however that does."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def relaunch(processes: int, sequence: int) -> int:
    """This very command line, as several processes."""
    check_sizes(processes, sequence)
    return launch(processes, [sys.executable, "-m", "omnivideo.cli", *sys.argv[1:]])

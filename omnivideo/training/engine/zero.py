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

from omnivideo.cpu_threads import build_child_environment
from omnivideo.errors import CheckpointError, InvalidInput, MissingDependency
from omnivideo.models.parallel.ulysses import enable_sequence_parallel
from omnivideo.training.engine.checkpoint import (
    OPTIMIZER_MISMATCH,
    Checkpoint,
    ParameterShard,
    build_single_file_state,
    commit_shards,
    create_partial_folder,
    find_latest_checkpoint,
    step_folder,
    write_shard,
    write_state_file,
)
from omnivideo.training.engine.data_parallel import DataParallelRank
from omnivideo.training.engine.optim import NamedParameters, group_names_by_optimizer
from omnivideo.training.engine.recipe import Recipe
from omnivideo.training.engine.trainer import Trainer, fill_missing_gradients

MAX_BUCKET_WEIGHTS = 2**25  # weights that travel at once
SHUTDOWN_GRACE_SECONDS = 0.2  # s
PROCESS_GROUP_TIMEOUT = timedelta(hours=2)  # for the first process, which may have data to make


class ProcessContext:
    """One process alone."""

    rank, world_size = 0, 1

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def create_trainer(self, recipe: Recipe, folder: Path) -> Trainer:
        return Trainer(recipe, folder)

    def all_gather(self, local_items: list) -> list:
        """What all processes have."""
        return local_items

    def main_process_first(self) -> Any:
        """A context that the first process passes through before the others: what it wrote is there for them."""
        return nullcontext()


class DistributedContext(ProcessContext):
    """One of several processes; `sequence` of them at a time share each sample's tokens."""

    def __init__(self, sequence_parallel_size: int, device: torch.device):
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), device
        check_process_counts(self.world_size, sequence_parallel_size)
        self.data_parallel_rank = DistributedDataParallelRank(
            self.rank // sequence_parallel_size, self.world_size // sequence_parallel_size, device
        )
        self.sequence_group = self.join_neighbour_group(sequence_parallel_size) if sequence_parallel_size > 1 else None

    def join_neighbour_group(self, size: int) -> dist.ProcessGroup:
        """The group of `size` neighbours that this process is in."""
        prepare_deepspeed(self.device)
        groups = [dist.new_group(list(range(start, start + size))) for start in range(0, self.world_size, size)]
        return groups[self.rank // size]

    def create_trainer(self, recipe: Recipe, folder: Path) -> Trainer:
        if self.sequence_group is not None:
            enable_sequence_parallel(require_decoder(recipe), self.sequence_group)
        return (ZeroAdamWTrainer if recipe.optimizer == "adamw" else ShardedMuonTrainer)(recipe, folder, self)

    def all_gather(self, local_items: list) -> list:
        items_by_rank: list[list] = [[]] * self.world_size
        dist.all_gather_object(items_by_rank, local_items)
        return [item for items in items_by_rank for item in items]

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        if not self.is_main_process:
            dist.barrier()
        yield
        if self.is_main_process:
            dist.barrier()


class DistributedDataParallelRank(DataParallelRank):
    """A share of several; what is asked of all shares is asked of all processes."""

    def __init__(self, rank: int, world_size: int, device: torch.device):
        self.rank, self.world_size, self.device = rank, world_size, device

    def global_mean(self, counts: Tensor) -> Tensor:
        total = counts.detach().double()
        dist.all_reduce(total)
        return (total / dist.get_world_size()).float()

    def global_max(self, length: int) -> int:
        maximum = torch.tensor(length, device=self.device)
        dist.all_reduce(maximum, dist.ReduceOp.MAX)
        return int(maximum)

    def average_losses(self, losses: Mapping[str, float]) -> dict[str, float]:
        losses_by_rank: list[dict[str, float]] = [{}] * dist.get_world_size()
        dist.all_gather_object(losses_by_rank, dict(losses))
        names = dict.fromkeys(name for rank_losses in losses_by_rank for name in rank_losses)
        return {
            name: compute_mean([rank_losses[name] for rank_losses in losses_by_rank if name in rank_losses])
            for name in names
        }


def compute_mean(values: list[float]) -> float:
    return sum(values) / len(values)


def require_decoder(recipe: Recipe) -> WanTransformer3DModel:
    decoder = getattr(recipe.model, "decoder", None)
    if not isinstance(decoder, WanTransformer3DModel):
        raise InvalidInput("sequence", f"recipe {recipe.name} has no decoder whose tokens could be shared; use 1")
    return decoder


# ---------------------------------------------------------------- trainers


class DistributedTrainer(Trainer, ABC):
    """What both ways of keeping parts have in common: who speaks, and the checkpoints."""

    def __init__(self, recipe: Recipe, folder: Path, context: DistributedContext):
        self.context, self.data_parallel_rank, self.is_main_process = (
            context,
            context.data_parallel_rank,
            context.is_main_process,
        )
        super().__init__(recipe, folder)

    @abstractmethod
    def iter_parameter_shards(self) -> Iterator[ParameterShard]: ...

    def broadcast_decision(self, decision: bool) -> bool:
        flag = torch.tensor(int(decision), device=self.recipe.device)
        dist.broadcast(flag, 0)
        return bool(flag)

    def save(self) -> None:
        """Every process its shard; they count once all are written.  Those of this very step are there already where
        a run's last step is saved twice."""
        if step_folder(self.folder, self.step).exists():
            return
        metadata = {
            "names": [name for name, _ in self.trainable_parameters],
            "seconds": self.trained_seconds,
            "data": self.recipe.data_digest,
        }
        if self.is_main_process:
            create_partial_folder(self.folder, self.step)
        dist.barrier()
        write_shard(
            self.folder, self.step, self.context.rank, self.context.world_size, metadata, self.iter_parameter_shards()
        )
        dist.barrier()
        if self.is_main_process:
            commit_shards(self.folder, self.step)
        dist.barrier()

    def iter_ema_weights(self) -> Iterator[tuple[str, Tensor]]:
        local_shards = {shard.name: shard for shard in self.iter_parameter_shards()}
        for name, parameter in self.trainable_parameters if self.recipe.ema_decay else ():
            full_weight = torch.zeros(parameter.numel(), device=parameter.device)
            if name in local_shards:
                local_weight = local_shards[name].tensors["average"]
                full_weight[local_shards[name].start : local_shards[name].start + len(local_weight)] = local_weight
            dist.all_reduce(full_weight)
            yield name, full_weight.view_as(parameter)

    def finish_run(self) -> None:
        self.save()
        if self.is_main_process:
            self.export_state_file()
        dist.barrier()

    def export_state_file(self) -> None:
        """state.pt from the shards, for one process and for the recipes that come after."""
        names = group_names_by_optimizer(self.trainable_parameters, self.recipe.optimizer)
        placeholders = [
            (name, nn.Parameter(torch.empty(parameter.shape))) for name, parameter in self.trainable_parameters
        ]
        saved = find_latest_checkpoint(self.folder, names)
        assert saved is not None, "it has just been saved"
        write_state_file(
            build_single_file_state(saved, self.recipe.model, self.create_optimizers(placeholders), names),
            self.state_file,
        )


class ShardedMuonTrainer(DistributedTrainer):
    """Every parameter has one owner, which alone has its optimizer's state and its average."""

    def set_up_optimizers(self) -> None:
        self.owner_ranks = assign_owners(self.trainable_parameters, self.context.world_size)
        self.local_parameters = [
            pair for pair in self.trainable_parameters if self.owner_ranks[pair[0]] == self.context.rank
        ]
        self.optimizers = self.create_optimizers(self.local_parameters)
        self.track_ema(self.local_parameters)
        self.buckets = list(group_into_buckets(self.trainable_parameters, self.owner_ranks))

    def iter_parameter_shards(self) -> Iterator[ParameterShard]:
        states = {id(parameter): state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}
        for name, parameter in self.local_parameters:
            state = states.get(id(parameter), {})
            tensors = {kind: value for kind, value in state.items() if kind != "step"} | {"weight": parameter.detach()}
            if self.ema_weights:
                tensors["average"] = self.ema_weights[name]
            steps = float(state["step"]) if "step" in state else None
            yield ParameterShard(name, 0, {kind: value.flatten() for kind, value in tensors.items()}, steps)

    def update_weights(self) -> Tensor:
        self.reduce_gradients()
        norm = self.clip_gradients()
        self.step_optimizers()
        self.broadcast_weights()
        return norm

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Brings every gradient's mean to its owner; a parameter that no share touched has none."""
        touched = torch.tensor(
            [parameter.grad is not None for _, parameter in self.trainable_parameters], device=self.recipe.device
        ).int()
        dist.all_reduce(touched, dist.ReduceOp.MAX)
        used = {name for (name, _), mark in zip(self.trainable_parameters, touched.tolist(), strict=True) if mark}
        for owner, bucket in self.buckets:
            parameters = [parameter for name, parameter in bucket if name in used]
            if not parameters:
                continue
            fill_missing_gradients([("", parameter) for parameter in parameters])
            flat = (
                torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
                / self.context.world_size
            )
            dist.reduce(flat, owner)
            for parameter, mean in zip(parameters, flat.split([other.numel() for other in parameters]), strict=True):
                parameter.grad = mean.view_as(parameter) if owner == self.context.rank else None

    @torch.no_grad()
    def clip_gradients(self) -> Tensor:
        """As torch's clip_grad_norm_, over the gradients of all owners."""
        grads = [parameter.grad for _, parameter in self.local_parameters if parameter.grad is not None]
        squared = torch.zeros((), device=self.recipe.device)
        for norm in torch._foreach_norm(grads) if grads else ():
            squared += norm.square()
        dist.all_reduce(squared)
        norm = squared.sqrt()
        scale = (self.recipe.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale)
        return norm

    @torch.no_grad()
    def broadcast_weights(self) -> None:
        """Sends what the owners moved to all."""
        for owner, bucket in self.buckets:
            flat = torch.cat([parameter.flatten() for _, parameter in bucket])
            dist.broadcast(flat, owner)
            for (_, parameter), value in zip(bucket, flat.split([other.numel() for _, other in bucket]), strict=True):
                parameter.copy_(value.view_as(parameter))


def assign_owners(parameters: NamedParameters, world_size: int) -> dict[str, int]:
    """An owner for each parameter, by name, so that all have about as many weights: the largest go first."""
    loads, owner_ranks = [0] * world_size, {}
    for name, parameter in sorted(parameters, key=lambda pair: (-pair[1].numel(), pair[0])):
        owner_ranks[name] = loads.index(min(loads))
        loads[owner_ranks[name]] += parameter.numel()
    return owner_ranks


def group_into_buckets(
    parameters: NamedParameters, owner_ranks: Mapping[str, int]
) -> Iterator[tuple[int, NamedParameters]]:
    """Parameters of one owner that travel together."""
    for owner in sorted(set(owner_ranks.values())):
        bucket: NamedParameters = []
        for name, parameter in parameters:
            if owner_ranks[name] == owner:
                bucket.append((name, parameter))
            if sum(member.numel() for _, member in bucket) >= MAX_BUCKET_WEIGHTS:
                yield owner, bucket
                bucket = []
        if bucket:
            yield owner, bucket


class ZeroAdamWTrainer(DistributedTrainer):
    """DeepSpeed's ZeRO-1 over AdamW."""

    def set_up_optimizers(self) -> None:
        deepspeed = prepare_deepspeed(self.recipe.device)
        self.local_parameters = self.trainable_parameters
        self.optimizers = self.create_optimizers(self.trainable_parameters)
        self.engine = deepspeed.initialize(
            model=self.recipe.model, optimizer=self.optimizers[0], config=build_deepspeed_config(self.recipe)
        )[0]
        self.engine.optimizer.get_grad_norm_direct = compute_global_grad_norm
        self.track_ema((str(index), group["params"][0]) for index, group in enumerate(self.optimizers[0].param_groups))
        self.accumulated_gradients: dict[str, Tensor] = {}

    def iter_local_fragments(self) -> Iterator[tuple[str, int, Any, int, slice]]:
        """This process's part of each parameter it has one of: its name, where the part begins in the flattened
        parameter, its fp32 weights, its group, and its place in the group's flat tensors."""
        for name, parameter in self.trainable_parameters:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                address = mapping.hp_fragment_address
                fragment_slice = slice(address.start, address.start + address.numel)
                yield (
                    name,
                    mapping.lp_fragment_address.start,
                    mapping.hp_fragment,
                    mapping.param_group_index,
                    fragment_slice,
                )

    def group_state(self, group: int) -> dict[str, Tensor]:
        return self.optimizers[0].state.get(self.optimizers[0].param_groups[group]["params"][0], {})

    def iter_parameter_shards(self) -> Iterator[ParameterShard]:
        for name, start, weight, group, fragment_slice in self.iter_local_fragments():
            state = self.group_state(group)
            tensors = {kind: value[fragment_slice] for kind, value in state.items() if kind != "step"} | {
                "weight": weight
            }
            if self.ema_weights:
                tensors["average"] = self.ema_weights[str(group)][fragment_slice]
            yield ParameterShard(name, start, tensors, float(state["step"]) if "step" in state else None)

    @torch.no_grad()
    def restore_state(self, saved: Checkpoint) -> None:
        if any(saved.list_optimizer_tensors(name) - {"exp_avg", "exp_avg_sq"} for name in saved.parameter_names):
            raise CheckpointError(OPTIMIZER_MISMATCH)
        self.recipe.model.load_state_dict(saved.read_model_state(self.recipe.model))
        for group in self.optimizers[0].param_groups:
            flat = group["params"][0]
            steps = torch.tensor(float(saved.step), device=flat.device if group["fused"] else "cpu")
            blank = {kind: torch.zeros_like(flat) for kind in ("exp_avg", "exp_avg_sq")}
            self.optimizers[0].state[flat] = blank | {"step": steps}
        for shard in self.iter_parameter_shards():
            for kind, tensor in shard.tensors.items():
                value = saved.read_tensor(shard.name, kind, shard.start, shard.start + len(tensor))
                if value is not None:
                    tensor.copy_(value)

    def backward(self, loss: Tensor, is_accumulating: bool) -> None:
        """Gradients of several passes add up in fp32.  (DeepSpeed's way to that is another optimizer than ZeRO's.)"""
        self.engine.backward(loss)
        for name, parameter in self.trainable_parameters if is_accumulating else ():
            if parameter.grad is not None:
                self.accumulated_gradients[name] = (
                    self.accumulated_gradients[name].add_(parameter.grad)
                    if name in self.accumulated_gradients
                    else parameter.grad.float()
                )
                parameter.grad = None

    def update_weights(self) -> float:
        for name, parameter in self.trainable_parameters if self.accumulated_gradients else ():
            if name in self.accumulated_gradients:
                parameter.grad = self.accumulated_gradients.pop(name).to(parameter.dtype)
        fill_missing_gradients(self.trainable_parameters)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())


@torch.no_grad()
def compute_global_grad_norm(gradients: list[Tensor], *_: Any) -> Tensor:
    """The norm of all processes' gradients together, each holding its own.

    In DeepSpeed's place, which launches some kernels for every parameter.
    """
    norms = torch._foreach_norm(gradients, dtype=torch.float32)
    squared = torch.stack(norms).double().square().sum()
    dist.all_reduce(squared)
    return squared.sqrt().float()


def build_deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's configuration of a recipe.

    The batch and the learning rate are not in it: recipes draw their batches, and the trainer sets the rate.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,  # gradients are reduced in step(), when none is missing any more
        "gradient_clipping": recipe.max_grad_norm,
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
        raise MissingDependency("ZeRO-1 over AdamW needs DeepSpeed: pip install omnivideo[train]") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":  # nothing of it needs compiling: its shared-memory collectives are for inference
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


# ---------------------------------------------------------------- processes


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def check_process_counts(processes: int, sequence_parallel_size: int) -> None:
    if sequence_parallel_size < 1 or processes % sequence_parallel_size:
        raise InvalidInput("sequence", f"{sequence_parallel_size} is not a divisor of {processes} processes")


@contextmanager
def open_process_context(processes: int, sequence_parallel_size: int, device: str = "cpu") -> Iterator[ProcessContext]:
    """The world that a launcher put this process in, or one of it alone."""
    if not is_launched():
        check_process_counts(1, sequence_parallel_size)
        yield ProcessContext()
        return
    if processes not in (1, int(os.environ["WORLD_SIZE"])):
        raise InvalidInput("processes", f"{processes} is not the launcher's {os.environ['WORLD_SIZE']}")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PROCESS_GROUP_TIMEOUT)
    try:
        yield DistributedContext(sequence_parallel_size, torch.device(device))
    finally:
        dist.destroy_process_group()
        # DeepSpeed keeps hold of the groups, so gloo's threads go on.  One that lets go of an exchange's tensors while
        # the interpreter ends asks for it in vain, which aborts the process: they get the time to do it before.
        time.sleep(SHUTDOWN_GRACE_SECONDS)


def launch_processes(processes: int, command: list[str]) -> int:
    """Runs a command as several processes; the first that fails ends the others, and its code is returned."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port()), "WORLD_SIZE": str(processes)}
    env = build_child_environment(processes) | env | {"LOCAL_WORLD_SIZE": str(processes)}
    children = [
        subprocess.Popen(
            command, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, preexec_fn=terminate_with_parent
        )
        for rank in range(processes)
    ]
    try:
        return wait_for_processes(children)
    finally:
        for child in children:
            child.kill()
            child.wait()


def wait_for_processes(children: list[subprocess.Popen]) -> int:
    """Waits for all, or for the first that fails: its exit code, 128 + n where a signal n ended it."""
    while True:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            code = failed[0] if failed else 0
            return 128 - code if code < 0 else code
        time.sleep(0.1)


def terminate_with_parent() -> None:
    """In a child: Linux ends it when its parent ends, however that does."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def relaunch_command(processes: int, sequence_parallel_size: int) -> int:
    """This very command line, as several processes."""
    check_process_counts(processes, sequence_parallel_size)
    return launch_processes(processes, [sys.executable, "-m", "omnivideo.cli", *sys.argv[1:]])

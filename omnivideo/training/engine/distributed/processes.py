"""The processes that train together: one alone, or several that a launcher started.

`omnivideo train RECIPE --processes N` starts N processes of itself (launcher.py). torchrun works as well, as does any
launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor

from omnivideo.errors import InvalidInput
from omnivideo.models.parallel.ulysses import enable_sequence_parallel
from omnivideo.training.engine.data_parallel import DataParallelRank
from omnivideo.training.engine.distributed.sharded_muon import ShardedMuonTrainer
from omnivideo.training.engine.distributed.zero import ZeroAdamWTrainer, prepare_deepspeed
from omnivideo.training.engine.recipe import Recipe
from omnivideo.training.engine.trainer import Trainer

SHUTDOWN_GRACE_SECONDS = 0.2
PROCESS_GROUP_TIMEOUT = timedelta(hours=2)  # the main process may have to prepare data while the others wait

Item = TypeVar("Item")


class ProcessContext:
    """A process that trains alone."""

    rank, world_size = 0, 1

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def create_trainer(self, recipe: Recipe, folder: Path) -> Trainer:
        return Trainer(recipe, folder)

    def all_gather(self, local_items: list[Item]) -> list[Item]:
        """Return the items of all processes in the order of their ranks."""
        return local_items

    def main_process_first(self) -> AbstractContextManager[None]:
        """Return a context that the main process leaves before the others enter, so that they find its files."""
        return nullcontext()


class DistributedContext(ProcessContext):
    """One of several processes; each group of `sequence_parallel_size` neighbours shares the tokens of its samples."""

    def __init__(self, sequence_parallel_size: int, device: torch.device):
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), device
        check_process_counts(self.world_size, sequence_parallel_size)
        self.data_parallel_rank = DistributedDataParallelRank(
            self.rank // sequence_parallel_size, self.world_size // sequence_parallel_size, device
        )
        self.sequence_group = self.join_sequence_group(sequence_parallel_size) if sequence_parallel_size > 1 else None

    def join_sequence_group(self, size: int) -> dist.ProcessGroup:
        """Create the groups of `size` neighbouring processes and return the group of this process."""
        prepare_deepspeed(self.device)
        groups: list[dist.ProcessGroup] = [
            dist.new_group(list(range(start, start + size))) for start in range(0, self.world_size, size)
        ]
        return groups[self.rank // size]

    def create_trainer(self, recipe: Recipe, folder: Path) -> Trainer:
        if self.sequence_group is not None:
            enable_sequence_parallel(require_decoder(recipe), self.sequence_group)
        trainer_class = ZeroAdamWTrainer if recipe.optimizer == "adamw" else ShardedMuonTrainer
        return trainer_class(recipe, folder, self.data_parallel_rank)

    def all_gather(self, local_items: list[Item]) -> list[Item]:
        items_by_rank: list[list[Item]] = [[]] * self.world_size
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
    """One rank of several; the averages and maxima are taken over all processes."""

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
    """Return the recipe's decoder; raise InvalidInput if it has none."""
    decoder = getattr(recipe.model, "decoder", None)
    if not isinstance(decoder, WanTransformer3DModel):
        raise InvalidInput("sequence-parallel", f"must be 1 for {recipe.name}, which does not train with the decoder")
    return decoder


def is_launched() -> bool:
    """Return True if a launcher started this process as one of several."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def check_process_counts(processes: int, sequence_parallel_size: int) -> None:
    """Raise InvalidInput if the processes cannot be divided into groups that share tokens."""
    if sequence_parallel_size < 1 or processes % sequence_parallel_size:
        raise InvalidInput(
            "sequence-parallel", f"{sequence_parallel_size} is not a divisor of the number of processes, {processes}"
        )


@contextmanager
def open_process_context(processes: int, sequence_parallel_size: int, device: str = "cpu") -> Iterator[ProcessContext]:
    """Join the process group that a launcher started, or else yield a context of this process alone.

    Raises InvalidInput if `processes` differs from the launcher's number, or if the groups do not divide it.
    """
    if not is_launched():
        check_process_counts(1, sequence_parallel_size)
        yield ProcessContext()
        return
    if processes not in (1, int(os.environ["WORLD_SIZE"])):
        raise InvalidInput("processes", f"{processes} differs from the launcher's {os.environ['WORLD_SIZE']}")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PROCESS_GROUP_TIMEOUT)
    try:
        yield DistributedContext(sequence_parallel_size, torch.device(device))
    finally:
        dist.destroy_process_group()
        # DeepSpeed still refers to the groups, so gloo's threads keep running. A thread that releases its tensors
        # while the interpreter shuts down aborts the process; this pause lets the threads release them first.
        time.sleep(SHUTDOWN_GRACE_SECONDS)

"""The common part of the trainers for several processes: decisions by the main process, and sharded checkpoints.

The optimizer's state is distributed over the processes (ZeRO stage 1), and the losses are those of one process. Every
process generates the same batch and takes its part (data_parallel.py); gradients are averaged over all processes.
Sharded checkpoints (checkpoint.py) resume on any number of processes; the end of a run also writes state.pt.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omnivideo.training.engine.checkpoint import (
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
from omnivideo.training.engine.optim import group_names_by_optimizer
from omnivideo.training.engine.recipe import Recipe
from omnivideo.training.engine.trainer import Trainer


class DistributedTrainer(Trainer, ABC):
    """A trainer in each of several processes, which holds a part of the optimizer's state."""

    def __init__(self, recipe: Recipe, folder: Path, data_parallel_rank: DataParallelRank):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_parallel_rank = data_parallel_rank
        self.is_main_process = self.rank == 0
        super().__init__(recipe, folder)

    @abstractmethod
    def iter_parameter_shards(self) -> Iterator[ParameterShard]:
        """Yield the parts of parameters whose state this process holds."""

    def broadcast_decision(self, decision: bool) -> bool:
        flag = torch.tensor(int(decision), device=self.recipe.device)
        dist.broadcast(flag, 0)
        return bool(flag)

    def save(self) -> None:
        """Write this process's shard; the checkpoint becomes valid once every process has written its own.

        A run whose last step has just been saved saves it again at the end; this does nothing then.
        """
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
        write_shard(self.folder, self.step, self.rank, self.world_size, metadata, self.iter_parameter_shards())
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
        """Write state.pt from the latest shards, for a single process and for the recipes that follow."""
        names = group_names_by_optimizer(self.trainable_parameters, self.recipe.optimizer)
        placeholders = [
            (name, nn.Parameter(torch.empty(parameter.shape))) for name, parameter in self.trainable_parameters
        ]
        checkpoint = find_latest_checkpoint(self.folder, names)
        assert checkpoint is not None, "finish_run saves one before this is called"
        write_state_file(
            build_single_file_state(checkpoint, self.recipe.model, self.create_optimizers(placeholders), names),
            self.state_file,
        )

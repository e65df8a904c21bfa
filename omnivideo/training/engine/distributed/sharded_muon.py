"""Muon on several processes: each parameter has one owner, which holds its optimizer state and its average.

Muon orthogonalises the momentum of a weight as one matrix, which is impossible for a part of flattened weights as
ZeRO divides them. So the owner of a parameter receives its averaged gradient, updates the parameter, and broadcasts it.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from omnivideo.training.engine.checkpoint import ParameterShard
from omnivideo.training.engine.distributed.trainer import DistributedTrainer
from omnivideo.training.engine.optim import NamedParameters
from omnivideo.training.engine.trainer import fill_missing_gradients

MAX_BUCKET_WEIGHTS = 2**25  # a bucket is sent once it has this many weights


class ShardedMuonTrainer(DistributedTrainer):
    """A trainer whose processes each own some complete parameters."""

    def set_up_optimizers(self) -> None:
        self.owner_ranks = assign_owners(self.trainable_parameters, self.world_size)
        self.local_parameters = [pair for pair in self.trainable_parameters if self.owner_ranks[pair[0]] == self.rank]
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
        """Send the mean of every gradient to its owner; a parameter that no process has used gets none."""
        flags = torch.tensor(
            [parameter.grad is not None for _, parameter in self.trainable_parameters], device=self.recipe.device
        ).int()
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        used_names = {name for (name, _), flag in zip(self.trainable_parameters, flags.tolist(), strict=True) if flag}
        for owner, bucket in self.buckets:
            parameters = [parameter for name, parameter in bucket if name in used_names]
            if not parameters:
                continue
            fill_missing_gradients([("", parameter) for parameter in parameters])
            flat = (
                torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
                / self.world_size
            )
            dist.reduce(flat, owner)
            for parameter, mean in zip(parameters, split_flat(flat, parameters), strict=True):
                parameter.grad = mean.view_as(parameter) if owner == self.rank else None

    @torch.no_grad()
    def clip_gradients(self) -> Tensor:
        """Clip the gradients by their norm over all owners, as torch's clip_grad_norm_ does, and return the norm."""
        grads = [parameter.grad for _, parameter in self.local_parameters if parameter.grad is not None]
        squared = torch.zeros((), device=self.recipe.device)
        for norm in torch._foreach_norm(grads) if grads else ():
            squared += norm.square()
        dist.all_reduce(squared)
        total_norm = squared.sqrt()
        scale = (self.recipe.max_grad_norm / (total_norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale)
        return total_norm

    @torch.no_grad()
    def broadcast_weights(self) -> None:
        """Send the updated parameters from their owners to all processes."""
        for owner, bucket in self.buckets:
            parameters = [parameter for _, parameter in bucket]
            flat = torch.cat([parameter.flatten() for parameter in parameters])
            dist.broadcast(flat, owner)
            for parameter, value in zip(parameters, split_flat(flat, parameters), strict=True):
                parameter.copy_(value.view_as(parameter))


def split_flat(flat: Tensor, tensors: list[torch.nn.Parameter]) -> tuple[Tensor, ...]:
    """Split a flat tensor into pieces with as many values as each of `tensors`."""
    return torch.split(flat, [tensor.numel() for tensor in tensors])


def assign_owners(parameters: NamedParameters, world_size: int) -> dict[str, int]:
    """Return the owner's rank of each parameter by name, balanced by size: the largest are assigned first."""
    loads, owner_ranks = [0] * world_size, {}
    for name, parameter in sorted(parameters, key=lambda pair: (-pair[1].numel(), pair[0])):
        owner_ranks[name] = loads.index(min(loads))
        loads[owner_ranks[name]] += parameter.numel()
    return owner_ranks


def group_into_buckets(
    parameters: NamedParameters, owner_ranks: Mapping[str, int]
) -> Iterator[tuple[int, NamedParameters]]:
    """Yield an owner's rank and parameters of this owner that are sent together."""
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

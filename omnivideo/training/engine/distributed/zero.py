"""AdamW on several processes by DeepSpeed's ZeRO stage 1, configured from the recipe.

DeepSpeed divides the flattened weights into equal parts. In bf16 each process keeps fp32 weights, Adam's moments and
the average of its part.
"""

import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from omnivideo.errors import CheckpointError, MissingDependency
from omnivideo.training.engine.checkpoint import OPTIMIZER_MISMATCH, Checkpoint, ParameterShard
from omnivideo.training.engine.distributed.trainer import DistributedTrainer
from omnivideo.training.engine.recipe import Recipe
from omnivideo.training.engine.trainer import fill_missing_gradients


class LocalFragment(NamedTuple):
    """The part of a parameter whose fp32 weights this process holds."""

    name: str
    start: int  # index of its first value in the flattened parameter
    weight: Tensor
    group: int  # index of its parameter group
    slice: slice  # its place in the flat tensors of the group


class ZeroAdamWTrainer(DistributedTrainer):
    """A trainer that leaves the optimizer's step to DeepSpeed."""

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

    def iter_local_fragments(self) -> Iterator[LocalFragment]:
        for name, parameter in self.trainable_parameters:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                address = mapping.hp_fragment_address
                yield LocalFragment(
                    name,
                    mapping.lp_fragment_address.start,
                    mapping.hp_fragment,
                    mapping.param_group_index,
                    slice(address.start, address.start + address.numel),
                )

    def group_state(self, group: int) -> dict[str, Tensor]:
        """Return the optimizer's state of a parameter group, which DeepSpeed keeps as one flat parameter."""
        state: dict[str, Tensor] = self.optimizers[0].state.get(self.optimizers[0].param_groups[group]["params"][0], {})
        return state

    def iter_parameter_shards(self) -> Iterator[ParameterShard]:
        for fragment in self.iter_local_fragments():
            state = self.group_state(fragment.group)
            tensors = {kind: value[fragment.slice] for kind, value in state.items() if kind != "step"}
            tensors["weight"] = fragment.weight
            if self.ema_weights:
                tensors["average"] = self.ema_weights[str(fragment.group)][fragment.slice]
            steps = float(state["step"]) if "step" in state else None
            yield ParameterShard(fragment.name, fragment.start, tensors, steps)

    @torch.no_grad()
    def restore_state(self, checkpoint: Checkpoint) -> None:
        names = checkpoint.parameter_names
        if any(checkpoint.list_optimizer_tensors(name) - {"exp_avg", "exp_avg_sq"} for name in names):
            raise CheckpointError(OPTIMIZER_MISMATCH)
        self.recipe.model.load_state_dict(checkpoint.read_model_state(self.recipe.model))
        for group in self.optimizers[0].param_groups:
            flat = group["params"][0]
            steps = torch.tensor(float(checkpoint.step), device=flat.device if group["fused"] else "cpu")
            moments = {kind: torch.zeros_like(flat) for kind in ("exp_avg", "exp_avg_sq")}
            self.optimizers[0].state[flat] = moments | {"step": steps}
        for shard in self.iter_parameter_shards():
            for kind, tensor in shard.tensors.items():
                value = checkpoint.read_tensor(shard.name, kind, shard.start, shard.start + len(tensor))
                if value is not None:
                    tensor.copy_(value)

    def backward(self, loss: Tensor, is_accumulating: bool) -> None:
        """Compute the gradients of a micro-batch; those of several are summed in fp32.

        DeepSpeed would sum them in fp32 only with an optimizer other than that of ZeRO.
        """
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
    """Return the norm over the gradients of all processes, of which each holds its own part.

    This replaces DeepSpeed's function, which launches several kernels for every parameter.
    """
    norms = torch._foreach_norm(gradients, dtype=torch.float32)
    squared = torch.stack(norms).double().square().sum()
    dist.all_reduce(squared)
    return squared.sqrt().float()


def build_deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a recipe.

    It does not set the batch size or the learning rate: the recipe makes the batches and the trainer sets the rate.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,  # gradients are reduced in step(), when none is missing any more
        "gradient_clipping": recipe.max_grad_norm,
        # DeepSpeed's check for infinities waits for one kernel per parameter (0.2 s); the trainer checks the norm.
        "bf16": {"enabled": recipe.precision == torch.bfloat16, "check_grad_overflow": False},
        "zero_optimization": {"stage": 1, "overlap_comm": False, "contiguous_gradients": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def prepare_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed, set up for a device, and return the module; raise MissingDependency if it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError:
        raise MissingDependency("ZeRO-1 over AdamW needs DeepSpeed: pip install omnivideo[train]") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # again: the import sets it to INFO
    if device.type == "cpu":  # no operator needs compiling: the shared-memory collectives are for inference
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    module: ModuleType = deepspeed
    return module

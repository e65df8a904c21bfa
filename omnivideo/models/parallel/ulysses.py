"""Sequence parallelism (Ulysses) for the decoder: each process of a group holds a part of each sample's tokens.

Decoder tokens and condition tokens are divided into equal parts; everything but attention works on one part. For
attention, DeepSpeed's `DistributedAttention` exchanges tokens for heads and back, so each process sees the full
sequence for some of the heads. This applies to self-attention and cross-attention, so no process holds the full
embedded condition, which is long in editing. If a sequence does not divide evenly, the last parts are padded, and the
padding is removed before attention.

Every process of a group obtains the same full velocity and the same loss. The gradient of the gather is therefore
multiplied by the number of processes, so that the mean over all processes is the gradient, as in data parallelism. Data
and sequence parallelism can be combined freely, and losses that do not involve the decoder (Eq. 1) need no special
treatment.

Diffusers' own context parallelism does not fit: it keeps the full condition on every process, requires sequences that
divide evenly, needs an accelerator API on CPUs, and sums its gradients, which is wrong for Eq. 1.

Shapes: B batch, S decoder tokens, L condition tokens, D width, H heads, E head width, P patch channels, X any; lower
case (s, l, h) is the part of one process, and 1 is a dimension of size one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from omnivideo.errors import InvalidInput, MissingDependency


def take_local_part(full_BSX: Tensor, rank: int, world_size: int) -> Tensor:
    """Return the rank's part along dimension 1, padded with zeros to the common length of all parts."""
    part_length = -(-full_BSX.shape[1] // world_size)
    local_BsX = full_BSX[:, rank * part_length : (rank + 1) * part_length]
    missing = part_length - local_BsX.shape[1]
    return F.pad(local_BsX, (0, 0) * (local_BsX.ndim - 2) + (0, missing)) if missing else local_BsX


class SequenceGather(torch.autograd.Function):
    """Concatenates the parts [B, s, X] of all processes; its gradient is multiplied by their number."""

    @staticmethod
    def forward(ctx: Any, local_BsX: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.world = dist.get_rank(group), dist.get_world_size(group)
        parts = [torch.empty_like(local_BsX) for _ in range(ctx.world)]
        dist.all_gather(parts, local_BsX.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return take_local_part(grads[0], ctx.rank, ctx.world) * ctx.world, None


def attend_local_heads(query_BShE: Tensor, key_BLhE: Tensor, value_BLhE: Tensor, key_length: int) -> Tensor:
    """Compute attention for this process's heads over the first `key_length` keys; the others are padding."""
    query, key, value = (
        x.transpose(1, 2) for x in (query_BShE, key_BLhE[:, :key_length], value_BLhE[:, :key_length])
    )  # fmt: skip
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def apply_rotary(x_BsHE: Tensor, cos_1s1E: Tensor, sin_1s1E: Tensor) -> Tensor:
    """Apply rotary position embeddings to pairs of neighbouring channels, as Wan does."""
    even, odd = torch.unflatten(x_BsHE, -1, (-1, 2)).unbind(-1)
    cos, sin = cos_1s1E[..., 0::2], sin_1s1E[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x_BsHE)


class UlyssesProcessor:
    """An attention processor for all attention layers of one decoder in a group of processes.

    `condition_length` and `token_length` are the full lengths in the latest forward pass. They stay valid in its
    backward pass, which precedes the next forward pass.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.attend_across_group = import_distributed_attention()(
            attend_local_heads, group, scatter_idx=2, gather_idx=1
        )
        self.condition_length = self.token_length = 0

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return [B, s, D]: attention to all S tokens if their `rotary_emb` is given, otherwise to the condition."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(source)))
        key_length = self.condition_length
        if rotary_emb is not None:
            key_length = rotary_emb[0].shape[1]
            tables = [take_local_part(table, self.rank, self.world_size) for table in rotary_emb]
            query, key = apply_rotary(query, *tables), apply_rotary(key, *tables)
        attended = self.attend_across_group(query, key, value, 0, None, key_length)
        output: Tensor = attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))
        return output

    # ---------------------------------------------------------------- hooks on the decoder's modules

    def split_condition_tokens(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        self.condition_length = args[0].shape[1]
        return (take_local_part(args[0], self.rank, self.world_size),)

    def split_decoder_tokens(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.token_length = args[0].shape[1]
        return (take_local_part(args[0], self.rank, self.world_size), *args[1:])

    def gather_velocity(self, module: nn.Module, args: tuple[Any, ...], velocity_BsP: Tensor) -> Tensor:
        velocity_BSP: Tensor = SequenceGather.apply(velocity_BsP, self.group)  # type: ignore[no-untyped-call]
        return velocity_BSP[:, : self.token_length]


def import_distributed_attention() -> Callable[..., Any]:
    """Return DeepSpeed's DistributedAttention class; raise MissingDependency if DeepSpeed is not installed."""
    try:
        from deepspeed.sequence.layer import DistributedAttention
    except ImportError:
        raise MissingDependency("sequence parallelism needs DeepSpeed: pip install omnivideo[train]") from None
    attention_class: Callable[..., Any] = DistributedAttention
    return attention_class


def enable_sequence_parallel(decoder: WanTransformer3DModel, group: dist.ProcessGroup) -> None:
    """Divide the tokens of each sample among a group of processes.

    Raises InvalidInput if the number of processes does not divide the number of attention heads.
    """
    world_size, heads = dist.get_world_size(group), decoder.config.num_attention_heads
    if heads % world_size:
        raise InvalidInput(
            "sequence-parallel", f"{world_size} is not a divisor of the decoder's {heads} attention heads"
        )
    ulysses = UlyssesProcessor(group)
    decoder.set_attn_processor(ulysses)
    decoder.condition_embedder.text_embedder.register_forward_pre_hook(ulysses.split_condition_tokens)
    decoder.blocks[0].register_forward_pre_hook(ulysses.split_decoder_tokens)
    decoder.proj_out.register_forward_hook(ulysses.gather_velocity)

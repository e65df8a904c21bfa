"""Carry out a placement: parts that take turns on a GPU, decoders in blocks, and blocks that are cast on a CPU.

    place_parts(parts, placement, device, release_pages)

Weights outside the GPU stay where they were loaded, usually mapped from their files. A copy on the GPU or in another
type is made when a module is called and dropped afterwards; nothing is copied back.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration

from omnivideo.models.placement import Placement
from omnivideo.models.vila import Vila

PageRelease = Callable[[Iterable[Tensor]], None]  # gives the memory of tensors that are mapped from files back
HALF_DTYPES = (torch.bfloat16, torch.float16)
MIN_RELEASED_BYTES = 256 << 20  # smaller parts keep their pages


def place_parts(
    parts: Mapping[str, nn.Module], placement: Placement, device: torch.device, release_pages: PageRelease | None = None
) -> None:
    """Let each part compute where the placement says; `device` is the GPU, or what a test uses for one.

    If the weights do not fit into memory, `release_pages` gets those of each block after they were used on the CPU or
    copied to the device.
    """
    release_pages = release_pages if placement.reads_from_disk else None
    turns = PartTurns(device, release_pages)
    needs_room = placement.list_parts_that_need_room()
    for name, module in parts.items():
        part = placement.find_part(name)
        if part.location == "gpu-in-turn" and list_entries(module):
            turns.add_part(module)
        elif part.location in ("gpu", "gpu-in-turn"):
            module.to(device)  # markers have no forward pass that could bring them
        elif part.location == "gpu-in-blocks":
            offload_in_blocks(module, device)
        if name in needs_room:
            turns.add_part(module, visits=False)
        if part.location == "cpu":
            is_large = part.size.weights_bytes >= MIN_RELEASED_BYTES
            to_float32 = part.compute_dtype != part.size.dtype
            compute_in_blocks(module, to_float32, release_pages if is_large else None)
            if placement.mode != "CPU":
                move_inputs(module, torch.device("cpu"))


def list_entries(module: nn.Module) -> list[nn.Module]:
    """Return the modules of a part whose forward passes are called from outside."""
    if isinstance(module, AutoencoderKLWan):
        return [module.encoder, module.decoder, module.quant_conv, module.post_quant_conv]
    if isinstance(module, Vila):
        embeddings = module.get_input_embeddings()
        return [module.vision_tower, module.projector, module.llm, module.llm.model, embeddings]
    if isinstance(module, (Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration)):
        return [module, module.model]
    return [] if type(module).forward is nn.Module.forward else [module]


def convert_inputs(value: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Return an argument with its tensors on a device, and those of floating point in a type; None changes nothing.

    Tuples are searched. Lists stay as they are: the VAE changes its caches in place.
    """
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if type(value) is tuple:
        return tuple(convert_inputs(entry, device, dtype) for entry in value)
    return value


def convert_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device | None, dtype: torch.dtype | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a forward pass as `convert_inputs` does each."""
    converted = {name: convert_inputs(value, device, dtype) for name, value in kwargs.items()}
    return tuple(convert_inputs(value, device, dtype) for value in args), converted


def move_inputs(module: nn.Module, device: torch.device) -> None:
    """Bring the inputs of a part to the device that it computes on."""
    for entry in list_entries(module):
        entry.register_forward_pre_hook(
            lambda module, args, kwargs: convert_call(args, kwargs, device), prepend=True, with_kwargs=True
        )


# ---------------------------------------------------------------- parts in turn


class PartTurns:
    """Parts of which one visits the device at a time. It comes when it is called, and stays until the room is needed.

    Parts that are always there can take turns too: no other one is there while they compute. A lock keeps a part there
    during a forward pass, since a service writes text and renders in two threads.
    """

    def __init__(self, device: torch.device, release_pages: PageRelease | None = None):
        self.device, self.release_pages = device, release_pages
        self.lock = threading.RLock()
        self.present: nn.Module | None = None
        self.originals: list[tuple[Tensor, Tensor]] = []  # each weight of the part that is present, and its own data

    def add_part(self, module: nn.Module, visits: bool = True) -> None:
        """Let a part take turns with those that were added before; one that does not visit only sends others away."""

        def enter(entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.lock.acquire()
            self.bring(module if visits else None)
            return convert_call(args, kwargs, self.device)

        for entry in list_entries(module):
            entry.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
            entry.register_forward_hook(lambda *call: self.lock.release(), always_call=True)

    def bring(self, module: nn.Module | None) -> None:
        """Copy a part to the device after the one that is there has left; None only lets that one leave."""
        if self.present is module:
            return
        for tensor, data in self.originals:
            tensor.data = data
        self.present, self.originals = None, []
        if module is None:
            return
        for tensor in (*module.parameters(), *module.buffers()):
            self.originals.append((tensor, tensor.data))
            tensor.data = tensor.data.to(self.device)
        self.present = module
        if self.release_pages:
            self.release_pages(data for _, data in self.originals)


# ---------------------------------------------------------------- blocks


def offload_in_blocks(decoder: nn.Module, device: torch.device) -> None:
    """Let a decoder's blocks come to the device one after the other; on a GPU the next is copied meanwhile."""
    on_gpu = device.type == "cuda"
    apply_group_offloading(
        decoder, onload_device=device, num_blocks_per_group=1, use_stream=on_gpu, low_cpu_mem_usage=on_gpu
    )


def iterate_blocks(module: nn.Module) -> Iterator[tuple[nn.Module, Sequence[Tensor]]]:
    """Yield the blocks of a part with their weights: entries of lists, and other modules with weights of their own.

    Tables of embeddings are left out: rows are taken from them, and nothing is computed.
    """
    is_list = isinstance(module, nn.ModuleList | nn.Sequential)
    for child in module.children():
        if is_list or isinstance(child, nn.MultiheadAttention):  # which reads the weights of its own child
            yield child, list(child.parameters())
        else:
            yield from iterate_blocks(child)
    own_weights = list(module.parameters(recurse=False))
    if own_weights and not isinstance(module, nn.Embedding):
        yield module, own_weights


def compute_in_blocks(part: nn.Module, to_float32: bool, release_pages: PageRelease | None = None) -> None:
    """Let each block of a part compute in float32, and give back the pages of its weights after its forward pass.

    The weights keep their type. They are cast for the forward pass, and what was cast is dropped again.
    """
    for module, weights in iterate_blocks(part):
        needs_cast = to_float32 and any(weight.dtype in HALF_DTYPES for weight in weights)
        if needs_cast or release_pages:
            block = BlockPass(weights, needs_cast, release_pages)
            module.register_forward_pre_hook(block.enter, with_kwargs=True)
            module.register_forward_hook(block.leave, always_call=True)


class BlockPass:
    """The hooks of one block. A lock keeps a second thread from casting the same weights."""

    def __init__(self, weights: Sequence[Tensor], to_float32: bool, release_pages: PageRelease | None):
        self.weights, self.to_float32, self.release_pages = weights, to_float32, release_pages
        self.originals: list[Tensor] = []
        self.lock = threading.Lock()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cast the weights and the inputs."""
        self.lock.acquire()
        self.originals = [weight.data for weight in self.weights]
        if not self.to_float32:
            return args, kwargs
        for weight in self.weights:
            weight.data = weight.data.float()
        return convert_call(args, kwargs, None, torch.float32)

    def leave(self, *call: object) -> None:
        """Restore the weights, which frees what was cast."""
        for weight, data in zip(self.weights, self.originals, strict=True):
            weight.data = data
        if self.release_pages:
            self.release_pages(self.originals)
        self.originals = []
        self.lock.release()

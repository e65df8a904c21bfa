"""Batches made ahead of their use, by worker processes: a GPU would wait for the rendering and the tokenizer."""

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")
MAX_STEP = 2**40
ALIGNMENT_BYTES = 16  # bytes: no type has larger elements


class TensorPickler(pickle.Pickler):
    """Leaves the tensors out, and keeps them."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self.tensors[pid]


@dataclass
class PackedTensors:
    """Anything, with the bytes of all its tensors in one: each that a worker hands over takes an open file."""

    pickle_bytes: bytes
    layouts: list[tuple[int, torch.dtype, torch.Size]]
    buffer: Tensor

    @classmethod
    def pack(cls, value: object) -> "PackedTensors":
        pickler = TensorPickler(file := io.BytesIO())
        pickler.dump(value)
        layouts, end = [], 0
        for tensor in pickler.tensors:
            layouts.append((end, tensor.dtype, tensor.shape))
            end += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        buffer = torch.empty(end, dtype=torch.uint8)
        for (start, *_), tensor in zip(layouts, pickler.tensors, strict=True):
            buffer[start : start + tensor.nbytes] = tensor.flatten().view(torch.uint8)
        return cls(file.getvalue(), layouts, buffer)

    def unpack(self) -> Any:
        """The tensors are parts of the one: nothing is copied."""
        sizes = [shape.numel() * dtype.itemsize for _, dtype, shape in self.layouts]
        tensors = [
            self.buffer[start : start + size].view(dtype).view(shape)
            for (start, dtype, shape), size in zip(self.layouts, sizes, strict=True)
        ]
        return TensorUnpickler(io.BytesIO(self.pickle_bytes), tensors).load()


class PackedDataset(Dataset[PackedTensors]):
    """What `make` makes of each key."""

    def __init__(self, make_item: Callable[[int], object]):
        self.make_item = make_item

    def __getitem__(self, key: int) -> PackedTensors:
        return PackedTensors.pack(self.make_item(key))


def return_unchanged(value: T) -> T:
    return value


def map_in_order(make_item: Callable[[int], T], keys: Sequence[int], workers: int) -> Iterator[T]:
    """`make(key)` for key after key, by so many processes (0: here, as they are asked for)."""
    if not workers:
        yield from map(make_item, keys)
        return
    # A generator of its own: the loader would take its seed from the one that the trainer has just seeded.
    loader = DataLoader(
        PackedDataset(make_item), sampler=keys, batch_size=None, num_workers=workers, generator=torch.Generator(),
        collate_fn=return_unchanged, prefetch_factor=4, multiprocessing_context="fork",
    )  # fmt: skip
    for packed in loader:
        yield packed.unpack()


class Prefetcher(Generic[T]):
    """`make(step)`, which may not hang on anything but the step; steps are expected to be asked for in order."""

    def __init__(self, make_item: Callable[[int], T], workers: int = 0):
        self.make_item, self.workers = make_item, workers
        self.iterator: Iterator[T] | None = None
        self.next_step = -1

    def __call__(self, step: int) -> T:
        if not self.workers:
            return self.make_item(step)
        if self.iterator is None or step != self.next_step:
            self.iterator = map_in_order(self.make_item, range(step, MAX_STEP), self.workers)
        self.next_step = step + 1
        return next(self.iterator)

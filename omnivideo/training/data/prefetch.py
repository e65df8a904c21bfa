"""Prepare batches ahead of their use in worker processes, so that the GPU does not wait for rendering or tokenizing."""

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
    """A pickler that leaves tensors out of the bytes and collects them in `tensors`."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        """Return a tensor's index in `tensors`; None pickles any other object as usual."""
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class TensorUnpickler(pickle.Unpickler):
    """The inverse of TensorPickler."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        """Return the tensor of that index."""
        return self.tensors[pid]


@dataclass
class PackedTensors:
    """A pickled value with the bytes of all its tensors in one buffer.

    Each tensor that a worker process hands over takes an open file; this takes one.
    """

    pickle_bytes: bytes
    layouts: list[tuple[int, torch.dtype, torch.Size]]
    buffer: Tensor

    @classmethod
    def pack(cls, value: object) -> "PackedTensors":
        """Pickle a value and copy its tensors into one buffer."""
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
        """Return the value; its tensors are views of the buffer, without a copy."""
        sizes = [shape.numel() * dtype.itemsize for _, dtype, shape in self.layouts]
        tensors = [
            self.buffer[start : start + size].view(dtype).view(shape)
            for (start, dtype, shape), size in zip(self.layouts, sizes, strict=True)
        ]
        return TensorUnpickler(io.BytesIO(self.pickle_bytes), tensors).load()


class PackedDataset(Dataset[PackedTensors]):
    """The packed results of `make_item` for each key."""

    def __init__(self, make_item: Callable[[int], object]):
        self.make_item = make_item

    def __getitem__(self, key: int) -> PackedTensors:
        return PackedTensors.pack(self.make_item(key))


def return_unchanged(value: T) -> T:
    """Return the value; the loader's default collation would convert it."""
    return value


def map_in_order(make_item: Callable[[int], T], keys: Sequence[int], workers: int) -> Iterator[T]:
    """Yield `make_item(key)` for each key, computed by worker processes, or on demand in this one if `workers` is 0."""
    if not workers:
        yield from map(make_item, keys)
        return
    # Without its own generator the loader would advance the one that the trainer has just seeded.
    loader = DataLoader(
        PackedDataset(make_item), sampler=keys, batch_size=None, num_workers=workers, generator=torch.Generator(),
        collate_fn=return_unchanged, prefetch_factor=4, multiprocessing_context="fork",
    )  # fmt: skip
    for packed in loader:
        yield packed.unpack()


class Prefetcher(Generic[T]):
    """Calls `make_item(step)` ahead of its use; the result must depend on the step alone.

    The workers are restarted if steps are not requested in order.
    """

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

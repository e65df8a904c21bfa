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
FOREVER = 2**40
ALIGNED = 16  # bytes: no type has larger elements


class Apart(pickle.Pickler):
    """Leaves the tensors out, and keeps them."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class Joined(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self.tensors[pid]


@dataclass
class Packed:
    """Anything, with the bytes of all its tensors in one: each that a worker hands over takes an open file."""

    rest: bytes
    places: list[tuple[int, torch.dtype, torch.Size]]
    flat: Tensor

    @classmethod
    def of(cls, one: object) -> "Packed":
        pickler = Apart(file := io.BytesIO())
        pickler.dump(one)
        places, end = [], 0
        for tensor in pickler.tensors:
            places.append((end, tensor.dtype, tensor.shape))
            end += -(-tensor.nbytes // ALIGNED) * ALIGNED
        flat = torch.empty(end, dtype=torch.uint8)
        for (start, *_), tensor in zip(places, pickler.tensors, strict=True):
            flat[start : start + tensor.nbytes] = tensor.flatten().view(torch.uint8)
        return cls(file.getvalue(), places, flat)

    def unpacked(self) -> Any:
        """The tensors are parts of the one: nothing is copied."""
        sizes = [shape.numel() * dtype.itemsize for _, dtype, shape in self.places]
        tensors = [
            self.flat[start : start + size].view(dtype).view(shape)
            for (start, dtype, shape), size in zip(self.places, sizes, strict=True)
        ]
        return Joined(io.BytesIO(self.rest), tensors).load()


class Made(Dataset[Packed]):
    """What `make` makes of each key."""

    def __init__(self, make: Callable[[int], object]):
        self.make = make

    def __getitem__(self, key: int) -> Packed:
        return Packed.of(self.make(key))


def as_it_is(one: T) -> T:
    return one


def in_order(make: Callable[[int], T], keys: Sequence[int], workers: int) -> Iterator[T]:
    """`make(key)` for key after key, by so many processes (0: here, as they are asked for)."""
    if not workers:
        yield from map(make, keys)
        return
    # A generator of its own: the loader would take its seed from the one that the trainer has just seeded.
    loader = DataLoader(
        Made(make), sampler=keys, batch_size=None, num_workers=workers, generator=torch.Generator(),
        collate_fn=as_it_is, prefetch_factor=4, multiprocessing_context="fork",
    )  # fmt: skip
    for packed in loader:
        yield packed.unpacked()


class Ahead(Generic[T]):
    """`make(step)`, which may not hang on anything but the step; steps are expected to be asked for in order."""

    def __init__(self, make: Callable[[int], T], workers: int = 0):
        self.make, self.workers = make, workers
        self.coming: Iterator[T] | None = None
        self.next = -1

    def __call__(self, step: int) -> T:
        if not self.workers:
            return self.make(step)
        if self.coming is None or step != self.next:
            self.coming = in_order(self.make, range(step, FOREVER), self.workers)
        self.next = step + 1
        return next(self.coming)

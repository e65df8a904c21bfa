"""Batches made ahead of their use, by worker processes: a GPU would wait for the rendering and the tokenizer."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")
FOREVER = 2**40


class Made(Dataset[Tensor]):
    """What `make` makes of each key, in one tensor: each that a worker hands over takes an open file."""

    def __init__(self, make: Callable[[int], object]):
        self.make = make

    def __getitem__(self, key: int) -> Tensor:
        file = io.BytesIO()
        torch.save(self.make(key), file)
        return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


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
    for flat in loader:
        yield torch.load(io.BytesIO(flat.numpy()), weights_only=False)  # what a process of this very run has made


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

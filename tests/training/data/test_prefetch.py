"""Batches from worker processes arrive complete, in order, and with all tensors in one buffer."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from omnivideo.training.data.prefetch import PackedTensors, Prefetcher

KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64)


@dataclass
class Batch:
    step: int
    many: list[Tensor]
    named: dict[str, Tensor | None]
    words: tuple[str, ...] = ("a", "b")
    empty: Tensor = field(default_factory=lambda: torch.zeros(0, 3, 5))


def make_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    many = [torch.randint(0, 2, (3, 7), generator=generator).to(kind) for kind in KINDS]
    return Batch(step, [*many, many[0].T, many[0][:, 1:4], torch.tensor(4.5)], {"x": many[1], "none": None})


def is_equal(one: Batch, other: Batch) -> bool:
    pairs = [*zip(one.many, other.many, strict=True), (one.named["x"], other.named["x"]), (one.empty, other.empty)]
    return (one.step, one.words, one.named["none"]) == (other.step, other.words, other.named["none"]) and all(
        first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
        for first, second in pairs
    )


def test_packed_batches_are_unpacked_unchanged_without_a_copy():
    packed = PackedTensors.pack(make_batch(3))
    unpacked = packed.unpack()
    assert is_equal(unpacked, make_batch(3))
    buffer_addresses = range(packed.buffer.data_ptr(), packed.buffer.data_ptr() + packed.buffer.nbytes)
    assert all(one.data_ptr() in buffer_addresses for one in unpacked.many)
    assert PackedTensors.pack(["no", "tensors"]).unpack() == ["no", "tensors"]


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_arrive_in_order_even_after_a_jump(workers):
    prefetcher = Prefetcher(make_batch, workers)
    assert all(is_equal(prefetcher(step), make_batch(step)) for step in (0, 1, 2, 7, 8, 3))

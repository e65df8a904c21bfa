"""Batches from worker processes: whole, in order, and with all their tensors in one."""

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


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    many = [torch.randint(0, 2, (3, 7), generator=generator).to(kind) for kind in KINDS]
    return Batch(step, [*many, many[0].T, many[0][:, 1:4], torch.tensor(4.5)], {"x": many[1], "none": None})


def same(one: Batch, other: Batch) -> bool:
    pairs = [*zip(one.many, other.many, strict=True), (one.named["x"], other.named["x"]), (one.empty, other.empty)]
    return (one.step, one.words, one.named["none"]) == (other.step, other.words, other.named["none"]) and all(
        first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
        for first, second in pairs
    )


def test_what_is_packed_comes_out_as_it_was_without_a_copy():
    packed = PackedTensors.pack(batch(3))
    found = packed.unpack()
    assert same(found, batch(3))
    within = range(packed.buffer.data_ptr(), packed.buffer.data_ptr() + packed.buffer.nbytes)
    assert all(one.data_ptr() in within for one in found.many)
    assert PackedTensors.pack(["no", "tensors"]).unpack() == ["no", "tensors"]


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_come_in_order_also_after_a_jump(workers):
    ahead = Prefetcher(batch, workers)
    assert all(same(ahead(step), batch(step)) for step in (0, 1, 2, 7, 8, 3))

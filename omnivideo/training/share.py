"""This process's share of a batch.

A recipe draws every batch whole (its data, noise and drops follow from the step alone) and then takes its share of
it, so the shares of N processes are together the batch of one.  The trainer says whose share it is; alone it is all.
A mean over something that batches have unequally (tokens of an answer) is taken over all shares: `mean`, `longest`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from omnivideo.errors import InvalidInput


class Share:
    """The share of a process alone; several processes have theirs in `distributed.py`."""

    rank = 0
    world = 1

    def take(self, whole: Any) -> Any:
        """The rows of a list, tuple or tensor that are this process's.

        Raises InvalidInput where they cannot be dealt out evenly.
        """
        if len(whole) % self.world:
            raise InvalidInput("processes", f"a batch of {len(whole)} samples does not divide by {self.world}")
        return whole[self.part(len(whole))]

    def part(self, count: int) -> slice:
        """Which of so many rows are this process's: the first processes have one more where they do not divide."""
        each, left = divmod(count, self.world)
        start = self.rank * each + min(self.rank, left)
        return slice(start, start + each + (self.rank < left))

    def mean(self, counts: Tensor) -> Tensor:
        """Counts of this share, averaged over all shares: what sums are divided by, to be one batch's mean."""
        return counts

    def longest(self, length: int) -> int:
        """The greatest length of all shares."""
        return length

    def average(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Each loss averaged over the shares that have it."""
        return dict(losses)


CURRENT: ContextVar[Share] = ContextVar("share")
ALONE = Share()


def share() -> Share:
    """Whose share of the batch is asked for here: all of it, outside of a trainer."""
    return CURRENT.get(ALONE)


@contextmanager
def sharing(one: Share) -> Iterator[None]:
    token = CURRENT.set(one)
    try:
        yield
    finally:
        CURRENT.reset(token)

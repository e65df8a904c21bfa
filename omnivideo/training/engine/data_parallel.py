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


class DataParallelRank:
    """The share of a process alone; several processes have theirs in `distributed.py`."""

    rank = 0
    world_size = 1

    def take_local_rows(self, rows: Any) -> Any:
        """The rows of a list, tuple or tensor that are this process's.

        Raises InvalidInput where they cannot be dealt out evenly.
        """
        if len(rows) % self.world_size:
            raise InvalidInput("processes", f"a batch of {len(rows)} samples does not divide by {self.world_size}")
        return rows[self.local_slice(len(rows))]

    def local_slice(self, count: int) -> slice:
        """Which of so many rows are this process's: the first processes have one more where they do not divide."""
        base_count, remainder = divmod(count, self.world_size)
        start = self.rank * base_count + min(self.rank, remainder)
        return slice(start, start + base_count + (self.rank < remainder))

    def global_mean(self, counts: Tensor) -> Tensor:
        """Counts of this share, averaged over all shares: what sums are divided by, to be one batch's mean."""
        return counts

    def global_max(self, length: int) -> int:
        """The greatest length of all shares."""
        return length

    def average_losses(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Each loss averaged over the shares that have it."""
        return dict(losses)


CURRENT_RANK: ContextVar[DataParallelRank] = ContextVar("share")
SINGLE_RANK = DataParallelRank()


def current_rank() -> DataParallelRank:
    """Whose share of the batch is asked for here: all of it, outside of a trainer."""
    return CURRENT_RANK.get(SINGLE_RANK)


@contextmanager
def use_rank(rank: DataParallelRank) -> Iterator[None]:
    token = CURRENT_RANK.set(rank)
    try:
        yield
    finally:
        CURRENT_RANK.reset(token)

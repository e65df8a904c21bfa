"""Data parallelism: which part of a batch this process takes.

A recipe makes the global batch in every process, because data, noise and dropout depend on the step alone, and then
takes this process's part. The parts of N processes together are the batch of one process. The trainer sets the rank;
outside of a trainer the part is the global batch. Some quantities vary between samples, such as the tokens of an
answer: their means and maxima are taken over all ranks (`global_mean`, `global_max`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from omnivideo.errors import InvalidInput


class DataParallelRank:
    """The rank of a process that trains alone; distributed/processes.py has the rank of one of several."""

    rank = 0
    world_size = 1

    def take_local_rows(self, rows: Any) -> Any:
        """Return this rank's rows of a list, tuple or tensor; raise InvalidInput if they do not divide evenly."""
        if len(rows) % self.world_size:
            raise InvalidInput("processes", f"a batch of {len(rows)} samples does not divide by {self.world_size}")
        return rows[self.local_slice(len(rows))]

    def local_slice(self, count: int) -> slice:
        """Return this rank's slice of `count` rows; if they do not divide evenly, the first ranks get one row more."""
        base_count, remainder = divmod(count, self.world_size)
        start = self.rank * base_count + min(self.rank, remainder)
        return slice(start, start + base_count + (self.rank < remainder))

    def global_mean(self, counts: Tensor) -> Tensor:
        """Return counts averaged over all ranks.

        A sum divided by it, averaged over the ranks, is the mean over the global batch.
        """
        return counts

    def global_max(self, length: int) -> int:
        """Return the maximum of a length over all ranks."""
        return length

    def average_losses(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Return each loss averaged over the ranks that have it."""
        return dict(losses)


CURRENT_RANK: ContextVar[DataParallelRank] = ContextVar("data_parallel_rank")
SINGLE_RANK = DataParallelRank()


def current_rank() -> DataParallelRank:
    """Return the rank whose part of the batch is computed; outside of a trainer it is the only rank."""
    return CURRENT_RANK.get(SINGLE_RANK)


@contextmanager
def use_rank(rank: DataParallelRank) -> Iterator[None]:
    """Make `rank` the current rank within the context."""
    token = CURRENT_RANK.set(rank)
    try:
        yield
    finally:
        CURRENT_RANK.reset(token)

"""The limits on jobs: how many may wait and be open, and what each key may use in a day."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Engine, Executable, Row, Update, and_, or_, select, update

from omnivideo.errors import LIMIT_CODE, LimitReached, ServiceBusy
from omnivideo.records import KeyLimits
from omnivideo.storage.database.job_rows import LANES, build_count_subqueries
from omnivideo.storage.database.repository import unix_now
from omnivideo.storage.database.schema import jobs
from omnivideo.storage.database.usage import (
    DAILY_LIMITS,
    UsageCounter,
    build_daily_error,
    build_limit,
    build_used_today,
    select_exhausted_owners,
)

EXACT_COUNT_BELOW = 1000  # limits below this are checked with an exact count at every submit
COUNT_CACHE_SECONDS = 1.0  # how long a count that is far from its limit is reused
EXHAUSTED_TEXT = "the share of the day that this key may use was used up before the clip was begun"


@dataclass
class QueueCounts:
    """The numbers of queued jobs and of an owner's open jobs when last counted, and this process's submits since.

    `max_owner_open` is the owner's limit, 0 for none.
    """

    queued: int
    owner_open: int
    max_owner_open: int
    has_daily_limit: bool
    counted_at: float
    submitted_since: int = 0


class JobLimits(UsageCounter):
    """`max_queued_jobs` is the limit of all owners; `defaults` are those of owners that have no own ones."""

    def __init__(self, engine: Engine, max_queued_jobs: int, defaults: KeyLimits):
        super().__init__(engine)
        self.max_queued_jobs, self.defaults = max_queued_jobs, defaults
        self.queue_counts: dict[str, QueueCounts] = {}

    def build_limit_conditions(self, owner: str) -> list[ColumnElement[bool]]:
        """Return what must hold for a new job of the owner; nothing if no limit is near."""
        counts = self.get_counts(owner)
        conditions: list[ColumnElement[bool]] = []
        if self.is_near(counts):
            queued, owner_open = build_count_subqueries(owner)
            limit = build_limit(owner, "open_jobs", self.defaults)
            conditions = [queued < self.max_queued_jobs, or_(limit == 0, owner_open < limit)]
        if counts.has_daily_limit:
            for limit_column, used_column, _ in DAILY_LIMITS:
                limit = build_limit(owner, limit_column, self.defaults)
                conditions.append(or_(limit == 0, build_used_today(owner, used_column) < limit))
        return conditions

    def insert_within_limits(self, owner: str, insertion: Executable, is_near: bool) -> Sequence[Row[Any]]:
        """Run the insertion of a job; near a limit, those of an owner run one after the other, so that it holds."""
        return self.fetch_in_turn(f"submit {owner}", insertion) if is_near else self.fetch_all(insertion)

    def get_counts(self, owner: str) -> QueueCounts:
        """Return the counts of the last second. Counting gets slower as more jobs wait."""
        counts = self.queue_counts.get(owner)
        if counts is None or time.monotonic() - counts.counted_at > COUNT_CACHE_SECONDS:
            queued, owner_open = build_count_subqueries(owner)
            daily = [build_limit(owner, limit_column, self.defaults) > 0 for limit_column, _, _ in DAILY_LIMITS]
            limit = build_limit(owner, "open_jobs", self.defaults)
            columns = {
                "queued": queued,
                "owner_open": owner_open,
                "max_owner_open": limit,
                "has_daily_limit": or_(*daily),
            }
            row = self.fetch_one(select(*(column.label(name) for name, column in columns.items())))
            assert row is not None
            counts = self.queue_counts[owner] = QueueCounts(**row._mapping, counted_at=time.monotonic())
        counts.submitted_since += 1
        return counts

    def is_near(self, counts: QueueCounts) -> bool:
        """Return whether a limit may be near, so that a submit must count."""
        limits = ((counts.queued, self.max_queued_jobs), (counts.owner_open, counts.max_owner_open))
        return any(
            limit and (limit < EXACT_COUNT_BELOW or 2 * (count + counts.submitted_since) >= limit)
            for count, limit in limits
        )

    def find_reached_limit(self, owner: str) -> ServiceBusy:
        """Return the error that names the limit for which a job of the owner was refused."""
        owner_open, limit = build_count_subqueries(owner)[1], build_limit(owner, "open_jobs", self.defaults)
        daily = [
            (build_limit(owner, limit_column, self.defaults), build_used_today(owner, used_column))
            for limit_column, used_column, _ in DAILY_LIMITS
        ]
        row = self.fetch_one(select(*(column for pair in ((limit, owner_open), *daily) for column in pair)))
        assert row is not None
        max_open, open_count, *daily_counts = tuple(row)
        for (_, _, name), quota, used in zip(DAILY_LIMITS, daily_counts[::2], daily_counts[1::2], strict=True):
            if 0 < quota <= used:
                return build_daily_error(name, quota)
        if 0 < max_open <= open_count:
            message = f"open jobs: this key may have {max_open} queued or running clips; wait until one has ended"
            return LimitReached(message, 5.0, "open-jobs", max_open)
        return ServiceBusy("queue: too many clips are waiting; try again later", retry_after_seconds=5.0)

    def match_affordable(self) -> ColumnElement[bool]:
        """Match the jobs that may begin: their owners have not used up a share of the day. One that has begun goes on.

        Those of batches wait for the next day; `fail_exhausted_jobs` ends the others.
        """
        return or_(jobs.c.attempt > 0, jobs.c.owner.not_in(select_exhausted_owners(self.defaults)))

    def build_exhausted_ending(self) -> Update | None:
        """Return the statement that fails the interactive jobs whose owners have used up a share of the day.

        Return None if there are no such owners.
        """
        owners = [row.owner for row in self.fetch_all(select_exhausted_owners(self.defaults))]
        if not owners:
            return None
        is_waiting = and_(jobs.c.state == "queued", jobs.c.lane == LANES.index("interactive"), jobs.c.attempt == 0)
        ending = update(jobs).where(is_waiting, jobs.c.owner.in_(owners))
        return ending.values(state="failed", code=LIMIT_CODE, error=EXHAUSTED_TEXT, ended_at=unix_now())

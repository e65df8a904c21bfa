"""What the service's metrics say about jobs, computed from their rows: the same in every process."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, case, func, select

from omnivideo.contracts import DurationCounts, JobDurations
from omnivideo.storage.database.job_rows import LANES
from omnivideo.storage.database.repository import Repository, unix_now
from omnivideo.storage.database.schema import jobs


class JobStatistics(Repository):
    """Counts of jobs, and how long they have waited and taken."""

    def count_by_lane_and_state(self) -> list[tuple[str, str, int]]:
        """Return the number of jobs of each lane and state."""
        job_count = func.count().label("job_count")
        grouped = select(jobs.c.lane, jobs.c.state, job_count).group_by(jobs.c.lane, jobs.c.state)
        return [(LANES[row.lane], row.state, row.job_count) for row in self.fetch_all(grouped)]

    def get_oldest_wait_seconds(self) -> float:
        """Return how long the oldest queued job has waited, in seconds; 0 if no job is queued."""
        row = self.fetch_one(select(unix_now() - func.min(jobs.c.created_at)).where(jobs.c.state == "queued"))
        return float(row[0] or 0.0) if row else 0.0

    def measure_durations(self, bounds: Sequence[float]) -> list[JobDurations]:
        """Return, for each lane, the times of the jobs that are done, counted up to each of the bounds in seconds.

        A job that was begun again counts from its last beginning.
        """
        queued, generated = jobs.c.started_at - jobs.c.created_at, jobs.c.ended_at - jobs.c.started_at
        columns = [*count_durations("queued", queued, bounds), *count_durations("generated", generated, bounds)]
        steps = func.coalesce(func.sum(jobs.c.step), 0).label("steps")
        is_done = (jobs.c.state == "done") & jobs.c.started_at.is_not(None) & jobs.c.ended_at.is_not(None)
        query = select(jobs.c.lane, func.count().label("job_count"), steps, *columns).where(is_done)
        return [
            JobDurations(
                lane=LANES[row.lane],
                queued=read_counts(row, "queued", bounds),
                generated=read_counts(row, "generated", bounds),
                steps=int(row.steps),
            )
            for row in self.fetch_all(query.group_by(jobs.c.lane))
        ]


def count_durations(name: str, seconds: ColumnElement[float], bounds: Sequence[float]) -> list[ColumnElement[float]]:
    """Return columns with the number of times up to each bound, and with their sum."""
    counts = [func.sum(case((seconds <= bound, 1), else_=0)) for bound in bounds]
    labelled = [count.label(f"{name}_{index}") for index, count in enumerate(counts)]
    return [*labelled, func.sum(seconds).label(f"{name}_sum")]


def read_counts(row: object, name: str, bounds: Sequence[float]) -> DurationCounts:
    counts = tuple(int(getattr(row, f"{name}_{index}")) for index in range(len(bounds)))
    job_count: int = row.job_count  # type: ignore[attr-defined]
    return DurationCounts(counts=counts, total=job_count, sum_seconds=float(getattr(row, f"{name}_sum")))

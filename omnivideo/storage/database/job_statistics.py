"""What the service's metrics say about jobs, computed from their rows and from the totals of removed rows.

It is the same in every process, and no count becomes smaller when the sweep removes rows.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, case, delete, func, select, update

from omnivideo.records import JOB_SECONDS, DurationCounts, JobDurations
from omnivideo.storage.database.job_rows import LANES
from omnivideo.storage.database.repository import Repository, unix_now
from omnivideo.storage.database.schema import job_totals, jobs

NO_DURATIONS = DurationCounts(counts=(0,) * len(JOB_SECONDS), total=0, sum_seconds=0.0)


class JobStatistics(Repository):
    """Counts of jobs, and how long they have waited and taken."""

    def count_by_lane_and_state(self) -> list[tuple[str, str, int]]:
        """Return the number of jobs of each lane and state."""
        job_count = func.count().label("job_count")
        grouped = select(jobs.c.lane, jobs.c.state, job_count).group_by(jobs.c.lane, jobs.c.state)
        counts = Counter({(row.lane, row.state): row.job_count for row in self.fetch_all(grouped)})
        for row in self.fetch_all(select(job_totals.c.lane, job_totals.c.state, job_totals.c.jobs)):
            counts[row.lane, row.state] += row.jobs
        return [(LANES[lane], state, count) for (lane, state), count in sorted(counts.items())]

    def get_oldest_wait_seconds(self) -> float:
        """Return how long the oldest queued job has waited, in seconds; 0 if no job is queued."""
        row = self.fetch_one(select(unix_now() - func.min(jobs.c.created_at)).where(jobs.c.state == "queued"))
        return float(row[0] or 0.0) if row else 0.0

    def measure_durations(self) -> list[JobDurations]:
        """Return, for each lane, the times of the jobs that are done, counted up to each of JOB_SECONDS.

        A job that was begun again counts from its last beginning.
        """
        queued, generated = jobs.c.started_at - jobs.c.created_at, jobs.c.ended_at - jobs.c.started_at
        columns = [*count_durations("queued", queued), *count_durations("generated", generated)]
        steps = func.coalesce(func.sum(jobs.c.step), 0).label("steps")
        is_done = (jobs.c.state == "done") & jobs.c.started_at.is_not(None) & jobs.c.ended_at.is_not(None)
        query = select(jobs.c.lane, func.count().label("job_count"), steps, *columns).where(is_done)
        durations = {
            row.lane: JobDurations(
                lane=LANES[row.lane],
                queued=read_counts(row, "queued"),
                generated=read_counts(row, "generated"),
                steps=int(row.steps),
            )
            for row in self.fetch_all(query.group_by(jobs.c.lane))
        }
        for row in self.fetch_all(select(job_totals).where(job_totals.c.state == "done")):
            present = durations.get(row.lane)
            durations[row.lane] = JobDurations(
                lane=LANES[row.lane],
                queued=add_counts(DurationCounts.parse_stored(row.queued), present.queued if present else NO_DURATIONS),
                generated=add_counts(
                    DurationCounts.parse_stored(row.generated), present.generated if present else NO_DURATIONS
                ),
                steps=row.steps + (present.steps if present else 0),
            )
        return [durations[lane] for lane in sorted(durations)]

    def delete_job_rows(self, job_ids: Sequence[str]) -> int:
        """Delete the rows of ended jobs and add them to the totals, in one transaction. Return their number."""
        columns = (jobs.c.lane, jobs.c.state, jobs.c.step, jobs.c.created_at, jobs.c.started_at, jobs.c.ended_at)
        with self.begin() as connection:
            rows = connection.execute(delete(jobs).where(jobs.c.id.in_(job_ids)).returning(*columns)).all()
            for lane, state in sorted({(row.lane, row.state) for row in rows}):
                same_kind = [row for row in rows if (row.lane, row.state) == (lane, state)]
                self.add_to_totals(connection, lane, state, same_kind)
        return len(rows)

    def add_to_totals(self, connection: Connection, lane: int, state: str, rows: Sequence[Any]) -> None:
        """Add jobs of one lane and state to the totals; the row is there before it is read, whoever else adds."""
        nothing = {"jobs": 0, "steps": 0, "queued": NO_DURATIONS.model_dump(), "generated": NO_DURATIONS.model_dump()}
        first = self.insert_into(job_totals).values(lane=lane, state=state, **nothing)
        connection.execute(first.on_conflict_do_nothing())
        is_kind = (job_totals.c.lane == lane) & (job_totals.c.state == state)
        total = connection.execute(select(job_totals).where(is_kind).with_for_update()).one()
        timed = [row for row in rows if state == "done" and row.started_at is not None and row.ended_at is not None]
        queued = tally_durations(row.started_at - row.created_at for row in timed)
        generated = tally_durations(row.ended_at - row.started_at for row in timed)
        values = {
            "jobs": len(rows) + total.jobs,
            "steps": sum(row.step for row in timed) + total.steps,
            "queued": add_counts(queued, DurationCounts.parse_stored(total.queued)).model_dump(),
            "generated": add_counts(generated, DurationCounts.parse_stored(total.generated)).model_dump(),
        }
        connection.execute(update(job_totals).where(is_kind).values(values))


def tally_durations(durations: Iterable[float]) -> DurationCounts:
    """Return how many of some times in seconds are up to each of JOB_SECONDS."""
    seconds = list(durations)
    counts = tuple(sum(value <= bound for value in seconds) for bound in JOB_SECONDS)
    return DurationCounts(counts=counts, total=len(seconds), sum_seconds=sum(seconds))


def add_counts(first: DurationCounts, second: DurationCounts) -> DurationCounts:
    counts = tuple(map(sum, zip(first.counts, second.counts, strict=True)))
    return DurationCounts(
        counts=counts, total=first.total + second.total, sum_seconds=first.sum_seconds + second.sum_seconds
    )


def count_durations(name: str, seconds: ColumnElement[float]) -> list[ColumnElement[float]]:
    """Return columns with the number of times up to each of JOB_SECONDS, and with their sum."""
    counts = [func.sum(case((seconds <= bound, 1), else_=0)) for bound in JOB_SECONDS]
    labelled = [count.label(f"{name}_{index}") for index, count in enumerate(counts)]
    return [*labelled, func.sum(seconds).label(f"{name}_sum")]


def read_counts(row: object, name: str) -> DurationCounts:
    counts = tuple(int(getattr(row, f"{name}_{index}")) for index in range(len(JOB_SECONDS)))
    job_count: int = row.job_count  # type: ignore[attr-defined]
    return DurationCounts(counts=counts, total=job_count, sum_seconds=float(getattr(row, f"{name}_sum")))

"""The life of jobs, in the database: who is next, who has what, and what became of it.

Every method is one statement, or reads only, so that there is nothing to hold and nothing half-written.  A worker's
statements carry the number of its attempt: once another worker has claimed the job they change nothing.

Fair order.  In each lane a job gets a turn when it comes: one more than its owner's last waiting job has, and no less
than the turn that is being drawn.  Whoever brings one job beside somebody's thousand is next but one.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from opentelemetry.propagate import inject
from sqlalchemy import Engine, Row, and_, case, func, or_, select, update

from omnivideo.contracts import Artifact, Claim, Job, JobState, JobStatus, Lane, StepProgress
from omnivideo.errors import InvalidInput, JobCancelled, JobFailed, JobLost, ServiceBusy
from omnivideo.storage.database.schema import Repository, jobs, select_values, unix_now

LANES: tuple[Lane, ...] = ("interactive", "batch")
OPEN_STATES: tuple[JobState, ...] = ("queued", "running")
TRACE_HEADER = "traceparent"  # W3C's header, kept in a job's meta
MAX_WORKER_LOSSES = 3  # workers that a job may take with it
EXACT_COUNT_BELOW = 1000  # jobs within which a bound is always counted
COUNT_CACHE_SECONDS = 1.0  # seconds for which a count far from its bound will do
Answer = TypeVar("Answer")


@dataclass
class QueueCounts:
    """How many jobs waited, and were an owner's own open ones, when that was counted; and submits since, from here."""

    queued: int
    owner_open: int
    counted_at: float
    submitted_since: int = 0


class JobRepository(Repository):
    """`max_open_jobs` and `max_open_jobs_per_owner` bound the jobs that are open at once, in all and for one owner."""

    def __init__(self, engine: Engine, max_open_jobs: int = 10_000, max_open_jobs_per_owner: int = 2_000):
        super().__init__(engine)
        self.max_open_jobs = max_open_jobs
        self.max_open_jobs_per_owner = max_open_jobs_per_owner
        self.queue_counts: dict[str, QueueCounts] = {}

    # ------------------------------------------------------------ those who ask

    def submit(
        self,
        job: Job,
        owner: str = "local",
        lane: Lane = "interactive",
        kind: str = "turn",
        meta: dict[str, str] | None = None,
    ) -> JobStatus | None:
        """The new job, None where it was there before: the same id with the same content is the same job.

        Raises ServiceBusy where a bound is reached, and InvalidInput where the id stands for something else.
        """
        lane_index = LANES.index(lane)
        values = {
            "id": job.id,
            "owner": owner,
            "lane": lane_index,
            "fair_rank": build_fair_rank_subquery(owner, lane_index),
            "state": "queued",
            "attempt": 0,
            "worker_losses": 0,
            "cancel_requested": False,
            "body": job.model_dump(),
            "kind": kind,
            "meta": add_trace_context(meta),
            "deleted": False,
            "step": 0,
            "steps": 0,
            "eta_seconds": 0.0,
            "created_at": unix_now(),
            "notified_at": unix_now(),
        }
        room = select_values(jobs, values)
        if self.is_near_limit(owner):
            waiting, mine = build_count_subqueries(owner)
            room = room.where(waiting < self.max_open_jobs, mine < self.max_open_jobs_per_owner)
        made = self.insert_into(jobs).from_select(list(values), room).on_conflict_do_nothing().returning(jobs)
        if (row := self.fetch_one(made)) is not None:
            return status_from_row(row)
        known = self.fetch_one(select(jobs.c.owner, jobs.c.body).where(jobs.c.id == job.id))
        if known is None:
            raise ServiceBusy("queue: too many clips are waiting; try again later", retry_after_seconds=5.0)
        if known.owner != owner or Job(**known.body) != job:
            raise InvalidInput("id", "that id is another job's; give a new one")
        return None

    def is_near_limit(self, owner: str) -> bool:
        """Whether a bound may be near, so that a submit has to count, which takes the longer the more jobs wait."""
        if min(self.max_open_jobs, self.max_open_jobs_per_owner) < EXACT_COUNT_BELOW:
            return True
        counts = self.queue_counts.get(owner)
        if counts is None or time.monotonic() - counts.counted_at > COUNT_CACHE_SECONDS:
            row = self.fetch_one(select(*build_count_subqueries(owner)))
            assert row is not None
            waiting, mine = list(row)
            counts = self.queue_counts[owner] = QueueCounts(waiting, mine, time.monotonic())
        counts.submitted_since += 1
        return (
            2 * (counts.queued + counts.submitted_since) >= self.max_open_jobs
            or 2 * (counts.owner_open + counts.submitted_since) >= self.max_open_jobs_per_owner
        )

    def get_status(self, job_id: str) -> JobStatus | None:
        row = self.fetch_one(select(jobs).where(jobs.c.id == job_id))
        return None if row is None else status_from_row(row)

    def list_statuses(self, job_ids: Collection[str]) -> list[JobStatus]:
        return [status_from_row(row) for row in self.fetch_all(select(jobs).where(jobs.c.id.in_(job_ids)))]

    def cancel(self, job_id: str) -> None:
        """At once where nobody has it yet; else its worker sees it at its next step.  An ended job stays as it is."""
        waits = and_(jobs.c.id == job_id, jobs.c.state == "queued")
        stopped = (
            update(jobs)
            .where(waits)
            .values(state="cancelled", cancel_requested=True, ended_at=unix_now())
            .returning(jobs.c.id)
        )
        if self.fetch_one(stopped) is None:
            self.fetch_all(
                update(jobs).where(jobs.c.id == job_id, jobs.c.state == "running").values(cancel_requested=True)
            )

    def cancel_by_prefix(self, owner: str, id_prefix: str) -> None:
        """All open jobs of the owner whose ids begin so."""
        matching_open = and_(
            jobs.c.owner == owner, jobs.c.state.in_(OPEN_STATES), jobs.c.id.startswith(id_prefix, autoescape=True)
        )
        for row in self.fetch_all(select(jobs.c.id).where(matching_open)):
            self.cancel(row.id)

    # ------------------------------------------------------------ workers

    def claim_next_job(self, worker: str) -> Claim | None:
        """The next job, or None where nothing waits."""
        waits = (
            select(jobs.c.id)
            .where(jobs.c.state == "queued")
            .order_by(jobs.c.lane, jobs.c.fair_rank, jobs.c.created_at, jobs.c.id)
        )
        first = waits.limit(1).with_for_update(skip_locked=True).scalar_subquery()
        taken = self.claim_where(jobs.c.id == first, worker)
        return taken[0] if taken else None

    def claim_where(self, condition: Any, worker: str) -> list[Claim]:
        """Whichever of the jobs wait, from now on this worker's."""
        values = {
            "state": "running",
            "attempt": jobs.c.attempt + 1,
            "worker_name": worker,
            "started_at": unix_now(),
            "heartbeat_at": unix_now(),
        }
        return [
            claim_from_row(row)
            for row in self.fetch_all(
                update(jobs)
                .where(condition, jobs.c.state == "queued")
                .values(values)
                .returning(
                    jobs.c.body,
                    jobs.c.attempt,
                    jobs.c.resume_key,
                    jobs.c.lane,
                    jobs.c.batch_job_ids,
                    jobs.c.worker_losses,
                    jobs.c.meta,
                )
            )
        ]

    def claim_render_batch(
        self, claim: Claim, worker: str, max_jobs: int, can_render_with: Callable[[Job], bool]
    ) -> list[Claim]:
        """The claim, and others to be drawn in one pass with it.

        For a job that has a pack, those of it that wait.  Else up to `max_jobs` that are alike and that nobody has
        begun,
        the next of the batch lane, but no more than half of what is there: the rest is for other workers.
        """
        if claim.batch_job_ids:
            return [
                claim,
                *self.claim_where(
                    and_(jobs.c.id.in_(claim.batch_job_ids), jobs.c.worker_losses < MAX_WORKER_LOSSES - 1), worker
                ),
            ]
        if max_jobs < 2 or claim.lane != "batch" or claim.attempt > 1:
            return [claim]
        fresh = and_(jobs.c.state == "queued", jobs.c.lane == LANES.index("batch"), jobs.c.attempt == 0)
        waits = select(jobs.c.id, jobs.c.body).where(fresh).order_by(jobs.c.fair_rank, jobs.c.created_at, jobs.c.id)
        candidate_ids = [
            row.id for row in self.fetch_all(waits.limit(4 * max_jobs)) if can_render_with(Job(**row.body))
        ]
        selected_ids = candidate_ids[: min(max_jobs - 1, len(candidate_ids) // 2)]
        extra_claims = (
            self.claim_where(and_(jobs.c.id.in_(selected_ids), jobs.c.attempt == 0), worker) if selected_ids else []
        )
        if not extra_claims:
            return [claim]
        claims = [claim, *sorted(extra_claims, key=lambda one: selected_ids.index(one.job.id))]
        batch_job_ids = [one.job.id for one in claims]
        mine = and_(jobs.c.id.in_(batch_job_ids), jobs.c.worker_name == worker, jobs.c.state == "running")
        self.fetch_all(update(jobs).where(mine).values(batch_job_ids=batch_job_ids))
        return [one.model_copy(update={"batch_job_ids": tuple(batch_job_ids)}) for one in claims]

    def heartbeat(self, claim: Claim, step: StepProgress | None = None, **artifact_keys: str) -> bool:
        """Says that the worker lives and how far it is; whether the job is still wanted.

        `artifact_keys` may hold the keys of a preview and of a point.  Raises JobLost.
        """
        wanted = self.heartbeat_all([claim], step, **artifact_keys)
        if not wanted:
            raise JobLost(f"job {claim.job.id} is not this worker's any more")
        return wanted[claim.job.id]

    def heartbeat_all(
        self, claims: Sequence[Claim], step: StepProgress | None = None, **artifact_keys: str
    ) -> dict[str, bool]:
        """As `heartbeat`: of those that are this worker's still, whether each is wanted."""
        values: dict[str, Any] = {"heartbeat_at": unix_now()} | artifact_keys
        if step is not None:
            values |= {"step": step.step, "steps": step.steps, "eta_seconds": step.eta_seconds}
        beaten = update(jobs).where(or_(*map(match_attempt, claims))).values(values)
        return {
            row.id: not row.cancel_requested
            for row in self.fetch_all(beaten.returning(jobs.c.id, jobs.c.cancel_requested))
        }

    def mark_done(self, claim: Claim, result: Artifact) -> None:
        """Raises JobLost where the result came too late."""
        self.end_attempt(claim, state="done", result=result.model_dump(), eta_seconds=0.0)

    def mark_failed(self, claim: Claim, code: str, error: str) -> None:
        self.end_attempt(claim, state="failed", code=code, error=error[:1000])

    def mark_cancelled(self, claim: Claim) -> None:
        """A cancelled job has stopped."""
        self.end_attempt(claim, state="cancelled")

    def detach_from_batch(self, claim: Claim) -> Claim:
        """The claim without its pack, and from the beginning."""
        self.fetch_all(update(jobs).where(match_attempt(claim)).values(batch_job_ids=None, resume_key=None))
        return claim.model_copy(update={"batch_job_ids": (), "resume_key": None})

    def requeue(self, claim: Claim) -> None:
        """A worker that has to go leaves its job to the next one."""
        self.fetch_all(update(jobs).where(match_attempt(claim)).values(state="queued"))

    def end_attempt(self, claim: Claim, **values: Any) -> None:
        ended = update(jobs).where(match_attempt(claim)).values(ended_at=unix_now(), resume_key=None, **values)
        if self.fetch_one(ended.returning(jobs.c.id)) is None:
            raise JobLost(f"job {claim.job.id} is not this worker's any more")

    def collect_referenced_keys(self, lifetime_seconds: float) -> set[str]:
        """The keys that open jobs refer to, and results that are not deleted and not older than `lifetime_seconds`."""
        young = and_(jobs.c.state == "done", jobs.c.deleted.is_(False), jobs.c.ended_at > unix_now() - lifetime_seconds)
        wanted = or_(jobs.c.state.in_(OPEN_STATES), young)
        found: set[str | None] = set()
        for row in self.fetch_all(select(jobs.c.body, jobs.c.resume_key, jobs.c.preview, jobs.c.result).where(wanted)):
            body, result = Job(**row.body), row.result or {}
            source = body.source.model_dump() if body.source else {}
            found |= {row.resume_key, row.preview, body.visual_tokens}
            found |= {one.get(name) for one in (source, result) for name in ("key", "manifest", "latents")}
        return {key for key in found if key}

    # ------------------------------------------------------------ the reaper

    def requeue_lost_jobs(self, heartbeat_timeout_seconds: float) -> list[str]:
        """Puts back what workers silent for so many seconds had; fails what has silenced MAX_WORKER_LOSSES of them."""
        lost = and_(jobs.c.state == "running", jobs.c.heartbeat_at < unix_now() - heartbeat_timeout_seconds)
        reason = f"it stopped {MAX_WORKER_LOSSES} workers in a row and is not tried again"
        values = {
            "state": "failed",
            "code": "poison",
            "error": reason,
            "ended_at": unix_now(),
            "worker_losses": jobs.c.worker_losses + 1,
        }
        self.fetch_all(update(jobs).where(lost, jobs.c.worker_losses >= MAX_WORKER_LOSSES - 1).values(values))
        self.fetch_all(update(jobs).where(lost, jobs.c.cancel_requested).values(state="cancelled", ended_at=unix_now()))
        back = (
            update(jobs)
            .where(lost)
            .values(state="queued", worker_losses=jobs.c.worker_losses + 1, notified_at=unix_now())
        )
        return [row.id for row in self.fetch_all(back.returning(jobs.c.id))]

    def claim_renotification(self, max_age_seconds: float) -> bool:
        """Whether a job waits that nobody was told of for so long; it counts as told from now on."""
        waits = select(jobs.c.id).where(jobs.c.state == "queued", jobs.c.notified_at < unix_now() - max_age_seconds)
        first = waits.order_by(jobs.c.notified_at).limit(1).with_for_update(skip_locked=True).scalar_subquery()
        return (
            self.fetch_one(update(jobs).where(jobs.c.id == first).values(notified_at=unix_now()).returning(jobs.c.id))
            is not None
        )

    def count_by_lane_and_state(self) -> list[tuple[str, str, int]]:
        """How many jobs of each lane and state there are."""
        job_count = func.count().label("job_count")
        grouped = select(jobs.c.lane, jobs.c.state, job_count).group_by(jobs.c.lane, jobs.c.state)
        return [(LANES[row.lane], row.state, row.job_count) for row in self.fetch_all(grouped)]

    def get_oldest_wait_seconds(self) -> float:
        """How long the longest waiting job has waited, in seconds."""
        row = self.fetch_one(select(unix_now() - func.min(jobs.c.created_at)).where(jobs.c.state == "queued"))
        return float(row[0] or 0.0) if row else 0.0

    def count_queued(self) -> int:
        row = self.fetch_one(select(func.count()).where(jobs.c.state == "queued"))
        assert row is not None
        return int(row[0])


def add_trace_context(meta: dict[str, str] | None) -> dict[str, str]:
    """What the job's worker needs to go on with the trace of who asked."""
    carrier: dict[str, str] = {}
    inject(carrier)
    return (meta or {}) | carrier


def claim_from_row(row: Row[Any]) -> Claim:
    """What has silenced all but one of the workers that it may take with it is drawn alone, and from the beginning:
    if it was another one of its pack, that one is found out, and this one is not lost for it."""
    alone = row.batch_job_ids is not None and row.worker_losses >= MAX_WORKER_LOSSES - 1
    return Claim(
        job=Job(**row.body), attempt=row.attempt, resume_key=None if alone else row.resume_key, lane=LANES[row.lane],
        batch_job_ids=() if alone else row.batch_job_ids or (), traceparent=row.meta.get(TRACE_HEADER),
    )  # fmt: skip


def match_attempt(claim: Claim) -> Any:
    return and_(jobs.c.id == claim.job.id, jobs.c.attempt == claim.attempt, jobs.c.state == "running")


def build_count_subqueries(owner: str) -> tuple[Any, Any]:
    """How many jobs wait, and how many of the owner's are open, as subqueries."""
    waiting = select(func.count()).where(jobs.c.state == "queued")
    mine = select(func.count()).where(jobs.c.owner == owner, jobs.c.state.in_(OPEN_STATES))
    return waiting.scalar_subquery(), mine.scalar_subquery()


def build_fair_rank_subquery(owner: str, lane: int) -> Any:
    """The place of an owner's new job in its lane, as a subquery.  The ends of an index, not max and min: PostgreSQL
    reads all rows for these where it has not yet seen how many there are."""
    turns = select(jobs.c.fair_rank).where(jobs.c.lane == lane).limit(1)
    last = turns.where(jobs.c.owner == owner, jobs.c.state == "queued").order_by(jobs.c.fair_rank.desc())
    drawn = turns.where(jobs.c.state == "running").order_by(jobs.c.fair_rank.desc())
    first = turns.where(jobs.c.state == "queued").order_by(jobs.c.fair_rank)
    current = func.coalesce(drawn.scalar_subquery(), first.scalar_subquery() - 1, 0)
    mine = func.coalesce(last.scalar_subquery(), 0)
    return case((mine > current, mine), else_=current) + 1


def status_from_row(row: Row[Any]) -> JobStatus:
    fields = {name: getattr(row, name) for name in JobStatus.model_fields if name not in ("lane", "job", "result")}
    result = None if row.result is None else Artifact(**row.result)
    return JobStatus(lane=LANES[row.lane], job=Job(**row.body), result=result, **fields)


def result_from_status(status: JobStatus) -> Artifact | None:
    """The artifact of a job that is done, None for an open one; raises JobFailed or JobCancelled."""
    if status.state == "failed":
        raise JobFailed(status.code or "internal", f"the clip could not be drawn: {status.error}")
    if status.state == "cancelled":
        raise JobCancelled("the clip was cancelled")
    return status.result

"""Jobs in the database: their queue, the workers that have claimed them, and their results.

Every method runs a single statement or only reads, so no locks are needed and no partial state is written. The
statements of a worker carry the number of its attempt: they change nothing once another worker has claimed the job.

Fair order: each lane alternates between owners. A new job gets the rank after its owner's last queued job, and at least
the rank that is being rendered. A job that is submitted after another owner's thousand jobs is therefore rendered first
or second.
"""

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Engine, Row, Update, and_, case, func, literal, not_, null, or_, select, update

from omnivideo.contracts import (
    OPEN_STATES,
    Artifact,
    Change,
    Claim,
    Job,
    JobState,
    JobStatus,
    Lane,
    ModelIdentity,
    StepProgress,
)
from omnivideo.errors import InvalidInput, JobLost
from omnivideo.records import KeyLimits
from omnivideo.storage.database.job_limits import JobLimits
from omnivideo.storage.database.job_rows import (
    ENDED_STATES,
    LANES,
    MAX_WORKER_LOSSES,
    add_trace_context,
    body_from_job,
    build_fair_rank_subquery,
    build_turn_subquery,
    claim_from_row,
    job_from_row,
    match_claimable_jobs,
    match_model,
    match_owned_jobs,
    status_from_row,
)
from omnivideo.storage.database.job_statistics import JobStatistics
from omnivideo.storage.database.notifications import ANY_JOB_END, AsyncWatch, Watch, job_end_topic, job_step_topic
from omnivideo.storage.database.repository import select_values, unix_now
from omnivideo.storage.database.schema import jobs, turns
from omnivideo.turns import StoredPreview


class EndedJob(NamedTuple):
    """A job that has ended, as announced to webhooks. `ended_at` is in seconds since 1970."""

    id: str
    owner: str
    state: JobState
    ended_at: float


ARTIFACT_KEYS = ("key", "manifest", "latents", "preview")  # the fields of an artifact that name objects of the store


class JobRepository(JobStatistics, JobLimits):
    """`max_open_jobs` limits the queued jobs of all owners, `max_open_jobs_per_owner` the open jobs of one owner.

    `daily_limits` are those of owners without own ones. A job with a resume point waits `resume_timeout_seconds` for a
    worker with the same weights before it starts again.
    """

    def __init__(
        self,
        engine: Engine,
        max_open_jobs: int = 10_000,
        max_open_jobs_per_owner: int = 2_000,
        resume_timeout_seconds: float = 60.0,
        daily_limits: KeyLimits | None = None,
    ):
        defaults = (daily_limits or KeyLimits()).model_copy(update={"open_jobs": max_open_jobs_per_owner})
        super().__init__(engine, max_open_jobs, defaults)
        self.resume_timeout_seconds = resume_timeout_seconds
        self.is_stopping = threading.Event()

    # ------------------------------------------------------------ submitting and following

    def submit(
        self,
        job: Job,
        owner: str = "local",
        lane: Lane = "interactive",
        kind: str = "turn",
        meta: dict[str, str] | None = None,
    ) -> JobStatus | None:
        """Submit a job. Return None if it was submitted before: the same id with the same content is the same job.

        Raises ServiceBusy (LimitReached for a limit of the owner), and InvalidInput if the id belongs to another job.
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
            "body": body_from_job(job),
            "preset": job.preset,
            "kind": kind,
            "meta": add_trace_context(meta),
            "turn_id": build_turn_subquery(owner, job.id) if kind == "turn" else null(),
            "deleted": False,
            "step": 0,
            "steps": 0,
            "eta_seconds": 0.0,
            "created_at": unix_now(),
            "notified_at": unix_now(),
        }
        row_if_allowed = select_values(jobs, values).where(*(conditions := self.build_limit_conditions(owner)))
        insertion = self.insert_into(jobs).from_select(list(values), row_if_allowed).on_conflict_do_nothing()
        rows = self.insert_within_limits(owner, insertion.returning(jobs), is_near=bool(conditions))
        if rows:
            return status_from_row(rows[0])
        existing = self.fetch_one(select(jobs.c.owner, jobs.c.body, jobs.c.preset).where(jobs.c.id == job.id))
        if existing is None:
            raise self.find_reached_limit(owner)
        if existing.owner != owner or job_from_row(existing, job.preset) != job:
            raise InvalidInput("id", "that id belongs to a different job; use a new one")
        return None

    def get_status(self, job_id: str) -> JobStatus | None:
        row = self.fetch_one(select(jobs).where(jobs.c.id == job_id))
        return None if row is None else status_from_row(row)

    def list_statuses(self, job_ids: Collection[str]) -> list[JobStatus]:
        return [status_from_row(row) for row in self.fetch_all(select(jobs).where(jobs.c.id.in_(job_ids)))]

    def list_ended_jobs(self, job_ids: Collection[str]) -> list[JobStatus]:
        """Return the status of each of these jobs that has ended."""
        query = select(jobs).where(jobs.c.id.in_(job_ids), jobs.c.state.in_(ENDED_STATES))
        return [status_from_row(row) for row in self.fetch_all(query)]

    def watch_job(self, job_id: str, include_steps: bool = False) -> AbstractContextManager[Watch]:
        """Watch for the end of a job and, if `include_steps` is set and the job belongs to no turn, its steps."""
        return self.notifier.watch(job_end_topic(job_id), *[job_step_topic(job_id)] * include_steps)

    def stop_followers(self) -> None:
        """Let all threads that follow a job raise ServiceStopping, now and later: the process could not end before."""
        self.is_stopping.set()
        self.notifier.deliver_missed()

    def watch_any_end(self) -> AbstractContextManager[Watch]:
        """Watch for the ends of all jobs, in a thread."""
        return self.notifier.watch(ANY_JOB_END)

    def watch_ends(self, job_ids: Collection[str]) -> AbstractContextManager[AsyncWatch]:
        """Watch for the ends of jobs, in the running event loop."""
        return self.notifier.watch_async(*map(job_end_topic, job_ids))

    def cancel(self, job_id: str) -> None:
        """Cancel a job: at once if it is queued, otherwise at its worker's next step. An ended job does not change."""
        is_queued = and_(jobs.c.id == job_id, jobs.c.state == "queued")
        cancellation = update(jobs).where(is_queued)
        values = {"state": "cancelled", "cancel_requested": True, "ended_at": unix_now(), "resume_key": None}
        if not self.end_jobs(cancellation.values(values), None):
            is_running = and_(jobs.c.id == job_id, jobs.c.state == "running")
            self.fetch_all(update(jobs).where(is_running).values(cancel_requested=True))

    def cancel_by_prefix(self, owner: str, id_prefix: str) -> None:
        """Cancel all open jobs of the owner whose ids begin with the prefix."""
        has_prefix = jobs.c.id.startswith(id_prefix, autoescape=True)
        query = select(jobs.c.id).where(jobs.c.owner == owner, jobs.c.state.in_(OPEN_STATES), has_prefix)
        for row in self.fetch_all(query):
            self.cancel(row.id)

    # ------------------------------------------------------------ jobs as an owner sees them

    def get_owned_job(self, job_id: str, owner: str, kind: str) -> JobStatus | None:
        row = self.fetch_one(select(jobs).where(jobs.c.id == job_id, match_owned_jobs(owner, kind)))
        return None if row is None else status_from_row(row)

    def list_owned_jobs(
        self, owner: str, kind: str, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[JobStatus], bool]:
        """Return a page of the owner's jobs of a kind, and whether more follow."""
        is_cursor = and_(jobs.c.id == after, jobs.c.owner == owner, jobs.c.kind == kind)
        cursor_query = select(jobs.c.created_at, jobs.c.id).where(is_cursor)
        condition = match_owned_jobs(owner, kind)
        rows, has_more = self.fetch_page(jobs, condition, after, limit, newest_first, cursor_query)
        return [status_from_row(row) for row in rows], has_more

    def delete_owned_job(self, job_id: str, owner: str, kind: str) -> bool:
        """Mark a job as deleted, without cancelling it. Return False if the owner has no such job."""
        deletion = update(jobs).where(jobs.c.id == job_id, match_owned_jobs(owner, kind)).values(deleted=True)
        return bool(self.fetch_all(deletion.returning(jobs.c.id)))

    def list_unannounced_jobs(self, kind: str, limit: int) -> list[EndedJob]:
        """Return jobs of a kind that have ended and that have not been announced to webhooks."""
        is_unannounced = and_(jobs.c.announced.is_(False), jobs.c.kind == kind, jobs.c.state.in_(ENDED_STATES))
        columns = select(jobs.c.id, jobs.c.owner, jobs.c.state, jobs.c.ended_at)
        return [EndedJob._make(row) for row in self.fetch_all(columns.where(is_unannounced).limit(limit))]

    def mark_announced(self, job_ids: Collection[str]) -> None:
        self.fetch_all(update(jobs).where(jobs.c.id.in_(job_ids)).values(announced=True))

    # ------------------------------------------------------------ workers: claiming

    def claim_next_job(self, worker: str, model: ModelIdentity) -> Claim | None:
        """Claim the next job for the worker, or return None if no job is queued that its model may render.

        The claim has a resume point only if it fits the model; the job has the model's weights from now on.
        """
        may_claim = match_claimable_jobs(model, self.resume_timeout_seconds)
        query = select(jobs.c.id).where(jobs.c.state == "queued", may_claim, self.match_affordable())
        in_order = query.order_by(jobs.c.lane, jobs.c.fair_rank, jobs.c.created_at, jobs.c.id)
        next_id = in_order.limit(1).with_for_update(skip_locked=True).scalar_subquery()
        claims = self.claim_where(jobs.c.id == next_id, worker, model)
        return claims[0] if claims else None

    def claim_where(self, condition: ColumnElement[bool], worker: str, model: ModelIdentity) -> list[Claim]:
        """Claim for the worker every queued job that meets the condition."""
        values = {
            "state": "running",
            "attempt": jobs.c.attempt + 1,
            "worker_name": worker,
            "worker_stopping": False,
            "resume_key": case((match_model(model), jobs.c.resume_key), else_=null()),
            **model.model_dump(),
            "started_at": unix_now(),
            "heartbeat_at": unix_now(),
        }
        claim = update(jobs).where(condition, jobs.c.state == "queued").values(values)
        rows = self.fetch_all(
            claim.returning(
                jobs.c.body,
                jobs.c.preset,
                jobs.c.attempt,
                jobs.c.resume_key,
                jobs.c.lane,
                jobs.c.batch_job_ids,
                jobs.c.worker_losses,
                jobs.c.meta,
            )
        )
        return [claim_from_row(row) for row in rows]

    def claim_render_batch(
        self, claim: Claim, worker: str, model: ModelIdentity, max_jobs: int, can_render_with: Callable[[Job], bool]
    ) -> list[Claim]:
        """Return the claim together with claims of jobs to render in one pass with it.

        If the job already belongs to a render batch, the queued jobs of that batch are claimed. Otherwise up to
        `max_jobs` compatible jobs of the batch lane that no worker has started are claimed, but no more than half of
        those that are queued: the rest is left to other workers.
        """
        if claim.batch_job_ids:
            is_member = and_(jobs.c.id.in_(claim.batch_job_ids), jobs.c.worker_losses < MAX_WORKER_LOSSES - 1)
            return [claim, *self.claim_where(is_member, worker, model)]
        if max_jobs < 2 or claim.lane != "batch" or claim.attempt > 1:
            return [claim]
        is_new = and_(jobs.c.state == "queued", jobs.c.lane == LANES.index("batch"), jobs.c.attempt == 0)
        columns = select(jobs.c.id, jobs.c.body, jobs.c.preset)
        may_claim = match_claimable_jobs(model, self.resume_timeout_seconds)
        query = columns.where(is_new, may_claim, self.match_affordable())
        in_order = query.order_by(jobs.c.fair_rank, jobs.c.created_at, jobs.c.id)
        rows = self.fetch_all(in_order.limit(4 * max_jobs))
        candidate_ids = [row.id for row in rows if can_render_with(job_from_row(row))]
        selected_ids = candidate_ids[: min(max_jobs - 1, len(candidate_ids) // 2)]
        if not selected_ids:
            return [claim]
        extra_claims = self.claim_where(and_(jobs.c.id.in_(selected_ids), jobs.c.attempt == 0), worker, model)
        if not extra_claims:
            return [claim]
        claims = [claim, *sorted(extra_claims, key=lambda extra_claim: selected_ids.index(extra_claim.job.id))]
        batch_job_ids = [member.job.id for member in claims]
        is_claimed = and_(jobs.c.id.in_(batch_job_ids), jobs.c.worker_name == worker, jobs.c.state == "running")
        self.fetch_all(update(jobs).where(is_claimed).values(batch_job_ids=batch_job_ids))
        return [member.model_copy(update={"batch_job_ids": tuple(batch_job_ids)}) for member in claims]

    # ------------------------------------------------------------ workers: progress and result

    def heartbeat(self, claim: Claim, step: StepProgress | None = None, **artifact_keys: str) -> bool:
        """Record that the worker is alive and how far it is. Return False if the job is to be cancelled.

        `artifact_keys` may have the object keys of a `preview` and of a saved state (`resume_key`). Raises JobLost if
        another attempt has claimed the job.
        """
        wanted_by_job = self.heartbeat_all([claim], step, **artifact_keys)
        if not wanted_by_job:
            raise JobLost(f"job {claim.job.id} no longer belongs to this worker")
        return wanted_by_job[claim.job.id]

    def heartbeat_all(
        self, claims: Sequence[Claim], step: StepProgress | None = None, **artifact_keys: str
    ) -> dict[str, bool]:
        """Send the heartbeats of several claims. Return whether each job that the worker still has is wanted."""
        values: dict[str, Any] = {"heartbeat_at": unix_now()} | artifact_keys
        if step is not None:
            values |= {"step": step.step, "steps": step.steps, "eta_seconds": step.eta_seconds}
        is_claimed = or_(*[match_attempt(claim) for claim in claims])
        heartbeat = update(jobs).where(is_claimed).values(values)
        rows = self.fetch_all(heartbeat.returning(jobs.c.id, jobs.c.attempt, jobs.c.turn_id, jobs.c.cancel_requested))
        if step is not None:
            for row in rows:
                self.publish_step(row, step, artifact_keys.get("preview"))
        return {row.id: not row.cancel_requested for row in rows}

    def publish_step(self, row: Row[Any], step: StepProgress, preview_key: str | None) -> None:
        """Append the step, and the preview if it has one, to the events of the job's turn."""
        if row.turn_id is None:
            self.notifier.publish(Change(topic=job_step_topic(row.id)))
            return
        source = jobs.join(turns, turns.c.id == jobs.c.turn_id)
        is_current = and_(jobs.c.id == row.id, jobs.c.attempt == row.attempt, turns.c.state == "running")
        self.append_turn_event(turns.c.id, source, is_current, step.model_dump())
        if preview_key is not None:
            self.append_turn_event(turns.c.id, source, is_current, StoredPreview(key=preview_key).model_dump())

    def mark_done(self, claim: Claim, result: Artifact, stored_bytes: int = 0) -> None:
        """Store the result, whose files have `stored_bytes`. Raises JobLost if another attempt has claimed the job."""
        values = {"state": "done", "result": result.model_dump(), "eta_seconds": 0.0}
        self.end_attempt(claim, stored_bytes, **values)

    def mark_failed(self, claim: Claim, code: str, error: str) -> None:
        self.end_attempt(claim, state="failed", code=code, error=error[:1000])

    def mark_cancelled(self, claim: Claim) -> None:
        """Record that a job has stopped after its cancellation was requested."""
        self.end_attempt(claim, state="cancelled")

    def detach_from_batch(self, claim: Claim) -> Claim:
        """Take a job out of its render batch, to be rendered alone and from the beginning."""
        self.fetch_all(update(jobs).where(match_attempt(claim)).values(batch_job_ids=None, resume_key=None))
        return claim.model_copy(update={"batch_job_ids": (), "resume_key": None})

    def requeue(self, claim: Claim) -> None:
        """Put the job of a worker that must stop back into the queue."""
        self.count_attempts(update(jobs).where(match_attempt(claim)).values(state="queued"), unix_now())

    def mark_stopping(self, worker: str) -> None:
        """Record that a worker was told to stop, so that its jobs count no loss even if it is killed before it ends."""
        is_running = and_(jobs.c.worker_name == worker, jobs.c.state == "running")
        self.fetch_all(update(jobs).where(is_running).values(worker_stopping=True))

    def end_attempt(self, claim: Claim, stored_bytes: int = 0, **values: Any) -> None:
        """Write the final state of a job. Raises JobLost if another attempt has claimed the job."""
        ending = update(jobs).where(match_attempt(claim)).values(ended_at=unix_now(), resume_key=None, **values)
        if not self.end_jobs(ending, unix_now(), stored_bytes):
            raise JobLost(f"job {claim.job.id} no longer belongs to this worker")

    def end_jobs(self, ending: Update, until: ColumnElement[Any] | None, stored_bytes: int = 0) -> list[str]:
        """Run a statement that ends jobs, notify their followers, and return the ids of the jobs.

        Their attempts have run until `until`, which is None if no worker had them.
        """
        notification = self.notifier.build_notification(literal("end ") + jobs.c.id)
        rows = self.count_attempts(ending, until, jobs.c.id, notification, stored_bytes=stored_bytes)
        job_ids = [row.id for row in rows]
        for job_id in job_ids:
            self.notifier.publish(Change(topic=job_end_topic(job_id)))
        return job_ids

    # ------------------------------------------------------------ upkeep

    def requeue_lost_jobs(self, heartbeat_timeout_seconds: float) -> list[str]:
        """Requeue the jobs of silent workers and return their ids; fail jobs that lost MAX_WORKER_LOSSES workers."""
        is_lost = and_(jobs.c.state == "running", jobs.c.heartbeat_at < unix_now() - heartbeat_timeout_seconds)
        failure = {
            "state": "failed",
            "code": "poison",
            "error": f"it stopped {MAX_WORKER_LOSSES} workers in a row and will not be tried again",
            "ended_at": unix_now(),
            "worker_losses": jobs.c.worker_losses + 1,
            "resume_key": None,
        }
        may_retry_no_more = and_(jobs.c.worker_losses >= MAX_WORKER_LOSSES - 1, not_(jobs.c.worker_stopping))
        last_sign = jobs.c.heartbeat_at
        self.end_jobs(update(jobs).where(is_lost, may_retry_no_more).values(failure), last_sign)
        cancellation = update(jobs).where(is_lost, jobs.c.cancel_requested)
        self.end_jobs(cancellation.values(state="cancelled", ended_at=unix_now(), resume_key=None), last_sign)
        losses = jobs.c.worker_losses + case((jobs.c.worker_stopping, 0), else_=1)
        requeued = {"state": "queued", "worker_losses": losses, "notified_at": unix_now()}
        rows = self.count_attempts(update(jobs).where(is_lost).values(requeued), last_sign, jobs.c.id)
        return [row.id for row in rows]

    def fail_exhausted_jobs(self) -> list[str]:
        """Fail the interactive jobs that have not begun when their owner has used up a share of the day."""
        ending = self.build_exhausted_ending()
        return [] if ending is None else self.end_jobs(ending, None)

    def claim_renotification(self, max_age_seconds: float) -> bool:
        """Return whether the workers must be notified again of a queued job, and mark it as notified now."""
        is_stale = and_(jobs.c.state == "queued", jobs.c.notified_at < unix_now() - max_age_seconds)
        oldest = select(jobs.c.id).where(is_stale).order_by(jobs.c.notified_at).limit(1)
        oldest_id = oldest.with_for_update(skip_locked=True).scalar_subquery()
        notification = update(jobs).where(jobs.c.id == oldest_id).values(notified_at=unix_now())
        return self.fetch_one(notification.returning(jobs.c.id)) is not None

    def collect_referenced_keys(self, lifetime_seconds: float) -> set[str]:
        """Return the object keys of open jobs, and of results younger than `lifetime_seconds` and not deleted."""
        is_recent = jobs.c.ended_at > unix_now() - lifetime_seconds
        has_result = and_(jobs.c.state == "done", jobs.c.deleted.is_(False), is_recent)
        columns = select(jobs.c.body, jobs.c.preset, jobs.c.resume_key, jobs.c.preview, jobs.c.result)
        keys: set[str | None] = set()
        for row in self.fetch_all(columns.where(or_(jobs.c.state.in_(OPEN_STATES), has_result))):
            job, result = job_from_row(row), row.result or {}
            sources = [source.model_dump() for source in (job.source, job.last_frame) if source]
            keys |= {row.resume_key, row.preview, job.visual_tokens, job.mask}
            keys |= {artifact.get(name) for artifact in (*sources, result) for name in ARTIFACT_KEYS}
        return {key for key in keys if key}

    def count_queued(self) -> int:
        row = self.fetch_one(select(func.count()).where(jobs.c.state == "queued"))
        assert row is not None
        return int(row[0])


def match_attempt(claim: Claim) -> ColumnElement[bool]:
    """Match the job as long as no other attempt has claimed it and it has not ended."""
    return and_(jobs.c.id == claim.job.id, jobs.c.attempt == claim.attempt, jobs.c.state == "running")

"""Rows of the table of jobs as messages, and the SQL expressions that its queries share."""

from typing import Any

from opentelemetry.propagate import inject
from sqlalchemy import Boolean, ColumnElement, Row, ScalarSelect, and_, case, func, not_, or_, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement

from omnivideo.contracts import (
    OPEN_STATES,
    Artifact,
    Claim,
    Job,
    JobState,
    JobStatus,
    Lane,
    ModelIdentity,
    SamplingParams,
)
from omnivideo.presets.shapes import Delivery
from omnivideo.storage.database.repository import unix_now
from omnivideo.storage.database.schema import jobs, turns

LANES: tuple[Lane, ...] = ("interactive", "batch")
ENDED_STATES: tuple[JobState, ...] = ("done", "failed", "cancelled")
TRACE_HEADER = "traceparent"  # the W3C header, kept in the meta of a job
MAX_WORKER_LOSSES = 3  # the number of lost workers after which a job fails


RENDERED_FIELDS = sorted({*Job.model_fields, *SamplingParams.model_fields, *Delivery.model_fields})


class states_unknown_fields(FunctionElement[bool]):
    """Whether a job's body has a field, other than those of its sources, that this version does not know.

    It may decide the bytes of the clip, so the job is left to workers that know it.
    """

    type = Boolean()
    inherit_cache = True


@compiles(states_unknown_fields, "sqlite")
def compile_unknown_fields_sqlite(element: states_unknown_fields, compiler: SQLCompiler, **kw: object) -> str:
    body, known = compiler.process(element.clauses, **kw), ", ".join(f"'{name}'" for name in RENDERED_FIELDS)
    keys = f"json_tree(json_remove({body}, '$.source', '$.last_frame'))"
    return f"EXISTS (SELECT 1 FROM {keys} WHERE typeof(key) = 'text' AND key NOT IN ({known}))"


@compiles(states_unknown_fields, "postgresql")
def compile_unknown_fields_postgresql(element: states_unknown_fields, compiler: SQLCompiler, **kw: object) -> str:
    body, known = compiler.process(element.clauses, **kw), ", ".join(f"'{name}'" for name in RENDERED_FIELDS)
    objects = """'$.** ? (@.type() == "object").keyvalue().key'"""
    keys = f"jsonb_path_query({body}::jsonb - 'source' - 'last_frame', {objects}) AS field"
    return f"EXISTS (SELECT 1 FROM {keys} WHERE field #>> '{{}}' NOT IN ({known}))"


def job_from_row(row: Row[Any], preset: str | None = None) -> Job:
    """Return the job of a row; `preset` replaces a preset that is not stored."""
    return Job.parse_stored(row.body | {"preset": row.preset or preset})


def body_from_job(job: Job) -> dict[str, Any]:
    """Return what is stored as a job's body. The preset has a column, as version 0.2 would refuse it in the body."""
    return job.model_dump(exclude={"preset"})


def status_from_row(row: Row[Any]) -> JobStatus:
    fields = {name: getattr(row, name) for name in JobStatus.model_fields if name not in ("lane", "job", "result")}
    result = None if row.result is None else Artifact.parse_stored(row.result)
    return JobStatus(lane=LANES[row.lane], job=job_from_row(row), result=result, **fields)


def claim_from_row(row: Row[Any]) -> Claim:
    """Return the claim of a job that has just been claimed.

    A job that may lose no more than one further worker is rendered alone and from the beginning: if another job of its
    batch was the cause, this job does not fail because of it.
    """
    must_run_alone = row.batch_job_ids is not None and row.worker_losses >= MAX_WORKER_LOSSES - 1
    return Claim(
        job=job_from_row(row),
        attempt=row.attempt,
        resume_key=None if must_run_alone else row.resume_key,
        lane=LANES[row.lane],
        batch_job_ids=() if must_run_alone else row.batch_job_ids or (),
        traceparent=row.meta.get(TRACE_HEADER),
    )


def match_model(model: ModelIdentity) -> ColumnElement[bool]:
    """Match the jobs whose resume points fit the model."""
    return and_(jobs.c.preset == model.preset, jobs.c.weights == model.weights, jobs.c.precision == model.precision)


def match_claimable_jobs(model: ModelIdentity, resume_timeout_seconds: float) -> ColumnElement[bool]:
    """Match the jobs that a worker with this model may claim.

    They are of its preset, it knows all of their settings, and they have no foreign resume point.

    It may also start a job of other weights again if no worker with those has shown itself for
    `resume_timeout_seconds`: none renders with them now or has ended a job since. An idle one would have claimed it.
    """
    others, resume_deadline = jobs.alias("others"), unix_now() - resume_timeout_seconds
    is_same_model = and_(*[others.c[name] == jobs.c[name] for name in ("weights", "precision", "preset")])
    matching = select(others.c.id).where(is_same_model).correlate(jobs)
    is_alive = or_(
        matching.where(others.c.state == "running").exists(),
        matching.where(others.c.ended_at > resume_deadline).exists(),
    )
    is_abandoned = and_(jobs.c.heartbeat_at < resume_deadline, ~is_alive)
    has_preset = or_(jobs.c.preset.is_(None), jobs.c.preset == model.preset)
    is_unknown = or_(jobs.c.resume_key.is_(None), jobs.c.weights.is_(None))
    may_resume = or_(is_unknown, match_model(model), is_abandoned)
    return and_(has_preset, may_resume, not_(states_unknown_fields(jobs.c.body)))


def match_owned_jobs(owner: str, kind: str) -> ColumnElement[bool]:
    return and_(jobs.c.owner == owner, jobs.c.kind == kind, jobs.c.deleted.is_(False))


def build_count_subqueries(owner: str) -> tuple[ScalarSelect[int], ScalarSelect[int]]:
    """Return the number of queued jobs, and of the owner's open jobs, as subqueries."""
    queued = select(func.count()).where(jobs.c.state == "queued")
    owner_open = select(func.count()).where(jobs.c.owner == owner, jobs.c.state.in_(OPEN_STATES))
    return queued.scalar_subquery(), owner_open.scalar_subquery()


def build_turn_subquery(owner: str, job_id: str) -> ScalarSelect[str]:
    """Return the running turn that submits the job, as a subquery: the id of its job begins with "<thread id>/"."""
    is_running = and_(turns.c.thread_id == job_id.partition("/")[0], turns.c.state == "running")
    return select(turns.c.id).where(is_running, turns.c.owner == owner).limit(1).scalar_subquery()


def build_fair_rank_subquery(owner: str, lane_index: int) -> ColumnElement[int]:
    """Return the fair rank of the owner's new job in its lane, as a subquery.

    It reads the ends of an index with ORDER BY and LIMIT: for max() and min(), PostgreSQL reads all rows as long as
    it has no statistics of the table.
    """
    ranks = select(jobs.c.fair_rank).where(jobs.c.lane == lane_index).limit(1)
    last_of_owner = ranks.where(jobs.c.owner == owner, jobs.c.state == "queued").order_by(jobs.c.fair_rank.desc())
    last_running = ranks.where(jobs.c.state == "running").order_by(jobs.c.fair_rank.desc())
    first_queued = ranks.where(jobs.c.state == "queued").order_by(jobs.c.fair_rank)
    current_rank = func.coalesce(last_running.scalar_subquery(), first_queued.scalar_subquery() - 1, 0)
    owner_rank = func.coalesce(last_of_owner.scalar_subquery(), 0)
    return case((owner_rank > current_rank, owner_rank), else_=current_rank) + 1


def add_trace_context(meta: dict[str, str] | None) -> dict[str, str]:
    """Add the caller's trace context to the meta of a job, so that its worker continues the trace."""
    carrier: dict[str, str] = {}
    inject(carrier)
    return (meta or {}) | carrier

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

from omnivideo.contracts import Artifact, Claim, Job, JobState, JobStatus, Lane, Step
from omnivideo.errors import Busy, InvalidInput, JobCancelled, JobFailed, JobLost
from omnivideo.storage.database import Book, as_row, jobs, now

LANES: tuple[Lane, ...] = ("interactive", "batch")
OPEN: tuple[JobState, ...] = ("queued", "running")
TRACE = "traceparent"  # W3C's header, kept in a job's meta
POISON = 3  # workers that a job may take with it
FEW = 1000  # jobs within which a bound is always counted
LOOK = 1.0  # seconds for which a count far from its bound will do
Answer = TypeVar("Answer")


@dataclass
class Crowd:
    """How many jobs waited, and were an owner's own open ones, when that was counted; and submits since, from here."""

    waiting: int
    mine: int
    counted: float
    since: int = 0


class Jobs(Book):
    """`most` and `most_each` bound the jobs that are open at once, in all and for one owner."""

    def __init__(self, engine: Engine, most: int = 10_000, most_each: int = 2_000):
        super().__init__(engine)
        self.most = most
        self.most_each = most_each
        self.crowds: dict[str, Crowd] = {}

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

        Raises Busy where a bound is reached, and InvalidInput where the id stands for something else.
        """
        at = LANES.index(lane)
        values = {
            "id": job.id, "owner": owner, "lane": at, "turn": turn_for(owner, at), "state": "queued", "attempt": 0,
            "losses": 0, "cancel": False, "body": job.model_dump(), "kind": kind, "meta": traced(meta),
            "deleted": False, "step": 0, "steps": 0, "left": 0.0, "made": now(), "told": now(),
        }  # fmt: skip
        room = as_row(jobs, values)
        if self.near(owner):
            waiting, mine = counted(owner)
            room = room.where(waiting < self.most, mine < self.most_each)
        made = self.insert(jobs).from_select(list(values), room).on_conflict_do_nothing().returning(jobs)
        if (row := self.one(made)) is not None:
            return status_of(row)
        known = self.one(select(jobs.c.owner, jobs.c.body).where(jobs.c.id == job.id))
        if known is None:
            raise Busy("queue: too many clips are waiting; try again later", after=5.0)
        if known.owner != owner or Job(**known.body) != job:
            raise InvalidInput("id", "that id is another job's; give a new one")
        return None

    def near(self, owner: str) -> bool:
        """Whether a bound may be near, so that a submit has to count, which takes the longer the more jobs wait."""
        if min(self.most, self.most_each) < FEW:
            return True
        crowd = self.crowds.get(owner)
        if crowd is None or time.monotonic() - crowd.counted > LOOK:
            row = self.one(select(*counted(owner)))
            assert row is not None
            waiting, mine = list(row)
            crowd = self.crowds[owner] = Crowd(waiting, mine, time.monotonic())
        crowd.since += 1
        return 2 * (crowd.waiting + crowd.since) >= self.most or 2 * (crowd.mine + crowd.since) >= self.most_each

    def status(self, job_id: str) -> JobStatus | None:
        row = self.one(select(jobs).where(jobs.c.id == job_id))
        return None if row is None else status_of(row)

    def statuses(self, ids: Collection[str]) -> list[JobStatus]:
        return [status_of(row) for row in self.all(select(jobs).where(jobs.c.id.in_(ids)))]

    def cancel(self, job_id: str) -> None:
        """At once where nobody has it yet; else its worker sees it at its next step.  An ended job stays as it is."""
        waits = and_(jobs.c.id == job_id, jobs.c.state == "queued")
        stopped = update(jobs).where(waits).values(state="cancelled", cancel=True, ended=now()).returning(jobs.c.id)
        if self.one(stopped) is None:
            self.all(update(jobs).where(jobs.c.id == job_id, jobs.c.state == "running").values(cancel=True))

    def cancel_of(self, owner: str, beginning: str) -> None:
        """All open jobs of the owner whose ids begin so."""
        open_ones = and_(
            jobs.c.owner == owner, jobs.c.state.in_(OPEN), jobs.c.id.startswith(beginning, autoescape=True)
        )
        for row in self.all(select(jobs.c.id).where(open_ones)):
            self.cancel(row.id)

    # ------------------------------------------------------------ workers

    def claim(self, worker: str) -> Claim | None:
        """The next job, or None where nothing waits."""
        waits = (
            select(jobs.c.id).where(jobs.c.state == "queued").order_by(jobs.c.lane, jobs.c.turn, jobs.c.made, jobs.c.id)
        )
        first = waits.limit(1).with_for_update(skip_locked=True).scalar_subquery()
        taken = self.taken(jobs.c.id == first, worker)
        return taken[0] if taken else None

    def taken(self, which: Any, worker: str) -> list[Claim]:
        """Whichever of the jobs wait, from now on this worker's."""
        values = {"state": "running", "attempt": jobs.c.attempt + 1, "worker": worker, "started": now(), "beat": now()}
        return [claim_of(row) for row in self.all(
            update(jobs).where(which, jobs.c.state == "queued").values(values).returning(
                jobs.c.body, jobs.c.attempt, jobs.c.point, jobs.c.lane, jobs.c.pack, jobs.c.losses, jobs.c.meta
            )
        )]  # fmt: skip

    def joined(self, claim: Claim, worker: str, most: int, alike: Callable[[Job], bool]) -> list[Claim]:
        """The claim, and others to be drawn in one pass with it.

        For a job that has a pack, those of it that wait.  Else up to `most` that are alike and that nobody has begun,
        the next of the batch lane, but no more than half of what is there: the rest is for other workers.
        """
        if claim.pack:
            return [claim, *self.taken(and_(jobs.c.id.in_(claim.pack), jobs.c.losses < POISON - 1), worker)]
        if most < 2 or claim.lane != "batch" or claim.attempt > 1:
            return [claim]
        fresh = and_(jobs.c.state == "queued", jobs.c.lane == LANES.index("batch"), jobs.c.attempt == 0)
        waits = select(jobs.c.id, jobs.c.body).where(fresh).order_by(jobs.c.turn, jobs.c.made, jobs.c.id)
        found = [row.id for row in self.all(waits.limit(4 * most)) if alike(Job(**row.body))]
        chosen = found[: min(most - 1, len(found) // 2)]
        more = self.taken(and_(jobs.c.id.in_(chosen), jobs.c.attempt == 0), worker) if chosen else []
        if not more:
            return [claim]
        claims = [claim, *sorted(more, key=lambda one: chosen.index(one.job.id))]
        pack = [one.job.id for one in claims]
        mine = and_(jobs.c.id.in_(pack), jobs.c.worker == worker, jobs.c.state == "running")
        self.all(update(jobs).where(mine).values(pack=pack))
        return [one.model_copy(update={"pack": tuple(pack)}) for one in claims]

    def beat(self, claim: Claim, step: Step | None = None, **kept: str) -> bool:
        """Says that the worker lives and how far it is; whether the job is still wanted.

        `kept` may hold the keys of a preview and of a point.  Raises JobLost.
        """
        wanted = self.beat_all([claim], step, **kept)
        if not wanted:
            raise JobLost(f"job {claim.job.id} is not this worker's any more")
        return wanted[claim.job.id]

    def beat_all(self, claims: Sequence[Claim], step: Step | None = None, **kept: str) -> dict[str, bool]:
        """As `beat`: of those that are this worker's still, whether each is wanted."""
        values: dict[str, Any] = {"beat": now()} | kept
        if step is not None:
            values |= {"step": step.step, "steps": step.steps, "left": step.left}
        beaten = update(jobs).where(or_(*map(fenced, claims))).values(values)
        return {row.id: not row.cancel for row in self.all(beaten.returning(jobs.c.id, jobs.c.cancel))}

    def finish(self, claim: Claim, result: Artifact) -> None:
        """Raises JobLost where the result came too late."""
        self.end(claim, state="done", result=result.model_dump(), left=0.0)

    def fail(self, claim: Claim, code: str, error: str) -> None:
        self.end(claim, state="failed", code=code, error=error[:1000])

    def stop(self, claim: Claim) -> None:
        """A cancelled job has stopped."""
        self.end(claim, state="cancelled")

    def alone(self, claim: Claim) -> Claim:
        """The claim without its pack, and from the beginning."""
        self.all(update(jobs).where(fenced(claim)).values(pack=None, point=None))
        return claim.model_copy(update={"pack": (), "point": None})

    def give_back(self, claim: Claim) -> None:
        """A worker that has to go leaves its job to the next one."""
        self.all(update(jobs).where(fenced(claim)).values(state="queued"))

    def end(self, claim: Claim, **values: Any) -> None:
        ended = update(jobs).where(fenced(claim)).values(ended=now(), point=None, **values)
        if self.one(ended.returning(jobs.c.id)) is None:
            raise JobLost(f"job {claim.job.id} is not this worker's any more")

    def referred(self, lifetime: float) -> set[str]:
        """The keys that open jobs refer to, and results that are not deleted and not older than `lifetime` seconds."""
        young = and_(jobs.c.state == "done", jobs.c.deleted.is_(False), jobs.c.ended > now() - lifetime)
        wanted = or_(jobs.c.state.in_(OPEN), young)
        found: set[str | None] = set()
        for row in self.all(select(jobs.c.body, jobs.c.point, jobs.c.preview, jobs.c.result).where(wanted)):
            body, result = Job(**row.body), row.result or {}
            source = body.source.model_dump() if body.source else {}
            found |= {row.point, row.preview, body.visual_tokens}
            found |= {one.get(name) for one in (source, result) for name in ("key", "manifest", "latents")}
        return {key for key in found if key}

    # ------------------------------------------------------------ the reaper

    def reap(self, silent: float) -> list[str]:
        """Puts back what workers silent for so many seconds had; fails what has silenced POISON of them."""
        lost = and_(jobs.c.state == "running", jobs.c.beat < now() - silent)
        reason = f"it stopped {POISON} workers in a row and is not tried again"
        values = {"state": "failed", "code": "poison", "error": reason, "ended": now(), "losses": jobs.c.losses + 1}
        self.all(update(jobs).where(lost, jobs.c.losses >= POISON - 1).values(values))
        self.all(update(jobs).where(lost, jobs.c.cancel).values(state="cancelled", ended=now()))
        back = update(jobs).where(lost).values(state="queued", losses=jobs.c.losses + 1, told=now())
        return [row.id for row in self.all(back.returning(jobs.c.id))]

    def untold(self, seconds: float) -> bool:
        """Whether a job waits that nobody was told of for so long; it counts as told from now on."""
        waits = select(jobs.c.id).where(jobs.c.state == "queued", jobs.c.told < now() - seconds)
        first = waits.order_by(jobs.c.told).limit(1).with_for_update(skip_locked=True).scalar_subquery()
        return self.one(update(jobs).where(jobs.c.id == first).values(told=now()).returning(jobs.c.id)) is not None

    def counts(self) -> list[tuple[str, str, int]]:
        """How many jobs of each lane and state there are."""
        each = func.count().label("each")
        grouped = select(jobs.c.lane, jobs.c.state, each).group_by(jobs.c.lane, jobs.c.state)
        return [(LANES[row.lane], row.state, row.each) for row in self.all(grouped)]

    def oldest(self) -> float:
        """How long the longest waiting job has waited, in seconds."""
        row = self.one(select(now() - func.min(jobs.c.made)).where(jobs.c.state == "queued"))
        return float(row[0] or 0.0) if row else 0.0

    def waiting(self) -> int:
        row = self.one(select(func.count()).where(jobs.c.state == "queued"))
        assert row is not None
        return int(row[0])


def traced(meta: dict[str, str] | None) -> dict[str, str]:
    """What the job's worker needs to go on with the trace of who asked."""
    carrier: dict[str, str] = {}
    inject(carrier)
    return (meta or {}) | carrier


def claim_of(row: Row[Any]) -> Claim:
    """What has silenced all but one of the workers that it may take with it is drawn alone, and from the beginning:
    if it was another one of its pack, that one is found out, and this one is not lost for it."""
    alone = row.pack is not None and row.losses >= POISON - 1
    return Claim(
        job=Job(**row.body), attempt=row.attempt, point=None if alone else row.point, lane=LANES[row.lane],
        pack=() if alone else row.pack or (), trace=row.meta.get(TRACE),
    )  # fmt: skip


def fenced(claim: Claim) -> Any:
    return and_(jobs.c.id == claim.job.id, jobs.c.attempt == claim.attempt, jobs.c.state == "running")


def counted(owner: str) -> tuple[Any, Any]:
    """How many jobs wait, and how many of the owner's are open, as subqueries."""
    waiting = select(func.count()).where(jobs.c.state == "queued")
    mine = select(func.count()).where(jobs.c.owner == owner, jobs.c.state.in_(OPEN))
    return waiting.scalar_subquery(), mine.scalar_subquery()


def turn_for(owner: str, lane: int) -> Any:
    """The place of an owner's new job in its lane, as a subquery.  The ends of an index, not max and min: PostgreSQL
    reads all rows for these where it has not yet seen how many there are."""
    turns = select(jobs.c.turn).where(jobs.c.lane == lane).limit(1)
    last = turns.where(jobs.c.owner == owner, jobs.c.state == "queued").order_by(jobs.c.turn.desc())
    drawn = turns.where(jobs.c.state == "running").order_by(jobs.c.turn.desc())
    first = turns.where(jobs.c.state == "queued").order_by(jobs.c.turn)
    current = func.coalesce(drawn.scalar_subquery(), first.scalar_subquery() - 1, 0)
    mine = func.coalesce(last.scalar_subquery(), 0)
    return case((mine > current, mine), else_=current) + 1


def status_of(row: Row[Any]) -> JobStatus:
    told = {name: getattr(row, name) for name in JobStatus.model_fields if name not in ("lane", "job", "result")}
    result = None if row.result is None else Artifact(**row.result)
    return JobStatus(lane=LANES[row.lane], job=Job(**row.body), result=result, **told)


def outcome(status: JobStatus) -> Artifact | None:
    """The artifact of a job that is done, None for an open one; raises JobFailed or JobCancelled."""
    if status.state == "failed":
        raise JobFailed(status.code or "internal", f"the clip could not be drawn: {status.error}")
    if status.state == "cancelled":
        raise JobCancelled("the clip was cancelled")
    return status.result

"""What owners have besides threads: files, batches, webhooks, and the jobs that they asked for by themselves.

Every method is one statement, or reads only; rows come back as they are.  What may be written twice (a file or a batch
whose id follows from a request's key, a line's outcome, an event for a hook) is written once and stays as it was.
"""

import time
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, Table, and_, delete, func, or_, select, update

from omnivideo.contracts import JobStatus
from omnivideo.errors import Busy, InvalidInput
from omnivideo.storage.database import Book, as_row, batches, deliveries, files, hooks, jobs, lines, now
from omnivideo.storage.jobs import status_of

ENDED = ("done", "failed", "cancelled")
WORKED = ("validating", "in_progress", "finalizing", "cancelling")  # a batch's states that a runner takes on
KEPT = 7 * 86_400  # seconds that a delivery is kept after its end
Page = tuple[list[Row[Any]], bool]  # and whether there is more


class Records(Book):
    # ------------------------------------------------------------ for every kind

    def page(self, table: Table, mine: ColumnElement[bool], after: str | None, limit: int, newest: bool) -> Page:
        """The rows that follow that id by age.  Raises InvalidInput where there is no such id."""
        wanted = select(table).where(mine)
        if after is not None:
            last = self.one(select(table.c.made, table.c.id).where(mine, table.c.id == after))
            if last is None:
                raise InvalidInput("after", "it is no id of this list")
            here, there = table.c.made, table.c.id
            next_ones = here < last.made if newest else here > last.made
            same_moment = there < last.id if newest else there > last.id
            wanted = wanted.where(or_(next_ones, and_(here == last.made, same_moment)))
        keys = [column.desc() if newest else column.asc() for column in (table.c.made, table.c.id)]
        rows = self.all(wanted.order_by(*keys).limit(limit + 1))
        return list(rows[:limit]), len(rows) > limit

    def add(self, table: Table, values: dict[str, Any]) -> Row[Any]:
        """The row of that id: this one, or the one that was there before."""
        self.all(self.insert(table).values(values).on_conflict_do_nothing())
        row = self.one(select(table).where(table.c.id == values["id"]))
        assert row is not None
        return row

    # ------------------------------------------------------------ jobs

    def job(self, job_id: str, owner: str, kind: str) -> JobStatus | None:
        row = self.one(select(jobs).where(jobs.c.id == job_id, jobs_of(owner, kind)))
        return None if row is None else status_of(row)

    def jobs(self, owner: str, kind: str, after: str | None, limit: int, newest: bool) -> tuple[list[JobStatus], bool]:
        rows, more = self.page(jobs, jobs_of(owner, kind), after, limit, newest)
        return [status_of(row) for row in rows], more

    def remove_job(self, job_id: str, owner: str, kind: str) -> bool:
        """Whether there was one; whoever draws it is to be told by a cancel."""
        gone = update(jobs).where(jobs.c.id == job_id, jobs_of(owner, kind)).values(deleted=True)
        return bool(self.all(gone.returning(jobs.c.id)))

    def ended(self, ids: Collection[str]) -> list[JobStatus]:
        """Those of the jobs that have ended."""
        return [status_of(row) for row in self.all(select(jobs).where(jobs.c.id.in_(ids), jobs.c.state.in_(ENDED)))]

    # ------------------------------------------------------------ files

    def add_file(self, owner: str, **values: Any) -> Row[Any]:
        """`values` are id, name, purpose, bytes, key and artifact."""
        return self.add(files, {"owner": owner, "made": now(), "deleted": False} | values)

    def file(self, file_id: str, owner: str) -> Row[Any] | None:
        return self.one(select(files).where(files.c.id == file_id, files_of(owner)))

    def files(self, owner: str, purpose: str | None, after: str | None, limit: int, newest: bool) -> Page:
        mine = files_of(owner) if purpose is None else and_(files_of(owner), files.c.purpose == purpose)
        return self.page(files, mine, after, limit, newest)

    def remove_file(self, file_id: str, owner: str) -> bool:
        """Whether there was one."""
        gone = update(files).where(files.c.id == file_id, files_of(owner)).values(deleted=True)
        return bool(self.all(gone.returning(files.c.id)))

    def referred(self) -> set[str]:
        """The keys that files refer to, those that an open batch still reads included."""
        read = select(batches.c.input).where(batches.c.state.in_(WORKED))
        held = or_(files.c.deleted.is_(False), files.c.id.in_(read))
        return {row.key for row in self.all(select(files.c.key).where(held))}

    # ------------------------------------------------------------ batches

    def add_batch(self, owner: str, most: int, **values: Any) -> Row[Any]:
        """`values` are id, endpoint, input, meta and times.  Raises Busy where the owner has `most` open ones."""
        values |= {
            "owner": owner, "state": "validating", "counts": {"total": 0, "completed": 0, "failed": 0}, "beat": 0.0,
            "made": now(),
        }  # fmt: skip
        open_ones = select(func.count()).where(batches.c.owner == owner, batches.c.state.in_(WORKED)).scalar_subquery()
        room = as_row(batches, values).where(open_ones < most)
        self.all(self.insert(batches).from_select(list(values), room).on_conflict_do_nothing())
        row = self.batch(values["id"], owner)
        if row is None:
            raise Busy(f"batches: you have {most} open ones; wait until one has ended", after=60.0)
        return row

    def batch(self, batch_id: str, owner: str) -> Row[Any] | None:
        return self.one(select(batches).where(batches.c.id == batch_id, batches.c.owner == owner))

    def batches(self, owner: str, after: str | None, limit: int) -> Page:
        return self.page(batches, batches.c.owner == owner, after, limit, newest=True)

    def move(self, row: Row[Any], state: str, runner: str | None = None, **values: Any) -> bool:
        """From the state that the row has to another one; whether it was still so, and still this runner's."""
        times = row.times | {f"{state}_at": int(time.time())}
        still = and_(batches.c.id == row.id, batches.c.state == row.state)
        if runner is not None:
            still = and_(still, batches.c.runner == runner)
        moved = update(batches).where(still).values(state=state, times=times, **values)
        return bool(self.all(moved.returning(batches.c.id)))

    def take_batch(self, runner: str, silent: float) -> Row[Any] | None:
        """The oldest batch that has no runner, or one that was silent for so many seconds; now this runner's."""
        lost = and_(batches.c.state.in_(WORKED), batches.c.beat < now() - silent)
        first = select(batches.c.id).where(lost).order_by(batches.c.made).limit(1).with_for_update(skip_locked=True)
        mine = update(batches).where(batches.c.id == first.scalar_subquery(), lost).values(runner=runner, beat=now())
        return self.one(mine.returning(batches))

    def input_of(self, batch_id: str) -> str:
        """The key of its input, whether the file was deleted since or not."""
        row = self.one(select(files.c.key).join(batches, batches.c.input == files.c.id).where(batches.c.id == batch_id))
        assert row is not None
        return str(row.key)

    def held_batch(self, batch_id: str, runner: str) -> Row[Any] | None:
        """The row, while it is this runner's."""
        return self.one(select(batches).where(batches.c.id == batch_id, batches.c.runner == runner))

    def beat_batches(self, runner: str, held: Collection[str]) -> None:
        mine = and_(batches.c.runner == runner, batches.c.id.in_(held), batches.c.state.in_(WORKED))
        self.all(update(batches).where(mine).values(beat=now()))

    def leave_batches(self, runner: str) -> None:
        """For the next runner, at once."""
        mine = and_(batches.c.runner == runner, batches.c.state.in_(WORKED))
        self.all(update(batches).where(mine).values(beat=0.0, runner=None))

    # ------------------------------------------------------------ lines of batches

    def keep_lines(self, batch_id: str, kept: Sequence[tuple[int, bool, dict[str, Any]]]) -> None:
        """What became of some lines: number, whether it went well, and its line of the output or error file."""
        values = [{"batch": batch_id, "number": number, "ok": ok, "answer": made} for number, ok, made in kept]
        self.all(self.insert(lines).values(values).on_conflict_do_nothing())

    def count(self, batch_id: str, counts: dict[str, int]) -> None:
        self.all(update(batches).where(batches.c.id == batch_id).values(counts=counts))

    def lines_done(self, batch_id: str) -> dict[int, bool]:
        """Of each line that has an outcome, whether it went well."""
        return {
            row.number: row.ok for row in self.all(select(lines.c.number, lines.c.ok).where(lines.c.batch == batch_id))
        }

    def lines(self, batch_id: str, after: int, limit: int) -> Sequence[Row[Any]]:
        """Kept lines with a number above `after`, in order."""
        wanted = select(lines).where(lines.c.batch == batch_id, lines.c.number > after).order_by(lines.c.number)
        return self.all(wanted.limit(limit))

    def forget_lines(self, batch_id: str) -> None:
        self.all(delete(lines).where(lines.c.batch == batch_id))

    # ------------------------------------------------------------ webhooks

    def add_hook(self, owner: str, most: int, **values: Any) -> Row[Any]:
        """`values` are id, url, secret, name and events.  Raises InvalidInput where the owner has `most`."""
        values |= {"owner": owner, "made": now()}
        mine = select(func.count()).where(hooks.c.owner == owner).scalar_subquery()
        room = as_row(hooks, values).where(mine < most)
        row = self.one(self.insert(hooks).from_select(list(values), room).returning(hooks))
        if row is None:
            raise InvalidInput("webhooks", f"you have {most}, which are all that one key may have")
        return row

    def hook(self, hook_id: str, owner: str) -> Row[Any] | None:
        return self.one(select(hooks).where(hooks.c.id == hook_id, hooks.c.owner == owner))

    def hooks(self, owner: str, after: str | None, limit: int) -> Page:
        return self.page(hooks, hooks.c.owner == owner, after, limit, newest=True)

    def remove_hook(self, hook_id: str, owner: str) -> bool:
        """Whether there was one; what it has not been told it will not be."""
        gone = delete(hooks).where(hooks.c.id == hook_id, hooks.c.owner == owner)
        return bool(self.all(gone.returning(hooks.c.id)))

    def unannounced(self, kind: str, limit: int) -> Sequence[Row[Any]]:
        """Jobs of the kind that came to an end that nobody has been told of: id, owner, state, ended."""
        told = and_(jobs.c.announced.is_(False), jobs.c.kind == kind, jobs.c.state.in_(("done", "failed")))
        return self.all(select(jobs.c.id, jobs.c.owner, jobs.c.state, jobs.c.ended).where(told).limit(limit))

    def hooks_of(self, owners: Collection[str]) -> Sequence[Row[Any]]:
        return self.all(select(hooks).where(hooks.c.owner.in_(owners)))

    def deliver(self, events: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
        """Events that are due now: id, hook, body.  One whose id is known stays as it is."""
        values = [
            {"id": name, "hook": hook, "body": body, "tries": 0, "due": 0.0, "done": False}
            for name, hook, body in events
        ]
        self.all(self.insert(deliveries).values(values).on_conflict_do_nothing())

    def announced(self, job_ids: Collection[str]) -> None:
        self.all(update(jobs).where(jobs.c.id.in_(job_ids)).values(announced=True))

    def due(self, limit: int, lease: float) -> list[tuple[Row[Any], Row[Any] | None]]:
        """Deliveries to try now, each with its hook; they are due again in `lease` seconds, should nobody say more."""
        waits = select(deliveries.c.id).where(deliveries.c.done.is_(False), deliveries.c.due <= now())
        first = waits.order_by(deliveries.c.due).limit(limit).with_for_update(skip_locked=True)
        late = {"due": now() + lease, "tries": deliveries.c.tries + 1}
        mine = update(deliveries).where(deliveries.c.id.in_(first), deliveries.c.done.is_(False))
        rows = self.all(mine.values(late).returning(deliveries))
        known = {hook.id: hook for hook in self.all(select(hooks).where(hooks.c.id.in_([row.hook for row in rows])))}
        return [(row, known.get(row.hook)) for row in rows]

    def delivered(self, name: str) -> None:
        """There is nothing more to do about it."""
        self.all(update(deliveries).where(deliveries.c.id == name).values(done=True))

    def put_off(self, name: str, seconds: float) -> None:
        self.all(update(deliveries).where(deliveries.c.id == name).values(due=now() + seconds))

    def tidy(self) -> None:
        """Forgets what was delivered long ago."""
        self.all(delete(deliveries).where(deliveries.c.done, deliveries.c.due < now() - KEPT))


def jobs_of(owner: str, kind: str) -> ColumnElement[bool]:
    return and_(jobs.c.owner == owner, jobs.c.kind == kind, jobs.c.deleted.is_(False))


def files_of(owner: str) -> ColumnElement[bool]:
    return and_(files.c.owner == owner, files.c.deleted.is_(False))

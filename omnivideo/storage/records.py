"""What owners have besides threads: files, batches, webhooks, and the jobs that they asked for by themselves.

Every method is one statement, or reads only; rows come back as they are.  What may be written twice (a file or a batch
whose id follows from a request's key, a line's outcome, an event for a hook) is written once and stays as it was.
"""

import time
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, Table, and_, delete, func, or_, select, update

from omnivideo.contracts import JobStatus
from omnivideo.errors import InvalidInput, ServiceBusy
from omnivideo.storage.database.jobs import status_from_row
from omnivideo.storage.database.schema import (
    Repository,
    batch_lines,
    batches,
    files,
    jobs,
    select_values,
    unix_now,
    webhook_deliveries,
    webhooks,
)

ENDED_STATES = ("done", "failed", "cancelled")
ACTIVE_BATCH_STATES = (
    "validating",
    "in_progress",
    "finalizing",
    "cancelling",
)  # a batch's states that a runner takes on
DELIVERY_RETENTION_SECONDS = 7 * 86_400  # seconds that a delivery is kept after its end
RowPage = tuple[list[Row[Any]], bool]  # and whether there is more


class RecordRepository(Repository):
    # ------------------------------------------------------------ for every kind

    def list_page(
        self, table: Table, owned: ColumnElement[bool], after: str | None, limit: int, newest_first: bool
    ) -> RowPage:
        """The rows that follow that id by age.  Raises InvalidInput where there is no such id."""
        wanted = select(table).where(owned)
        if after is not None:
            last = self.fetch_one(select(table.c.created_at, table.c.id).where(owned, table.c.id == after))
            if last is None:
                raise InvalidInput("after", "it is no id of this list")
            here, there = table.c.created_at, table.c.id
            next_ones = here < last.created_at if newest_first else here > last.created_at
            same_moment = there < last.id if newest_first else there > last.id
            wanted = wanted.where(or_(next_ones, and_(here == last.created_at, same_moment)))
        keys = [column.desc() if newest_first else column.asc() for column in (table.c.created_at, table.c.id)]
        rows = self.fetch_all(wanted.order_by(*keys).limit(limit + 1))
        return list(rows[:limit]), len(rows) > limit

    def insert_if_absent(self, table: Table, values: dict[str, Any]) -> Row[Any]:
        """The row of that id: this one, or the one that was there before."""
        self.fetch_all(self.insert_into(table).values(values).on_conflict_do_nothing())
        row = self.fetch_one(select(table).where(table.c.id == values["id"]))
        assert row is not None
        return row

    # ------------------------------------------------------------ jobs

    def get_owned_job(self, job_id: str, owner: str, kind: str) -> JobStatus | None:
        row = self.fetch_one(select(jobs).where(jobs.c.id == job_id, match_owned_jobs(owner, kind)))
        return None if row is None else status_from_row(row)

    def list_owned_jobs(
        self, owner: str, kind: str, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[JobStatus], bool]:
        rows, more = self.list_page(jobs, match_owned_jobs(owner, kind), after, limit, newest_first)
        return [status_from_row(row) for row in rows], more

    def delete_owned_job(self, job_id: str, owner: str, kind: str) -> bool:
        """Whether there was one; whoever draws it is to be told by a cancel."""
        gone = update(jobs).where(jobs.c.id == job_id, match_owned_jobs(owner, kind)).values(deleted=True)
        return bool(self.fetch_all(gone.returning(jobs.c.id)))

    def list_ended_jobs(self, job_ids: Collection[str]) -> list[JobStatus]:
        """Those of the jobs that have ended."""
        return [
            status_from_row(row)
            for row in self.fetch_all(select(jobs).where(jobs.c.id.in_(job_ids), jobs.c.state.in_(ENDED_STATES)))
        ]

    # ------------------------------------------------------------ files

    def create_file(self, owner: str, **values: Any) -> Row[Any]:
        """`values` are id, name, purpose, size_bytes, object_key and artifact."""
        return self.insert_if_absent(files, {"owner": owner, "created_at": unix_now(), "deleted": False} | values)

    def get_file(self, file_id: str, owner: str) -> Row[Any] | None:
        return self.fetch_one(select(files).where(files.c.id == file_id, match_owned_files(owner)))

    def list_files(self, owner: str, purpose: str | None, after: str | None, limit: int, newest_first: bool) -> RowPage:
        mine = (
            match_owned_files(owner) if purpose is None else and_(match_owned_files(owner), files.c.purpose == purpose)
        )
        return self.list_page(files, mine, after, limit, newest_first)

    def delete_file(self, file_id: str, owner: str) -> bool:
        """Whether there was one."""
        gone = update(files).where(files.c.id == file_id, match_owned_files(owner)).values(deleted=True)
        return bool(self.fetch_all(gone.returning(files.c.id)))

    def collect_referenced_keys(self) -> set[str]:
        """The keys that files refer to, those that an open batch still reads included."""
        read = select(batches.c.input_file_id).where(batches.c.state.in_(ACTIVE_BATCH_STATES))
        held = or_(files.c.deleted.is_(False), files.c.id.in_(read))
        return {row.object_key for row in self.fetch_all(select(files.c.object_key).where(held))}

    # ------------------------------------------------------------ batches

    def create_batch(self, owner: str, max_open_batches: int, **values: Any) -> Row[Any]:
        """`values` are id, endpoint, input_file_id, metadata and state_times.  Raises ServiceBusy where the owner has
        `max_open_batches` open ones."""
        values |= {
            "owner": owner, "state": "validating", "counts": {"total": 0, "completed": 0, "failed": 0},
            "heartbeat_at": 0.0, "created_at": unix_now(),
        }  # fmt: skip
        open_ones = (
            select(func.count())
            .where(batches.c.owner == owner, batches.c.state.in_(ACTIVE_BATCH_STATES))
            .scalar_subquery()
        )
        room = select_values(batches, values).where(open_ones < max_open_batches)
        self.fetch_all(self.insert_into(batches).from_select(list(values), room).on_conflict_do_nothing())
        row = self.get_batch(values["id"], owner)
        if row is None:
            raise ServiceBusy(
                f"batches: you have {max_open_batches} open ones; wait until one has ended", retry_after_seconds=60.0
            )
        return row

    def get_batch(self, batch_id: str, owner: str) -> Row[Any] | None:
        return self.fetch_one(select(batches).where(batches.c.id == batch_id, batches.c.owner == owner))

    def list_batches(self, owner: str, after: str | None, limit: int) -> RowPage:
        return self.list_page(batches, batches.c.owner == owner, after, limit, newest_first=True)

    def transition_batch(self, row: Row[Any], state: str, runner: str | None = None, **values: Any) -> bool:
        """From the state that the row has to another one; whether it was still so, and still this runner's."""
        state_times = row.state_times | {f"{state}_at": int(time.time())}
        still = and_(batches.c.id == row.id, batches.c.state == row.state)
        if runner is not None:
            still = and_(still, batches.c.runner_name == runner)
        moved = update(batches).where(still).values(state=state, state_times=state_times, **values)
        return bool(self.fetch_all(moved.returning(batches.c.id)))

    def claim_batch(self, runner: str, heartbeat_timeout_seconds: float) -> Row[Any] | None:
        """The oldest batch that has no runner, or one that was silent for so many seconds; now this runner's."""
        lost = and_(
            batches.c.state.in_(ACTIVE_BATCH_STATES), batches.c.heartbeat_at < unix_now() - heartbeat_timeout_seconds
        )
        first = (
            select(batches.c.id).where(lost).order_by(batches.c.created_at).limit(1).with_for_update(skip_locked=True)
        )
        mine = (
            update(batches)
            .where(batches.c.id == first.scalar_subquery(), lost)
            .values(runner_name=runner, heartbeat_at=unix_now())
        )
        return self.fetch_one(mine.returning(batches))

    def get_batch_input_key(self, batch_id: str) -> str:
        """The key of its input, whether the file was deleted since or not."""
        row = self.fetch_one(
            select(files.c.object_key)
            .join(batches, batches.c.input_file_id == files.c.id)
            .where(batches.c.id == batch_id)
        )
        assert row is not None
        return str(row.object_key)

    def get_claimed_batch(self, batch_id: str, runner: str) -> Row[Any] | None:
        """The row, while it is this runner's."""
        return self.fetch_one(select(batches).where(batches.c.id == batch_id, batches.c.runner_name == runner))

    def heartbeat_batches(self, runner: str, batch_ids: Collection[str]) -> None:
        mine = and_(
            batches.c.runner_name == runner, batches.c.id.in_(batch_ids), batches.c.state.in_(ACTIVE_BATCH_STATES)
        )
        self.fetch_all(update(batches).where(mine).values(heartbeat_at=unix_now()))

    def release_batches(self, runner: str) -> None:
        """For the next runner, at once."""
        mine = and_(batches.c.runner_name == runner, batches.c.state.in_(ACTIVE_BATCH_STATES))
        self.fetch_all(update(batches).where(mine).values(heartbeat_at=0.0, runner_name=None))

    # ------------------------------------------------------------ lines of batches

    def save_line_outcomes(self, batch_id: str, outcomes: Sequence[tuple[int, bool, dict[str, Any]]]) -> None:
        """What became of some lines: number, whether it went well, and its line of the output or error file."""
        values = [
            {"batch_id": batch_id, "line_number": number, "succeeded": ok, "output_line": line}
            for number, ok, line in outcomes
        ]
        self.fetch_all(self.insert_into(batch_lines).values(values).on_conflict_do_nothing())

    def update_batch_counts(self, batch_id: str, counts: dict[str, int]) -> None:
        self.fetch_all(update(batches).where(batches.c.id == batch_id).values(counts=counts))

    def load_line_results(self, batch_id: str) -> dict[int, bool]:
        """Of each line that has an outcome, whether it went well."""
        return {
            row.line_number: row.succeeded
            for row in self.fetch_all(
                select(batch_lines.c.line_number, batch_lines.c.succeeded).where(batch_lines.c.batch_id == batch_id)
            )
        }

    def list_line_outcomes(self, batch_id: str, after_line_number: int, limit: int) -> Sequence[Row[Any]]:
        """Kept lines with a number above `after_line_number`, in order."""
        wanted = (
            select(batch_lines)
            .where(batch_lines.c.batch_id == batch_id, batch_lines.c.line_number > after_line_number)
            .order_by(batch_lines.c.line_number)
        )
        return self.fetch_all(wanted.limit(limit))

    def delete_line_outcomes(self, batch_id: str) -> None:
        self.fetch_all(delete(batch_lines).where(batch_lines.c.batch_id == batch_id))

    # ------------------------------------------------------------ webhooks

    def create_webhook(self, owner: str, max_webhooks: int, **values: Any) -> Row[Any]:
        """`values` are id, url, secret, name and event_types.  Raises InvalidInput where the owner has
        `max_webhooks`."""
        values |= {"owner": owner, "created_at": unix_now()}
        mine = select(func.count()).where(webhooks.c.owner == owner).scalar_subquery()
        room = select_values(webhooks, values).where(mine < max_webhooks)
        row = self.fetch_one(self.insert_into(webhooks).from_select(list(values), room).returning(webhooks))
        if row is None:
            raise InvalidInput("webhooks", f"you have {max_webhooks}, which are all that one key may have")
        return row

    def get_webhook(self, webhook_id: str, owner: str) -> Row[Any] | None:
        return self.fetch_one(select(webhooks).where(webhooks.c.id == webhook_id, webhooks.c.owner == owner))

    def list_webhooks(self, owner: str, after: str | None, limit: int) -> RowPage:
        return self.list_page(webhooks, webhooks.c.owner == owner, after, limit, newest_first=True)

    def delete_webhook(self, webhook_id: str, owner: str) -> bool:
        """Whether there was one; what it has not been told it will not be."""
        gone = delete(webhooks).where(webhooks.c.id == webhook_id, webhooks.c.owner == owner)
        return bool(self.fetch_all(gone.returning(webhooks.c.id)))

    def list_unannounced_jobs(self, kind: str, limit: int) -> Sequence[Row[Any]]:
        """Jobs of the kind that came to an end that nobody has been told of: id, owner, state, ended_at."""
        told = and_(jobs.c.announced.is_(False), jobs.c.kind == kind, jobs.c.state.in_(("done", "failed")))
        return self.fetch_all(select(jobs.c.id, jobs.c.owner, jobs.c.state, jobs.c.ended_at).where(told).limit(limit))

    def list_webhooks_of_owners(self, owners: Collection[str]) -> Sequence[Row[Any]]:
        return self.fetch_all(select(webhooks).where(webhooks.c.owner.in_(owners)))

    def enqueue_deliveries(self, events: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
        """Events that are due now: id, webhook_id, body.  One whose id is known stays as it is."""
        values = [
            {"id": name, "webhook_id": hook, "body": body, "attempts": 0, "due_at": 0.0, "completed": False}
            for name, hook, body in events
        ]
        self.fetch_all(self.insert_into(webhook_deliveries).values(values).on_conflict_do_nothing())

    def mark_announced(self, job_ids: Collection[str]) -> None:
        self.fetch_all(update(jobs).where(jobs.c.id.in_(job_ids)).values(announced=True))

    def claim_due_deliveries(self, limit: int, lease_seconds: float) -> list[tuple[Row[Any], Row[Any] | None]]:
        """Deliveries to try now, each with its hook; they are due again in `lease_seconds`, should nobody say more."""
        waits = select(webhook_deliveries.c.id).where(
            webhook_deliveries.c.completed.is_(False), webhook_deliveries.c.due_at <= unix_now()
        )
        first = waits.order_by(webhook_deliveries.c.due_at).limit(limit).with_for_update(skip_locked=True)
        late = {"due_at": unix_now() + lease_seconds, "attempts": webhook_deliveries.c.attempts + 1}
        mine = update(webhook_deliveries).where(
            webhook_deliveries.c.id.in_(first), webhook_deliveries.c.completed.is_(False)
        )
        rows = self.fetch_all(mine.values(late).returning(webhook_deliveries))
        known = {
            hook.id: hook
            for hook in self.fetch_all(select(webhooks).where(webhooks.c.id.in_([row.webhook_id for row in rows])))
        }
        return [(row, known.get(row.webhook_id)) for row in rows]

    def complete_delivery(self, delivery_id: str) -> None:
        """There is nothing more to do about it."""
        self.fetch_all(update(webhook_deliveries).where(webhook_deliveries.c.id == delivery_id).values(completed=True))

    def postpone_delivery(self, delivery_id: str, delay_seconds: float) -> None:
        self.fetch_all(
            update(webhook_deliveries)
            .where(webhook_deliveries.c.id == delivery_id)
            .values(due_at=unix_now() + delay_seconds)
        )

    def delete_old_deliveries(self) -> None:
        """Forgets what was delivered long ago."""
        self.fetch_all(
            delete(webhook_deliveries).where(
                webhook_deliveries.c.completed, webhook_deliveries.c.due_at < unix_now() - DELIVERY_RETENTION_SECONDS
            )
        )


def match_owned_jobs(owner: str, kind: str) -> ColumnElement[bool]:
    return and_(jobs.c.owner == owner, jobs.c.kind == kind, jobs.c.deleted.is_(False))


def match_owned_files(owner: str) -> ColumnElement[bool]:
    return and_(files.c.owner == owner, files.c.deleted.is_(False))

"""Batches, who runs them, and the outcomes of their lines until their result files are written."""

import hashlib
import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, and_, case, delete, func, select, update

from omnivideo.errors import ServiceBusy
from omnivideo.records import BatchRecord
from omnivideo.storage.database.repository import Repository, record_from_row, select_values, unix_now
from omnivideo.storage.database.schema import batch_lines, batches, files

MAX_RUNNER_LOSSES = 3  # the number of lost runners after which a batch fails
ACTIVE_BATCH_STATES = ("validating", "in_progress", "finalizing", "cancelling")  # the states in which a runner works


def derive_line_key(batch_id: str, number: int) -> str:
    """Return the key from which the ids of a line's jobs, or of its turn, are derived."""
    return hashlib.sha256(f"{batch_id} {number}".encode()).hexdigest()[:32]


class LineOutcome(NamedTuple):
    """The outcome of one line of a batch. `output_line` is its line in the output file or the error file."""

    line_number: int
    succeeded: bool
    output_line: dict[str, Any]


class BatchRepository(Repository):
    def create_batch(
        self, owner: str, max_open_batches: int, *, batch_id: str, endpoint: str, input_file_id: str,
        metadata: dict[str, str],
    ) -> BatchRecord:  # fmt: skip
        """Create a batch and return it. If the owner has a batch with the id, return that one, unchanged.

        Raises ServiceBusy if the owner already has `max_open_batches` active batches.
        """
        values = {
            "id": batch_id, "owner": owner, "state": "validating", "endpoint": endpoint,
            "input_file_id": input_file_id, "metadata": metadata, "state_times": {},
            "counts": {"total": 0, "completed": 0, "failed": 0}, "heartbeat_at": 0.0, "created_at": unix_now(),
        }  # fmt: skip
        active_count = select(func.count()).where(batches.c.owner == owner, batches.c.state.in_(ACTIVE_BATCH_STATES))
        row_if_allowed = select_values(batches, values).where(active_count.scalar_subquery() < max_open_batches)
        self.fetch_all(self.insert_into(batches).from_select(list(values), row_if_allowed).on_conflict_do_nothing())
        batch = self.get_batch(batch_id, owner)
        if batch is None:
            raise ServiceBusy(
                f"batches: you have {max_open_batches} open batches, the maximum; wait until one has ended",
                retry_after_seconds=60.0,
            )
        return batch

    def get_batch(self, batch_id: str, owner: str) -> BatchRecord | None:
        is_batch = and_(batches.c.id == batch_id, batches.c.owner == owner, batches.c.deleted.is_(False))
        row = self.fetch_one(select(batches).where(is_batch))
        return None if row is None else record_from_row(BatchRecord, row)

    def list_batches(self, owner: str, after: str | None, limit: int) -> tuple[list[BatchRecord], bool]:
        """Return a page of the owner's batches, newest first, and whether more follow."""
        is_owned = batches.c.owner == owner
        cursor_query = select(batches.c.created_at, batches.c.id).where(is_owned, batches.c.id == after)
        is_listed = and_(is_owned, batches.c.deleted.is_(False))
        rows, has_more = self.fetch_page(batches, is_listed, after, limit, True, cursor_query)
        return [record_from_row(BatchRecord, row) for row in rows], has_more

    def delete_batch(self, batch_id: str, owner: str) -> bool:
        """Mark a batch as deleted and cancel it. Return False if the owner has no such batch."""
        is_batch = and_(batches.c.id == batch_id, batches.c.owner == owner, batches.c.deleted.is_(False))
        is_open = batches.c.state.in_(("validating", "in_progress"))
        state = case((is_open, "cancelling"), else_=batches.c.state)
        deletion = update(batches).where(is_batch).values(deleted=True, state=state)
        return bool(self.fetch_all(deletion.returning(batches.c.id)))

    def transition_batch(self, batch: BatchRecord, state: str, runner: str | None = None, **values: Any) -> bool:
        """Move a batch to another state and set other columns with it.

        Return False, and change nothing, if the batch has left the state that `batch` says or, if `runner` is given,
        belongs to another runner.
        """
        state_times = batch.state_times | {f"{state}_at": int(time.time())}
        is_unchanged = and_(batches.c.id == batch.id, batches.c.state == batch.state)
        if runner is not None:
            is_unchanged = and_(is_unchanged, batches.c.runner_name == runner)
        values |= {"state": state, "state_times": state_times, "runner_losses": 0}
        transition = update(batches).where(is_unchanged).values(values)
        return bool(self.fetch_all(transition.returning(batches.c.id)))

    # ------------------------------------------------------------ runners

    def claim_batch(
        self, runner: str, heartbeat_timeout_seconds: float, excluded_owners: Collection[str] = ()
    ) -> BatchRecord | None:
        """Claim for the runner an active batch that has no runner or whose runner has stopped responding.

        Owners are served in turn: the one with the fewest attended batches is first, and of its batches the oldest.
        """
        is_unattended = match_unattended(heartbeat_timeout_seconds)
        attended = batches.alias("attended")
        is_attended = and_(
            attended.c.owner == batches.c.owner,
            attended.c.state.in_(ACTIVE_BATCH_STATES),
            attended.c.heartbeat_at >= unix_now() - heartbeat_timeout_seconds,
        )
        num_attended = select(func.count()).select_from(attended).where(is_attended).scalar_subquery()
        in_order = select(batches.c.id).where(is_unattended, batches.c.owner.not_in(excluded_owners))
        next_id = in_order.order_by(num_attended, batches.c.created_at).limit(1).with_for_update(skip_locked=True)
        claim = update(batches).where(batches.c.id == next_id.scalar_subquery(), is_unattended)
        losses = batches.c.runner_losses + case((batches.c.runner_name.is_not(None), 1), else_=0)
        values = {"runner_name": runner, "heartbeat_at": unix_now(), "runner_losses": losses}
        row = self.fetch_one(claim.values(values).returning(batches))
        return None if row is None else record_from_row(BatchRecord, row)

    def fail_poisonous_batches(self, heartbeat_timeout_seconds: float, error: dict[str, Any]) -> list[str]:
        """End the batches that have stopped MAX_RUNNER_LOSSES runners without any progress, and return their ids."""
        is_last_loss = and_(batches.c.runner_name.is_not(None), batches.c.runner_losses >= MAX_RUNNER_LOSSES - 1)
        query = select(batches).where(match_unattended(heartbeat_timeout_seconds), is_last_loss)
        records = [record_from_row(BatchRecord, row) for row in self.fetch_all(query)]
        return [
            record.id
            for record in records
            if self.transition_batch(record, "failed", record.runner_name, validation_errors=[error])
        ]

    def get_claimed_batch(self, batch_id: str, runner: str) -> BatchRecord | None:
        """Return the batch if it belongs to the runner."""
        row = self.fetch_one(select(batches).where(batches.c.id == batch_id, batches.c.runner_name == runner))
        return None if row is None else record_from_row(BatchRecord, row)

    def get_batch_input_key(self, batch_id: str) -> str:
        """Return the object key of the input file, even if the file has been deleted since."""
        join = select(files.c.object_key).join(batches, batches.c.input_file_id == files.c.id)
        row = self.fetch_one(join.where(batches.c.id == batch_id))
        assert row is not None
        return str(row.object_key)

    def heartbeat_batches(self, runner: str, batch_ids: Collection[str]) -> None:
        is_claimed = and_(
            batches.c.runner_name == runner, batches.c.id.in_(batch_ids), batches.c.state.in_(ACTIVE_BATCH_STATES)
        )
        self.fetch_all(update(batches).where(is_claimed).values(heartbeat_at=unix_now()))

    def release_batches(self, runner: str, batch_ids: Collection[str] | None = None) -> None:
        """Release the runner's batches, by default all, so that another runner can claim them at once."""
        is_claimed = and_(batches.c.runner_name == runner, batches.c.state.in_(ACTIVE_BATCH_STATES))
        if batch_ids is not None:
            is_claimed = and_(is_claimed, batches.c.id.in_(batch_ids))
        self.fetch_all(update(batches).where(is_claimed).values(heartbeat_at=0.0, runner_name=None))

    # ------------------------------------------------------------ lines

    def save_line_outcomes(self, batch_id: str, outcomes: Sequence[LineOutcome]) -> None:
        """Save outcomes of lines. A line that already has an outcome keeps it."""
        values = [
            {"batch_id": batch_id, "line_number": number, "succeeded": succeeded, "output_line": output_line}
            for number, succeeded, output_line in outcomes
        ]
        self.fetch_all(self.insert_into(batch_lines).values(values).on_conflict_do_nothing())

    def update_batch_counts(self, batch_id: str, counts: dict[str, int]) -> None:
        self.fetch_all(update(batches).where(batches.c.id == batch_id).values(counts=counts, runner_losses=0))

    def load_line_results(self, batch_id: str) -> dict[int, bool]:
        """Return whether each line that has an outcome succeeded, by line number."""
        query = select(batch_lines.c.line_number, batch_lines.c.succeeded).where(batch_lines.c.batch_id == batch_id)
        return {row.line_number: row.succeeded for row in self.fetch_all(query)}

    def list_line_outcomes(self, batch_id: str, after_line_number: int, limit: int) -> list[LineOutcome]:
        """Return the saved outcomes of lines above `after_line_number`, in order."""
        columns = select(batch_lines.c.line_number, batch_lines.c.succeeded, batch_lines.c.output_line)
        query = columns.where(batch_lines.c.batch_id == batch_id, batch_lines.c.line_number > after_line_number)
        return [
            LineOutcome._make(row) for row in self.fetch_all(query.order_by(batch_lines.c.line_number).limit(limit))
        ]

    def delete_line_outcomes(self, batch_id: str) -> None:
        self.fetch_all(delete(batch_lines).where(batch_lines.c.batch_id == batch_id))


def match_unattended(heartbeat_timeout_seconds: float) -> ColumnElement[bool]:
    """Match the active batches that have no runner or whose runner has stopped responding."""
    return and_(
        batches.c.state.in_(ACTIVE_BATCH_STATES), batches.c.heartbeat_at < unix_now() - heartbeat_timeout_seconds
    )

"""Remove the rows of what users have deleted, and of what has ended longer ago than its lifetime.

What was deleted is removed once nothing has worked on it for IDLE_SECONDS, so that no process that still follows it
finds its rows missing. The API hides it at once.
"""

from typing import Any, NamedTuple

from sqlalchemy import and_, delete, exists, func, or_, select, text, update

from omnivideo.contracts import OPEN_STATES
from omnivideo.storage.database.batches import ACTIVE_BATCH_STATES, derive_line_key
from omnivideo.storage.database.files import match_present_files
from omnivideo.storage.database.job_rows import ENDED_STATES
from omnivideo.storage.database.job_statistics import JobStatistics
from omnivideo.storage.database.repository import unix_now
from omnivideo.storage.database.schema import (
    batch_lines,
    batches,
    chat_threads,
    deleted_webhooks,
    files,
    idempotency_keys,
    jobs,
    stored_objects,
    threads,
    turn_events,
    turns,
    webhooks,
)

IDLE_SECONDS = 3600.0
ROWS_AT_ONCE = 500  # in one statement, so that none holds the database for long


class OpenWork(NamedTuple):
    """What still runs although it was deleted: the turns, and the jobs."""

    turn_ids: list[str]
    job_ids: list[str]


class RetentionRepository(JobStatistics):
    """All tables, as the sweep sees them. Each method may be repeated after its process was killed."""

    # ------------------------------------------------------------ what was deleted

    def mark_owner_deleted(self, owner: str) -> None:
        """Mark everything of an owner as deleted."""
        for table in (threads, jobs, files, batches):
            self.fetch_all(update(table).where(table.c.owner == owner).values(deleted=True))
        for table in (webhooks, deleted_webhooks, chat_threads, idempotency_keys):
            self.fetch_all(delete(table).where(table.c.owner == owner))

    def find_open_work(self) -> OpenWork:
        """Return what must be cancelled: open turns of deleted threads, with their jobs, and deleted open jobs."""
        is_deleted = turns.c.thread_id.in_(select(threads.c.id).where(threads.c.deleted))
        turn_query = select(turns.c.id).where(turns.c.state.in_(OPEN_STATES), is_deleted)
        turn_ids = [row.id for row in self.fetch_all(turn_query)]
        is_unwanted = or_(jobs.c.deleted, jobs.c.turn_id.in_(turn_query))
        job_query = select(jobs.c.id).where(jobs.c.state.in_(OPEN_STATES), is_unwanted)
        return OpenWork(turn_ids, [row.id for row in self.fetch_all(job_query)])

    def close_deleted_batches(self) -> None:
        """Let the runners end the deleted batches that are open."""
        is_open = batches.c.state.in_(("validating", "in_progress"))
        self.fetch_all(update(batches).where(batches.c.deleted, is_open).values(state="cancelling"))

    def list_removable_threads(self) -> list[str]:
        """Return the deleted threads that nothing works on any more."""
        is_busy = or_(turns.c.state.in_(OPEN_STATES), turns.c.heartbeat_at > unix_now() - IDLE_SECONDS)
        has_busy_turn = exists().where(turns.c.thread_id == threads.c.id, is_busy)
        return [row.id for row in self.fetch_all(select(threads.c.id).where(threads.c.deleted, ~has_busy_turn))]

    def delete_thread_rows(self, thread_id: str) -> None:
        """Delete a thread with its turns and their events, and mark its jobs as deleted."""
        row = self.fetch_one(select(threads.c.owner).where(threads.c.id == thread_id))
        if row is None:
            return
        turn_ids = select(turns.c.id).where(turns.c.thread_id == thread_id)
        is_job = and_(jobs.c.owner == row.owner, jobs.c.id.startswith(f"{thread_id}/", autoescape=True))
        self.fetch_all(update(jobs).where(is_job).values(deleted=True))
        self.fetch_all(delete(turn_events).where(turn_events.c.turn_id.in_(turn_ids)))
        self.fetch_all(delete(chat_threads).where(chat_threads.c.thread_id == thread_id))
        is_created_for = or_(idempotency_keys.c.resource_id == thread_id, idempotency_keys.c.resource_id.in_(turn_ids))
        self.fetch_all(delete(idempotency_keys).where(is_created_for))
        self.fetch_all(delete(turns).where(turns.c.thread_id == thread_id))
        self.fetch_all(delete(threads).where(threads.c.id == thread_id))

    def delete_batches(self, job_lifetime_seconds: float) -> int:
        """Delete the ended batches that are deleted or too old. Return how many of them were deleted by their owners.

        What the lines of a deleted batch have made is marked as deleted as well.
        """
        has_ended, num_deleted = batches.c.state.not_in(ACTIVE_BATCH_STATES), 0
        is_old = batches.c.created_at < unix_now() - job_lifetime_seconds
        for row in self.fetch_all(select(batches).where(has_ended, or_(batches.c.deleted, is_old))):
            if row.deleted:
                self.mark_results_of_batch_deleted(row)
                num_deleted += 1
            self.fetch_all(delete(batch_lines).where(batch_lines.c.batch_id == row.id))
            self.fetch_all(delete(batches).where(batches.c.id == row.id))
        return num_deleted

    def mark_results_of_batch_deleted(self, batch: Any) -> None:
        """Mark the result files, the jobs and the threads of a batch's lines as deleted.

        A thread in which another turn has happened since is the owner's conversation, and stays.
        """
        result_ids = [file_id for file_id in (batch.output_file_id, batch.error_file_id) if file_id]
        self.fetch_all(update(files).where(files.c.id.in_(result_ids)).values(deleted=True))
        # Older versions have not stored the last line's number; it differs from the number of lines by empty lines.
        last_line = batch.last_line or 2 * batch.counts["total"] + 100
        line_keys = {derive_line_key(batch.id, number) for number in range(1, last_line + 1)}
        made_jobs = select(jobs.c.id).where(jobs.c.owner == batch.owner, jobs.c.kind.in_(("video", "image")))
        job_ids = [row.id for row in self.fetch_all(made_jobs) if row.id.partition("_")[2][:32] in line_keys]
        for start in range(0, len(job_ids), ROWS_AT_ONCE):
            is_line = jobs.c.id.in_(job_ids[start : start + ROWS_AT_ONCE])
            self.fetch_all(update(jobs).where(is_line).values(deleted=True))
        made_turns = self.fetch_all(select(turns.c.id, turns.c.thread_id).where(turns.c.owner == batch.owner))
        is_of_line = {row.id: row.id.removeprefix("turn_") in line_keys for row in made_turns}
        thread_ids = {row.thread_id for row in made_turns if is_of_line[row.id]}
        thread_ids -= {row.thread_id for row in made_turns if not is_of_line[row.id]}
        for thread_id in sorted(thread_ids):
            self.fetch_all(update(threads).where(threads.c.id == thread_id).values(deleted=True))

    def delete_files(self) -> int:
        """Delete the files that were deleted or have expired, unless an active batch reads them. Return the number."""
        active_input_ids = select(batches.c.input_file_id).where(batches.c.state.in_(ACTIVE_BATCH_STATES))
        deletion = delete(files).where(~match_present_files(), files.c.id.not_in(active_input_ids))
        return len(self.fetch_all(deletion.returning(files.c.id)))

    # ------------------------------------------------------------ what has ended

    def delete_jobs(self, job_lifetime_seconds: float) -> int:
        """Delete the ended jobs that are deleted or too old. Return how many of them were deleted by their owners.

        A job of a pass that still runs is kept, because the others of the pass need its request.
        """
        open_passes = select(jobs.c.batch_job_ids).where(jobs.c.state.in_(OPEN_STATES))
        is_in_pass = jobs.c.batch_job_ids.is_not(None)
        kept = {job_id for row in self.fetch_all(open_passes.where(is_in_pass)) for job_id in row.batch_job_ids}
        now, num_deleted = unix_now(), 0
        is_deleted = and_(jobs.c.deleted, jobs.c.ended_at < now - IDLE_SECONDS)
        is_removable = or_(is_deleted, jobs.c.ended_at < now - job_lifetime_seconds)
        query = select(jobs.c.id, jobs.c.deleted).where(jobs.c.state.in_(ENDED_STATES), is_removable)
        while rows := self.fetch_all(query.where(jobs.c.id.not_in(kept)).limit(ROWS_AT_ONCE)):
            self.delete_job_rows([row.id for row in rows])
            num_deleted += sum(row.deleted for row in rows)
        return num_deleted

    def delete_turns(self, turn_lifetime_seconds: float) -> None:
        """Delete the turns that have ended longer ago, with their events. The threads keep what was said and made.

        The last turn of a thread stays if it has asked a question.
        """
        later = turns.alias("later")
        is_followed = exists().where(later.c.thread_id == turns.c.thread_id, later.c.created_at > turns.c.created_at)
        has_ended = and_(turns.c.state.not_in(OPEN_STATES), or_(turns.c.state != "asks", is_followed))
        is_old = turns.c.heartbeat_at < unix_now() - turn_lifetime_seconds
        query = select(turns.c.id).where(has_ended, is_old).limit(ROWS_AT_ONCE)
        while turn_ids := [row.id for row in self.fetch_all(query)]:
            self.fetch_all(delete(turn_events).where(turn_events.c.turn_id.in_(turn_ids)))
            self.fetch_all(delete(turns).where(turns.c.id.in_(turn_ids)))

    def mark_idle_threads_deleted(self, lifetime_seconds: float) -> None:
        """Mark the threads as deleted in which no turn has begun or run for the given time."""
        cutoff = unix_now() - lifetime_seconds
        is_busy = or_(turns.c.state.in_(OPEN_STATES), turns.c.heartbeat_at > cutoff)
        is_used = exists().where(turns.c.thread_id == threads.c.id, is_busy)
        is_idle = func.coalesce(threads.c.used_at, threads.c.created_at) < cutoff
        self.fetch_all(update(threads).where(is_idle, ~threads.c.deleted, ~is_used).values(deleted=True))

    def delete_old_records(self, lifetime_seconds: float) -> None:
        """Delete the digests of chats' histories and the ids of deleted webhooks that are older."""
        for table in (chat_threads, deleted_webhooks):
            self.fetch_all(delete(table).where(table.c.created_at < unix_now() - lifetime_seconds))

    # ------------------------------------------------------------ objects

    def adopt_objects(self, keys: set[str]) -> None:
        """Record objects that older versions have written for the service."""
        unknown = sorted(keys - {row.key for row in self.fetch_all(select(stored_objects.c.key))})
        for start in range(0, len(unknown), ROWS_AT_ONCE):
            values = [{"key": key, "written_at": 0.0} for key in unknown[start : start + ROWS_AT_ONCE]]
            self.fetch_all(self.insert_into(stored_objects).values(values).on_conflict_do_nothing())

    def list_unreferenced_objects(self, referenced_keys: set[str], min_age_seconds: float) -> set[str]:
        """Return the service's objects that nothing refers to.

        They are older than `min_age_seconds` and than every open turn, which may refer to what it has written.
        """
        oldest_turn = select(func.min(turns.c.created_at)).where(turns.c.state.in_(OPEN_STATES)).scalar_subquery()
        is_old = and_(
            stored_objects.c.written_at < unix_now() - min_age_seconds,
            stored_objects.c.written_at < func.coalesce(oldest_turn, unix_now()),
        )
        return {row.key for row in self.fetch_all(select(stored_objects.c.key).where(is_old))} - referenced_keys

    def forget_objects(self, keys: set[str]) -> None:
        """Remove the records of objects that no longer exist."""
        in_order = sorted(keys)
        for start in range(0, len(in_order), ROWS_AT_ONCE):
            is_gone = stored_objects.c.key.in_(in_order[start : start + ROWS_AT_ONCE])
            self.fetch_all(delete(stored_objects).where(is_gone))

    # ------------------------------------------------------------ freed space

    def erase_freed_space(self) -> None:
        """Overwrite what deleted rows have left in the files of a SQLite database; let PostgreSQL reuse the space.

        SQLite overwrites most of it at once (`secure_delete`), but not the copies that reordering a page leaves.
        """
        self.fetch_all(text("VACUUM"))
        if self.engine.dialect.name == "sqlite":
            self.fetch_all(text("PRAGMA wal_checkpoint(TRUNCATE)"))

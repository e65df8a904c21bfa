"""The sweep: remove what users have deleted, what has ended long ago, and objects that nothing refers to.

What was deleted is gone after the first sweep that finds nothing at work on it for IDLE_SECONDS. Sweeps may run beside
the service and beside each other, and a sweep whose process was killed is completed by the next one.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from omnivideo.ports import SweepableObjectStore
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.retention import IDLE_SECONDS, RetentionRepository
from omnivideo.storage.database.turns import TurnRepository

log = logging.getLogger("omnivideo.storage")


class Checkpoints(Protocol):
    """The checkpoints of threads."""

    def delete_thread(self, thread_id: str) -> None: ...

    def erase_freed_space(self) -> None:
        """Overwrite what deleted checkpoints have left in files, where the database allows it."""
        ...


@dataclass(frozen=True)
class Lifetimes:
    """How long things are kept, in seconds: objects that nothing refers to, ended turns, and ended jobs and batches.

    Threads are kept for `thread_seconds` after their last turn; 0: until they are deleted.
    """

    artifact_seconds: float
    turn_seconds: float
    job_seconds: float
    thread_seconds: float = 0.0


class SweepResult(NamedTuple):
    """What a sweep has removed: the keys of objects, and how many deleted threads, jobs, files and batches."""

    object_keys: list[str]
    num_deleted: int


@dataclass
class Sweep:
    """`collect_referenced_keys` returns the keys of all objects that must be kept."""

    rows: RetentionRepository
    jobs: JobRepository
    turns: TurnRepository
    checkpoints: Checkpoints
    store: SweepableObjectStore
    collect_referenced_keys: Callable[[], set[str]]
    lifetimes: Lifetimes

    def run(self) -> SweepResult:
        if self.lifetimes.thread_seconds:
            self.rows.mark_idle_threads_deleted(self.lifetimes.thread_seconds)
        self.cancel_open_work()
        num_deleted = self.remove_deleted()
        self.remove_old()
        object_keys = self.remove_objects()
        if num_deleted:
            self.rows.erase_freed_space()
            self.checkpoints.erase_freed_space()
        return SweepResult(object_keys, num_deleted)

    def cancel_open_work(self) -> None:
        """Cancel what still runs although it was deleted, for example by a version that did not do so."""
        work = self.rows.find_open_work()
        for turn_id in work.turn_ids:
            self.turns.cancel_turn(turn_id)
        for job_id in work.job_ids:
            self.jobs.cancel(job_id)
        self.rows.close_deleted_batches()

    def remove_deleted(self) -> int:
        """Remove the rows and checkpoints of what was deleted, and return the number of threads, jobs and so on."""
        num_deleted = self.rows.delete_batches(self.lifetimes.job_seconds)
        thread_ids = self.rows.list_removable_threads()
        for thread_id in thread_ids:
            self.checkpoints.delete_thread(thread_id)
            self.rows.delete_thread_rows(thread_id)  # last, so that an interrupted sweep finds the thread again
        num_deleted += len(thread_ids) + self.rows.delete_files()
        return num_deleted + self.rows.delete_jobs(self.lifetimes.job_seconds)

    def remove_old(self) -> None:
        """Remove the turns that have ended long ago, and old records of chats and webhooks."""
        self.rows.delete_turns(self.lifetimes.turn_seconds)
        self.rows.delete_old_records(self.lifetimes.job_seconds)

    def remove_objects(self) -> list[str]:
        """Remove the objects that nothing refers to, and return their keys.

        Those of the service are removed after IDLE_SECONDS; others, such as a Studio's, have their own lifetime.
        """
        referenced_keys = self.collect_referenced_keys()
        self.rows.adopt_objects(referenced_keys)
        candidates = self.rows.list_unreferenced_objects(referenced_keys, IDLE_SECONDS)
        removed_keys = self.store.sweep(referenced_keys, IDLE_SECONDS, candidates)
        removed_keys += self.store.sweep(referenced_keys, self.lifetimes.artifact_seconds)
        self.rows.forget_objects({*removed_keys, *self.find_missing(candidates - {*removed_keys})})
        return removed_keys

    def find_missing(self, keys: Collection[str]) -> list[str]:
        """Return the keys without an object: those that a worker has deleted, and writes that have failed."""
        return [key for key in keys if not self.store.has(key)]

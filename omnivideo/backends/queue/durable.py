"""Jobs that outlive their followers: submitted to the database, drawn by whichever worker comes."""

import base64
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from omnivideo.contracts import Artifact, Job, Lane, Preview, StepProgress
from omnivideo.errors import ArtifactNotFound, StoreError
from omnivideo.ports import ObjectStore
from omnivideo.storage.database.jobs import JobRepository, result_from_status

POLL_SECONDS = 0.05  # seconds between two looks at a job that is followed
RETRY_TIMEOUT_SECONDS = 120.0  # seconds that a database or a store that is away is waited for
Answer = TypeVar("Answer")


def retry_while_unavailable(operation: Callable[[], Answer]) -> Answer:
    """Tries again while the database or the store is away."""
    pause_seconds, deadline = 0.05, time.monotonic() + RETRY_TIMEOUT_SECONDS
    while True:
        try:
            return operation()
        except StoreError as error:
            if isinstance(error, ArtifactNotFound) or time.monotonic() > deadline:
                raise
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, 2.0)


class DurableQueue:
    """The planner's job queue over the database.  `notify_workers` lets workers know that there is work."""

    def __init__(
        self,
        jobs: JobRepository,
        store: ObjectStore,
        notify_workers: Callable[[], None],
        owner: str = "local",
        lane: Lane = "interactive",
    ):
        self.jobs = jobs
        self.store = store
        self.notify_workers = notify_workers
        self.owner = owner
        self.lane = lane

    def run(self, job: Job) -> Iterator[StepProgress | Preview | Artifact]:
        if retry_while_unavailable(partial(self.jobs.submit, job, self.owner, self.lane)):
            self.notify_workers()
        yield from self.follow_job(job.id)

    def follow_job(self, job_id: str) -> Iterator[StepProgress | Preview | Artifact]:
        """Raises JobFailed or JobCancelled at its end."""
        step, preview = 0, None
        while True:
            status = retry_while_unavailable(partial(self.jobs.get_status, job_id))
            if status is None:
                raise StoreError(f"queue: there is no job {job_id}")
            if status.step != step:
                step = status.step
                yield StepProgress(step=status.step, steps=status.steps, eta_seconds=status.eta_seconds)
            if status.preview and status.preview != preview:
                preview = status.preview
                yield Preview(png=base64.b64encode(self.store.get(preview)).decode())
            if (result := result_from_status(status)) is not None:
                yield result
                return
            time.sleep(POLL_SECONDS)

    def cancel(self, job_id: str) -> None:
        self.jobs.cancel(job_id)

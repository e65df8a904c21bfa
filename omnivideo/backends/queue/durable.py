"""A queue of jobs that outlive their followers: they are stored in the database, and any worker can claim them."""

import base64
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

from omnivideo.contracts import Artifact, Job, JobStatus, Lane, Preview, StepProgress
from omnivideo.errors import JobCancelled, ServiceStopping, StoreError, build_job_error
from omnivideo.ports import ObjectStore
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.repository import retry_while_unavailable


class Workers(Protocol):
    """Whoever can tell the workers that there is work. They may be reached for the first time by that."""

    @property
    def notify_workers(self) -> Callable[[], None]: ...


class DurableQueue:
    """The planner's job queue in the database."""

    def __init__(
        self,
        jobs: JobRepository,
        store: ObjectStore,
        workers: Workers,
        owner: str = "local",
        lane: Lane = "interactive",
    ):
        self.jobs = jobs
        self.store = store
        self.workers = workers
        self.owner = owner
        self.lane = lane

    def run(self, job: Job) -> Iterator[StepProgress | Preview | Artifact]:
        """Submit the job and follow it, as the port specifies.

        If a turn of the service submits the job, the job's worker writes steps and previews to the turn's events
        itself, and only the artifact is returned here.
        """
        if retry_while_unavailable(partial(self.jobs.submit, job, self.owner, self.lane)):
            self.workers.notify_workers()
        yield from self.follow_job(job.id)

    def follow_job(self, job_id: str) -> Iterator[StepProgress | Preview | Artifact]:
        """Follow a submitted job to its artifact.

        Raises JobFailed or JobCancelled if it ends without one, and ServiceStopping if this process stops first.
        """
        include_steps = self.require_status(job_id).turn_id is None
        step, preview = 0, None
        with self.jobs.watch_job(job_id, include_steps) as watch:
            while True:
                status = self.require_status(job_id)
                if include_steps and status.step != step:
                    step = status.step
                    yield StepProgress(step=status.step, steps=status.steps, eta_seconds=status.eta_seconds)
                if include_steps and status.preview and status.preview != preview:
                    preview = status.preview
                    yield Preview(png=base64.b64encode(self.store.get(preview)).decode())
                if (result := result_from_status(status)) is not None:
                    yield result
                    return
                if self.jobs.is_stopping.is_set():
                    raise ServiceStopping
                watch.wait()

    def require_status(self, job_id: str) -> JobStatus:
        status = retry_while_unavailable(partial(self.jobs.get_status, job_id))
        if status is None:
            raise StoreError(f"queue: there is no job {job_id}")
        return status

    def cancel(self, job_id: str) -> None:
        self.jobs.cancel(job_id)


def result_from_status(status: JobStatus) -> Artifact | None:
    """Return the result of a job, or None while it is open. Raises JobFailed, InvalidInput or JobCancelled."""
    if status.state == "failed":
        raise build_job_error(status.code or "internal", str(status.error))
    if status.state == "cancelled":
        raise JobCancelled("the clip was cancelled")
    return status.result

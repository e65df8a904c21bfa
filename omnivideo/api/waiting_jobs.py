"""Requests that wait for their jobs: images, and videos that are returned in the response."""

from collections.abc import Callable
from typing import Generic, Literal, TypeVar

from anyio.to_thread import run_sync
from fastapi import Request

from omnivideo.api.dependencies import IdempotentRequest, ServiceContext
from omnivideo.api.errors import error_from_job
from omnivideo.api.generation import JobRequest, find_live_job, submit_jobs
from omnivideo.api.generation_requests import GenerationRequest
from omnivideo.api.waiting import leave_work
from omnivideo.contracts import JobStatus
from omnivideo.errors import ServiceStopping

DISCONNECT_CHECK_SECONDS = 0.5  # how often a waiting request checks that its client is still connected
Payload = TypeVar("Payload", bound=GenerationRequest)


class WaitingJobs(Generic[Payload]):
    """The jobs of one request. Several clients may wait for them with one idempotency key.

    `list_ids` returns the ids of the jobs of a base id, and `build_jobs` the jobs.
    """

    def __init__(
        self,
        context: ServiceContext,
        owner: str,
        payload: Payload,
        idempotent_request: IdempotentRequest,
        kind: Literal["image", "video"],
        build_jobs: Callable[[ServiceContext, str, Payload, str], list[JobRequest]],
        list_ids: Callable[[str, int], list[str]],
    ):
        self.context, self.owner, self.payload, self.kind = context, owner, payload, kind
        self.idempotent_request = idempotent_request
        self.build_jobs, self.list_ids = build_jobs, list_ids
        self.base_id, self.ids = "", list[str]()

    def submit(self) -> None:
        """Submit the jobs, unless an earlier request with the key has done so, and wait for them from now on."""
        self.base_id = self.idempotent_request.run(
            self.payload, f"{self.kind}_", self.find_live_jobs, self.submit_new_jobs, is_waiting=True
        )
        self.ids = self.list_ids(self.base_id, self.payload.n)

    def find_live_jobs(self, base_id: str) -> str | None:
        """Return the id if all jobs exist and none was cancelled or deleted."""
        job_ids = self.list_ids(base_id, self.payload.n)
        live_jobs = [find_live_job(self.context, self.owner, self.kind, job_id) for job_id in job_ids]
        return base_id if all(live_jobs) else None

    def submit_new_jobs(self, base_id: str) -> str:
        submit_jobs(self.context, self.owner, self.build_jobs(self.context, self.owner, self.payload, base_id))
        return base_id

    def cancel(self) -> None:
        for job_id in self.ids:
            self.context.jobs.cancel(job_id)

    def leave(self, has_disconnected: bool = False) -> None:
        """Stop waiting. If the client has disconnected and no other one waits, cancel the jobs."""
        self.idempotent_request.leave(self.base_id, self.cancel if has_disconnected else None)

    async def run(self, request: Request) -> list[JobStatus] | None:
        """Submit the jobs, and return them in order once all are done, or None if the client has disconnected."""
        await run_sync(self.submit)
        statuses = None
        try:
            statuses = await self.wait(request)
        finally:
            await leave_work(self.leave, statuses is None, self.context.settings.disconnect_grace_seconds)
        return statuses

    async def wait(self, request: Request) -> list[JobStatus] | None:
        """Return what `run` returns. If a job fails or is cancelled, the others are cancelled and its error raised.

        Raises ServiceStopping.
        """
        jobs = self.context.jobs
        with jobs.watch_ends(self.ids) as watch:
            while True:
                status_by_id = {status.id: status for status in await run_sync(jobs.list_statuses, self.ids)}
                statuses = [status_by_id[job_id] for job_id in self.ids]
                failed = next((status for status in statuses if status.state in ("failed", "cancelled")), None)
                if failed is not None:
                    await run_sync(self.cancel)
                    raise error_from_job(failed)
                if all(status.state == "done" for status in statuses):
                    return statuses
                if await request.is_disconnected():
                    return None
                if self.context.turn_runner.stop_event.is_set():
                    raise ServiceStopping
                await watch.receive(DISCONNECT_CHECK_SECONDS)

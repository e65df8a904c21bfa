"""A worker: claims a job, renders it, and reports every step to the database.

It can continue a job whose worker was lost, from that worker's last saved state.
"""

import base64
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from opentelemetry import trace
from opentelemetry.propagate import extract

from omnivideo.backends.decoder.pipeline import DenoisingProgress, GeneratedClip
from omnivideo.backends.decoder.renderer import Renderer
from omnivideo.backends.decoder.resume import ResumePoint, pack_resume_point, unpack_resume_point
from omnivideo.backends.decoder.worker_report import WorkerReporter, describe_worker
from omnivideo.backends.queue.local import PREVIEW_FRACTIONS
from omnivideo.contracts import Artifact, Claim, Job, SamplingParams, StepProgress
from omnivideo.errors import ArtifactNotFound, InvalidInput, JobLost, OmniVideoError, PartOutOfMemory, StoreError
from omnivideo.models.sampling import DenoisingState
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.repository import retry_while_unavailable
from omnivideo.storage.database.workers import WorkerRepository

log = logging.getLogger("omnivideo.worker")
TRACER = trace.get_tracer("omnivideo.worker")
INTERNAL_ERROR_TEXT = "an internal error occurred; the worker's log has the details under this job's id"
OUT_OF_MEMORY_TEXT = "the clip needs more memory than this worker has; request a smaller size or fewer frames"


@dataclass(frozen=True)
class WorkerConfig:
    """When a worker saves its state, when it counts as lost, and how much it renders in one pass.

    The state is saved every `save_every_steps` steps, but at most once every `save_every_seconds`. A worker counts as
    lost after `heartbeat_timeout_seconds` without a heartbeat. `max_batch_size` limits the clips of the batch lane that
    are rendered in one pass.
    """

    save_every_steps: int = 8
    save_every_seconds: float = 2.0
    heartbeat_timeout_seconds: float = 15.0
    max_batch_size: int = 1


class CancellationRequested(Exception):
    """The job's owner has cancelled it."""


class StopRequested(Exception):
    """The worker's process is about to end, and the state of its job is saved."""


class Worker:
    """Renders one job, or one batch of jobs, at a time with one model.

    After `stop_requested` is set, the jobs are given back to the queue at the end of the current denoising step.
    """

    def __init__(self, renderer: Renderer, jobs: JobRepository, config: WorkerConfig | None = None):
        self.renderer = renderer
        self.jobs = jobs
        self.config = config or WorkerConfig()
        self.worker_name = f"{socket.gethostname()}:{os.getpid()}"
        self.stop_requested = threading.Event()
        self.resume_key: str | None = None  # of the last saved state of the claimed jobs
        self.must_keep_state = False  # another attempt may continue from it
        self.claimed_at = 0.0  # time.monotonic() of the claimed jobs

    def run_next_job(self) -> bool:
        """Render the next queued job, and return False if none is queued. A failing job does not stop the worker."""
        claim = retry_while_unavailable(lambda: self.jobs.claim_next_job(self.worker_name, self.renderer.model))
        if claim is None:
            return False
        claims = self.claim_batch(claim)
        self.resume_key, self.must_keep_state, self.claimed_at = claims[0].resume_key, False, time.monotonic()
        for member in claims:
            action = "continues" if member.resume_key else "begins"
            log.info("job %s: attempt %d %s", member.job.id, member.attempt, action, extra=describe_attempt(member))
        context = extract({"traceparent": claim.traceparent}) if claim.traceparent else None
        attributes: dict[str, str | int] = {"job": claim.job.id, "attempt": claim.attempt, "task": claim.job.task}
        with TRACER.start_as_current_span("job", context, attributes=attributes | {"batch_size": len(claims)}):
            if claims[0].batch_job_ids:
                self.run_batch(claims)
            else:
                with tolerate_job_lost(claim):
                    self.run_claim(claim)
        if not self.must_keep_state:
            self.replace_state(None)
        return True

    def replace_state(self, resume_key: str | None) -> None:
        """Take the key of a newly saved state, and remove the state before it, to which nothing refers any more."""
        previous_key, self.resume_key = self.resume_key, resume_key
        if previous_key is not None and previous_key != resume_key:
            with suppress(StoreError):  # then the sweep removes it
                self.renderer.store.delete(previous_key)

    def claim_batch(self, claim: Claim) -> list[Claim]:
        """Return the claims of all jobs that are rendered in one pass with this one, beginning with it."""
        batch_key = None
        if claim.lane == "batch" and self.config.max_batch_size > 1:
            batch_key = self.renderer.compute_batch_key(claim.job)
        if batch_key is None and not claim.batch_job_ids:
            return [claim]

        def is_compatible(job: Job) -> bool:
            return self.renderer.compute_batch_key(job) == batch_key

        return retry_while_unavailable(
            lambda: self.jobs.claim_render_batch(
                claim, self.worker_name, self.renderer.model, self.config.max_batch_size, is_compatible
            )
        )

    def run_claim(self, claim: Claim) -> None:
        """Render a job and record its outcome. Raises JobLost."""
        try:
            with self.keep_claims_alive([claim]):
                result = self.render_claim(claim)
            self.mark_done(claim, result)
            self.log_end(claim, "is done")
        except Exception as error:
            self.record_failure(claim, error)

    def run_batch(self, claims: list[Claim]) -> None:
        """Render a batch in one pass and record the outcome of the claimed jobs.

        All of the batch's jobs are rendered, whether they are claimed or not, because the bytes of each clip depend on
        which jobs share the pass.
        """
        claims_by_job = {claim.job.id: claim for claim in claims}
        try:
            with self.keep_claims_alive(claims):
                for job, params, clip in self.render_claims(claims_by_job, claims[0]):
                    result = retry_while_unavailable(partial(self.renderer.store_result, job, params, clip))
                    claim = claims_by_job.pop(job.id)
                    with tolerate_job_lost(claim):
                        self.mark_done(claim, result)
                        self.log_end(claim, "is done")
        except (torch.OutOfMemoryError, MemoryError):
            torch.cuda.empty_cache()
            for claim in list(claims_by_job.values()):  # one clip may still fit in memory
                with tolerate_job_lost(claim):
                    self.run_claim(retry_while_unavailable(partial(self.jobs.detach_from_batch, claim)))
        except Exception as error:
            for claim in list(claims_by_job.values()):
                with tolerate_job_lost(claim):
                    self.record_failure(claim, error)

    def mark_done(self, claim: Claim, result: Artifact) -> None:
        """Store the result of a claim, and how many bytes its files have. Raises JobLost."""
        store = self.renderer.store
        keys = [key for key in (result.key, result.manifest, result.latents, result.preview) if key]
        stored_bytes = retry_while_unavailable(lambda: sum(store.get_size(key) for key in keys))
        retry_while_unavailable(partial(self.jobs.mark_done, claim, result, stored_bytes))

    def record_failure(self, claim: Claim, error: Exception) -> None:
        """Record the outcome of a job whose rendering raised an error. Raises JobLost."""
        try:
            raise error
        except CancellationRequested:
            retry_while_unavailable(lambda: self.jobs.mark_cancelled(claim))
            self.log_end(claim, "is cancelled")
        except StopRequested:
            self.must_keep_state = True
            retry_while_unavailable(lambda: self.jobs.requeue(claim))
            self.log_end(claim, "stops with its worker")
        except JobLost:
            self.must_keep_state = True
            raise
        except ArtifactNotFound as error:
            self.fail_job(claim, "failed", str(error))
        except StoreError:
            log.exception("job %s is queued again: the store or the database stayed unavailable", claim.job.id)
            self.must_keep_state = True
            self.jobs.requeue(claim)
            self.log_end(claim, "is queued again")
        except (torch.OutOfMemoryError, MemoryError) as error:
            text = str(error) if isinstance(error, PartOutOfMemory) else OUT_OF_MEMORY_TEXT
            log.warning("job %s: %s", claim.job.id, text)
            self.fail_job(claim, "out_of_memory", text)
            torch.cuda.empty_cache()
        except OmniVideoError as error:
            code = "invalid_input" if isinstance(error, InvalidInput) else "failed"
            self.fail_job(claim, code, str(error))
        except Exception:
            log.exception("job %s failed", claim.job.id)
            self.fail_job(claim, "internal", INTERNAL_ERROR_TEXT)

    def fail_job(self, claim: Claim, code: str, error: str) -> None:
        retry_while_unavailable(lambda: self.jobs.mark_failed(claim, code, error))
        self.log_end(claim, f"fails ({code})")

    def log_end(self, claim: Claim, outcome: str) -> None:
        """Log how an attempt has ended, and after how many seconds."""
        seconds = time.monotonic() - self.claimed_at
        fields = describe_attempt(claim) | {"outcome": outcome, "seconds": round(seconds, 3)}
        log.info("job %s: attempt %d %s after %.1f s", claim.job.id, claim.attempt, outcome, seconds, extra=fields)

    @contextmanager
    def keep_claims_alive(self, claims: list[Claim]) -> Iterator[None]:
        """Send heartbeats from a thread, because some stages, such as a long VAE pass, report no steps."""
        stop_event = threading.Event()

        def send_heartbeats() -> None:
            while not stop_event.wait(self.config.heartbeat_timeout_seconds / 4):
                try:
                    self.jobs.heartbeat_all(claims)
                except OmniVideoError:
                    continue  # the next step reports the same error

        heartbeat_thread = threading.Thread(target=send_heartbeats, daemon=True, name="heartbeat")
        heartbeat_thread.start()
        try:
            yield
        finally:
            stop_event.set()
            heartbeat_thread.join()

    def render_claim(self, claim: Claim) -> Artifact:
        (job,), state = self.load_resume_point(claim, [claim.job])
        job, params = retry_while_unavailable(lambda: self.renderer.prepare_job(job))
        saved_at, span = time.monotonic(), TRACER.start_span("condition")
        for event in self.renderer.render_job(job, params, state):
            span.end()
            if isinstance(event, GeneratedClip):
                with TRACER.start_as_current_span("store result"):
                    return retry_while_unavailable(partial(self.renderer.store_result, job, params, event))
            span = TRACER.start_span("denoising step", attributes={"step": event.step.step})
            save_due = self.should_save_state(event.step, saved_at)
            self.report_step(claim, job, event, save_due)
            saved_at = time.monotonic() if save_due else saved_at
            if save_due and self.stop_requested.is_set():
                raise StopRequested
        raise AssertionError("rendering ends with a clip")

    def render_claims(
        self, claims_by_job: dict[str, Claim], first_claim: Claim
    ) -> Iterator[tuple[Job, SamplingParams, GeneratedClip]]:
        """Render a batch and yield its claimed jobs with their clips.

        Jobs that are lost or cancelled during rendering are removed from `claims_by_job`.
        """
        jobs_by_id = {
            status.id: status.job
            for status in retry_while_unavailable(lambda: self.jobs.list_statuses(first_claim.batch_job_ids))
        }
        jobs, state = self.load_resume_point(first_claim, [jobs_by_id[job_id] for job_id in first_claim.batch_job_ids])
        prepared_jobs = [retry_while_unavailable(partial(self.renderer.prepare_job, job)) for job in jobs]
        jobs, saved_at = [job for job, _ in prepared_jobs], time.monotonic()
        for event in self.renderer.render_batch(prepared_jobs, state):
            if isinstance(event, list):
                yield from (
                    (*pair, clip)
                    for pair, clip in zip(prepared_jobs, event, strict=True)
                    if pair[0].id in claims_by_job
                )
                return
            save_due = self.should_save_state(event.step, saved_at)
            self.report_batch_step(claims_by_job, jobs, event, save_due)
            saved_at = time.monotonic() if save_due else saved_at
            if not claims_by_job:
                return
            if save_due and self.stop_requested.is_set():
                raise StopRequested

    def report_batch_step(
        self, claims_by_job: dict[str, Claim], jobs: Sequence[Job], progress: DenoisingProgress, save_due: bool
    ) -> None:
        fields = {"resume_key": self.save_state(progress.state, jobs)} if save_due else {}
        wanted_by_job = retry_while_unavailable(
            lambda: self.jobs.heartbeat_all(list(claims_by_job.values()), progress.step, **fields)
        )
        if save_due and wanted_by_job:
            self.replace_state(fields["resume_key"])
        for job_id, claim in list(claims_by_job.items()):
            if not wanted_by_job.get(job_id):
                del claims_by_job[job_id]
                with tolerate_job_lost(claim):
                    self.record_failure(claim, CancellationRequested() if job_id in wanted_by_job else JobLost(job_id))

    def should_save_state(self, step: StepProgress, saved_at: float) -> bool:
        """Return whether to save the state after a step; the last one was saved at `saved_at` (time.monotonic)."""
        return self.stop_requested.is_set() or (
            step.step % self.config.save_every_steps == 0
            and time.monotonic() - saved_at >= self.config.save_every_seconds
        )

    def save_state(self, state: DenoisingState, jobs: Sequence[Job]) -> str:
        """Write the resume point of the jobs of one pass and return its object key."""
        data = pack_resume_point(state, self.renderer.model, jobs)
        return retry_while_unavailable(lambda: self.renderer.store.put(data, "safetensors"))

    def report_step(self, claim: Claim, job: Job, progress: DenoisingProgress, save_due: bool) -> None:
        """Send the heartbeat of a step, with a saved state or a preview if one is due. Raises CancellationRequested."""
        fields: dict[str, str] = {}
        if claim.lane == "interactive" and progress.step.step in {
            round(fraction * job.params.steps) for fraction in PREVIEW_FRACTIONS
        }:
            png = base64.b64decode(self.renderer.render_preview(progress.clean_latents).png)
            fields["preview"] = retry_while_unavailable(lambda: self.renderer.store.put(png, "png"))
        if save_due:
            fields["resume_key"] = self.save_state(progress.state, [job])
        is_wanted = retry_while_unavailable(lambda: self.jobs.heartbeat(claim, progress.step, **fields))
        if save_due:
            self.replace_state(fields["resume_key"])
        if not is_wanted:
            raise CancellationRequested

    def load_resume_point(self, claim: Claim, jobs: Sequence[Job]) -> tuple[Sequence[Job], DenoisingState | None]:
        """Return the jobs of a pass, and the state that an earlier attempt saved, or None to begin at the first step.

        Jobs that are resumed keep the visual tokens that they were begun with.
        """
        store, resume_key = self.renderer.store, claim.resume_key
        if resume_key is None:
            return jobs, None
        try:
            data = retry_while_unavailable(lambda: store.get(resume_key))
        except ArtifactNotFound:  # it was removed
            return jobs, None
        point: ResumePoint | None = unpack_resume_point(data, self.renderer.model, jobs, self.renderer.omni.device)
        if point is None:
            log.warning("job %s: its resume point is of another model or request; it starts again", claim.job.id)
            return jobs, None
        resumed_jobs = [job.model_copy(update={"visual_tokens": reference})
                        for job, reference in zip(jobs, point.visual_tokens, strict=True)]  # fmt: skip
        return resumed_jobs, point.state


def describe_attempt(claim: Claim) -> dict[str, str | int]:
    """Return the fields of an attempt's log lines."""
    job = claim.job
    return {"job": job.id, "attempt": claim.attempt, "lane": claim.lane, "task": job.task, "steps": job.params.steps}


@contextmanager
def tolerate_job_lost(claim: Claim) -> Iterator[None]:
    """Log a JobLost error: another worker has the job now, and nothing remains to be done here."""
    try:
        yield
    except JobLost:
        log.warning("job %s: attempt %d was superseded", claim.job.id, claim.attempt)


class InProcessWorker:
    """A worker in a thread of this process, woken by `notify_workers` or by whoever sets `work_available`."""

    def __init__(self, worker: Worker, work_available: threading.Event | None = None):
        self.worker = worker
        self.work_available = work_available or threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True, name="worker")
        description = describe_worker(worker.worker_name, worker.renderer)
        self.reporter = WorkerReporter(description, WorkerRepository(worker.jobs.engine))

    def notify_workers(self) -> None:
        self.work_available.set()

    def start(self) -> "InProcessWorker":
        self.reporter.start()
        self.thread.start()
        return self

    def request_stop(self) -> None:
        """Stop the thread after the current denoising step, and return at once.

        If the process is killed before, it is no loss.
        """
        self.worker.stop_requested.set()
        self.notify_workers()
        with suppress(OmniVideoError):
            self.worker.jobs.mark_stopping(self.worker.worker_name)

    def stop(self) -> None:
        """Stop the thread after the current denoising step; its job goes back to the queue."""
        self.worker.stop_requested.set()
        self.notify_workers()
        self.thread.join()
        self.reporter.stop()

    def run(self) -> None:
        while not self.worker.stop_requested.is_set():
            self.work_available.clear()
            try:
                ran_job = self.worker.run_next_job()
            except OmniVideoError as error:
                log.warning("%s", error)
                ran_job = False
            if not ran_job and not self.worker.stop_requested.is_set():
                self.work_available.wait(1.0)  # another process may have queued a job in the same database

"""Requeue the jobs of lost workers, and notify the workers again of jobs that stay queued.

API processes do this too, so this module imports neither torch nor Celery.
"""

import logging
import threading
from collections.abc import Callable

from omnivideo.errors import OmniVideoError
from omnivideo.storage.database.jobs import JobRepository

log = logging.getLogger("omnivideo.worker")
RENOTIFY_SECONDS = 5.0  # the time after which workers are notified of a queued job again


class Reaper:
    """Requeues the jobs of lost workers and repeats lost messages, in a thread. Any number may run."""

    def __init__(self, jobs: JobRepository, heartbeat_timeout_seconds: float, notify_workers: Callable[[], None]):
        self.jobs = jobs
        self.heartbeat_timeout_seconds = heartbeat_timeout_seconds
        self.notify_workers = notify_workers
        self.stop_event = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True, name="reaper")

    def start(self) -> "Reaper":
        self.thread.start()
        return self

    def stop(self) -> None:
        self.stop_event.set()
        self.thread.join()

    def run(self) -> None:
        while not self.stop_event.wait(min(1.0, self.heartbeat_timeout_seconds / 4)):
            try:
                self.reap_once()
            except OmniVideoError as error:
                log.warning("%s", error)

    def reap_once(self) -> None:
        for job_id in self.jobs.requeue_lost_jobs(self.heartbeat_timeout_seconds):
            log.warning("job %s: its worker was lost; another worker will render it", job_id)
            self.notify_workers()
        if self.jobs.claim_renotification(RENOTIFY_SECONDS):
            self.notify_workers()

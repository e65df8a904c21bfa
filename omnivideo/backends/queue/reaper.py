"""Requeue the jobs of lost workers, and notify the workers again of jobs that stay queued.

Jobs that their keys may not begin today are ended.

API processes do this too, so this module imports neither torch nor Celery.
"""

import logging
from collections.abc import Callable

from omnivideo.backends.periodic import PeriodicThread
from omnivideo.storage.database.jobs import JobRepository

log = logging.getLogger("omnivideo.worker")
RENOTIFY_SECONDS = 5.0  # the time after which workers are notified of a queued job again


class Reaper(PeriodicThread):
    """Requeues the jobs of lost workers and repeats lost messages, in a thread. Any number may run."""

    def __init__(self, jobs: JobRepository, heartbeat_timeout_seconds: float, notify_workers: Callable[[], None]):
        super().__init__("reaper", min(1.0, heartbeat_timeout_seconds / 4), self.reap_once, log)
        self.jobs = jobs
        self.heartbeat_timeout_seconds = heartbeat_timeout_seconds
        self.notify_workers = notify_workers

    def reap_once(self) -> None:
        for job_id in self.jobs.requeue_lost_jobs(self.heartbeat_timeout_seconds):
            log.warning("job %s: its worker was lost; another worker will render it", job_id)
            self.notify_workers()
        for job_id in self.jobs.fail_exhausted_jobs():
            log.info("job %s: its key has used up its share of the day", job_id)
        if self.jobs.claim_renotification(RENOTIFY_SECONDS):
            self.notify_workers()

"""Notify workers of queued jobs through the broker, and requeue the jobs of lost workers.

A message says only that there is work, so a lost message loses no job. This module does not import torch: API
processes notify and requeue too.
"""

import logging
import threading
from collections.abc import Callable

from celery import Celery
from kombu.exceptions import OperationalError

from omnivideo.errors import OmniVideoError
from omnivideo.storage.database.jobs import JobRepository

log = logging.getLogger("omnivideo.worker")
TASK_NAME = "omnivideo.work"
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


def create_celery_app(broker_url: str) -> Celery:
    """Return a Celery app whose messages only say that there is work; workers find the job in the database."""
    app = Celery("omnivideo", broker=broker_url)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_transport_options={"visibility_timeout": 3600, "socket_timeout": 5, "socket_connect_timeout": 5},
        task_default_queue="omnivideo",
    )
    return app


def create_notifier(app: Celery) -> Callable[[], None]:
    """Return a function that sends a message. If the broker is unavailable, the reaper sends it later."""

    def notify_workers() -> None:
        try:
            app.send_task(TASK_NAME, retry=False)
        except (OperationalError, OSError) as error:
            log.warning("the broker is unavailable: %s", type(error).__name__)

    return notify_workers

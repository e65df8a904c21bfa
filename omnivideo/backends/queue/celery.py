"""Notify workers of queued jobs through the broker, and run workers in Celery's child processes, one for each device.

A message says only that there is work, so a lost message loses no job. This module does not import torch: API
processes notify too.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import Celery, signals
from kombu.exceptions import OperationalError

from omnivideo.backends.queue.reaper import Reaper

if TYPE_CHECKING:
    from omnivideo.backends.decoder.worker import Worker

log = logging.getLogger("omnivideo.worker")
TASK_NAME = "omnivideo.work"
HOPS_HEADER = "omnivideo_hops"  # how many workers have passed a message on
MAX_HOPS = 32


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
    return lambda: send_message(app)


def send_message(app: Celery, hops: int = 0) -> None:
    try:
        app.send_task(TASK_NAME, retry=False, headers={HOPS_HEADER: hops})
    except (OperationalError, OSError) as error:
        log.warning("the broker is unavailable: %s", type(error).__name__)


def pass_message_on(app: Celery, request: Any) -> None:
    """Send a message to the next idle worker: the queued jobs may need other weights than this worker's.

    Brokers serve waiting workers in turn, so a message reaches each of them. A message that has passed MAX_HOPS workers
    ends here; the reaper sends a new one after a few seconds.
    """
    hops = int((request.headers or {}).get(HOPS_HEADER, 0))
    if hops < MAX_HOPS:
        send_message(app, hops + 1)


def serve_celery_worker(
    broker_url: str, build_worker: Callable[[], tuple["Worker", float]], concurrency: int = 1
) -> None:
    """Run a Celery worker until it is stopped.

    `build_worker` runs in each child process, so that the parent loads no model and does not initialize CUDA. It
    returns the worker and the heartbeat timeout in seconds.
    """
    app, sending_app = create_celery_app(broker_url), create_celery_app(broker_url)
    notify_workers = create_notifier(sending_app)
    child_workers: list[Worker] = []  # of this child

    @signals.setup_logging.connect(weak=False)  # type: ignore[untyped-decorator]
    def leave_logging_alone(**_: Any) -> None:
        """Keep Celery from adding handlers, beside which `build_worker` could not configure the logging."""

    @signals.worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]
    def start_child_worker(**_: Any) -> None:
        worker, heartbeat_timeout_seconds = build_worker()
        child_workers.append(worker)
        Reaper(worker.jobs, heartbeat_timeout_seconds, notify_workers).start()

    @app.task(name=TASK_NAME, bind=True)  # type: ignore[untyped-decorator]
    def run_task(task: Any) -> None:
        ran_job = child_workers[0].run_next_job()
        if not child_workers[0].jobs.count_queued():
            return
        if ran_job:
            notify_workers()  # one message is enough to process all queued jobs
        else:
            pass_message_on(sending_app, task.request)

    app.worker_main(["worker", "--pool=prefork", f"--concurrency={concurrency}", "--loglevel=WARNING",
                     "--without-gossip", "--without-mingle", "-Ofair"])  # fmt: skip

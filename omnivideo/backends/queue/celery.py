"""Run workers in a thread of this process, or in Celery's child processes, one for each device."""

import logging
import threading
from collections.abc import Callable
from typing import Any

from celery import signals

from omnivideo.backends.decoder.worker import Worker
from omnivideo.backends.queue.reaper import TASK_NAME, Reaper, create_celery_app, create_notifier
from omnivideo.errors import OmniVideoError

log = logging.getLogger("omnivideo.worker")


class InProcessWorker:
    """A worker in a thread of this process, woken by `notify_workers`."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.work_available = threading.Event()
        self.stop_requested = False
        self.thread = threading.Thread(target=self.run, daemon=True, name="worker")

    def notify_workers(self) -> None:
        self.work_available.set()

    def start(self) -> "InProcessWorker":
        self.thread.start()
        return self

    def stop(self) -> None:
        """Stop the thread after its current job."""
        self.stop_requested = True
        self.notify_workers()
        self.thread.join()

    def run(self) -> None:
        while not self.stop_requested:
            self.work_available.clear()
            try:
                ran_job = self.worker.run_next_job()
            except OmniVideoError as error:
                log.warning("%s", error)
                ran_job = False
            if not ran_job and not self.stop_requested:
                self.work_available.wait(1.0)  # another process may have queued a job in the same database


def serve_celery_worker(
    broker_url: str, build_worker: Callable[[], tuple[Worker, float]], concurrency: int = 1
) -> None:
    """Run a Celery worker until it is stopped.

    `build_worker` runs in each child process, so that the parent loads no model and does not initialize CUDA. It
    returns the worker and the heartbeat timeout in seconds.
    """
    app, notify_workers = create_celery_app(broker_url), create_notifier(create_celery_app(broker_url))
    child_workers: list[Worker] = []  # of this child

    @signals.worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]
    def start_child_worker(**_: Any) -> None:
        worker, heartbeat_timeout_seconds = build_worker()
        child_workers.append(worker)
        Reaper(worker.jobs, heartbeat_timeout_seconds, notify_workers).start()

    @app.task(name=TASK_NAME)  # type: ignore[untyped-decorator]
    def run_task() -> None:
        if child_workers[0].run_next_job() and child_workers[0].jobs.count_queued():
            notify_workers()  # one message is enough to work off the whole queue

    app.worker_main(["worker", "--pool=prefork", f"--concurrency={concurrency}", "--loglevel=WARNING",
                     "--without-gossip", "--without-mingle", "-Ofair"])  # fmt: skip

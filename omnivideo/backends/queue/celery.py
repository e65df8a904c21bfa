"""Run workers in Celery's child processes, one for each device."""

from collections.abc import Callable
from typing import Any

from celery import signals

from omnivideo.backends.decoder.worker import Worker
from omnivideo.backends.queue.reaper import TASK_NAME, Reaper, create_celery_app, create_notifier


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
            notify_workers()  # one message is enough to process all queued jobs

    app.worker_main(["worker", "--pool=prefork", f"--concurrency={concurrency}", "--loglevel=WARNING",
                     "--without-gossip", "--without-mingle", "-Ofair"])  # fmt: skip

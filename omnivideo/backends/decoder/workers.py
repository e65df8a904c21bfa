"""Where workers run: in a thread of this process, or in Celery's children, one for each device."""

import logging
import threading
from collections.abc import Callable
from typing import Any

from celery import Celery, signals
from kombu.exceptions import OperationalError

from omnivideo.backends.decoder.worker import Worker
from omnivideo.errors import OmniVideoError
from omnivideo.storage.jobs import Jobs

log = logging.getLogger("omnivideo.worker")
TASK = "omnivideo.work"
UNTOLD = 5.0  # seconds after which a waiting job is told of again: the message may have been lost


class Reaper:
    """Looks after jobs whose workers fell silent, and after messages that were lost.  Any number may run."""

    def __init__(self, jobs: Jobs, silent: float, tell: Callable[[], None]):
        self.jobs = jobs
        self.silent = silent
        self.tell = tell
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True, name="reaper")

    def start(self) -> "Reaper":
        self.thread.start()
        return self

    def stop(self) -> None:
        self.over.set()
        self.thread.join()

    def run(self) -> None:
        while not self.over.wait(min(1.0, self.silent / 4)):
            try:
                self.look()
            except OmniVideoError as error:
                log.warning("%s", error)

    def look(self) -> None:
        for job_id in self.jobs.reap(self.silent):
            log.warning("job %s: its worker fell silent; it goes to another one", job_id)
            self.tell()
        if self.jobs.untold(UNTOLD):
            self.tell()


class LocalWorkers:
    """A worker in a thread of this process, woken by `tell`."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.told = threading.Event()
        self.over = False
        self.thread = threading.Thread(target=self.run, daemon=True, name="worker")

    def tell(self) -> None:
        self.told.set()

    def start(self) -> "LocalWorkers":
        self.thread.start()
        return self

    def stop(self) -> None:
        """After the job that it has."""
        self.over = True
        self.tell()
        self.thread.join()

    def run(self) -> None:
        while not self.over:
            self.told.clear()
            try:
                worked = self.worker.work()
            except OmniVideoError as error:
                log.warning("%s", error)
                worked = False
            if not worked and not self.over:
                self.told.wait(1.0)  # another process may have put work into the same database


def celery_app(broker: str) -> Celery:
    """A message says only that there is work; which, the worker reads in the database."""
    app = Celery("omnivideo", broker=broker)
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


def teller(app: Celery) -> Callable[[], None]:
    """Sends a message; where the broker is away, the reaper will."""

    def tell() -> None:
        try:
            app.send_task(TASK, retry=False)
        except (OperationalError, OSError) as error:
            log.warning("the broker does not take messages now: %s", type(error).__name__)

    return tell


def serve(broker: str, make: Callable[[], tuple[Worker, float]], concurrency: int = 1) -> None:
    """Runs a Celery worker until it is told to end.  `make` builds what draws, in each child: no model and no CUDA
    in the parent."""
    app, tell = celery_app(broker), teller(celery_app(broker))
    mine: list[Worker] = []  # of this child

    @signals.worker_process_init.connect(weak=False)
    def begin(**_: Any) -> None:
        worker, silent = make()
        mine.append(worker)
        Reaper(worker.jobs, silent, tell).start()

    @app.task(name=TASK)
    def work() -> None:
        if mine[0].work() and mine[0].jobs.waiting():
            tell()  # while there is work no worker needs a message of its own to find it

    app.worker_main(["worker", "--pool=prefork", f"--concurrency={concurrency}", "--loglevel=WARNING",
                     "--without-gossip", "--without-mingle", "-Ofair"])  # fmt: skip

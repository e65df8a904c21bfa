"""Where workers run: in a thread of this process, or in Celery's children, one for each device."""

import logging
import threading
from collections.abc import Callable
from typing import Any

from celery import signals

from omnivideo.backends.broker import TASK, Reaper, celery_app, teller
from omnivideo.backends.decoder.worker import Worker
from omnivideo.errors import OmniVideoError

log = logging.getLogger("omnivideo.worker")


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

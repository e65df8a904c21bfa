"""Report to the database that a worker runs, with which weights, and where each part of its model computes."""

import logging
import threading
from collections.abc import Callable

from omnivideo.backends.decoder.renderer import Renderer
from omnivideo.errors import OmniVideoError
from omnivideo.records import PartRecord, WorkerRecord
from omnivideo.storage.database.workers import WorkerRepository

log = logging.getLogger("omnivideo.worker")
REPORT_SECONDS = 10.0


def describe_worker(name: str, renderer: Renderer) -> WorkerRecord:
    """Return what a worker reports of itself; a model that was not loaded from a folder has no placement."""
    placement = renderer.omni.placement
    parts = tuple(
        PartRecord(
            name=part.size.name,
            location=part.location,
            dtype=part.size.dtype,
            compute_dtype=part.compute_dtype,
            size_bytes=part.size.weights_bytes,
        )
        for part in (placement.parts if placement else ())
    )
    return WorkerRecord(
        name=name, placement=placement.mode if placement else "unknown", parts=parts, **renderer.model.model_dump()
    )


class WorkerReporter:
    """Reports a worker every REPORT_SECONDS, in a thread, until it is stopped."""

    def __init__(self, worker: WorkerRecord, workers: WorkerRepository):
        self.worker, self.workers = worker, workers
        self.stop_event = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True, name="worker-report")

    def start(self) -> "WorkerReporter":
        self.thread.start()
        return self

    def stop(self) -> None:
        self.stop_event.set()
        self.thread.join()

    def run(self) -> None:
        self.try_to(lambda: self.workers.report_worker(self.worker))
        while not self.stop_event.wait(REPORT_SECONDS):
            self.try_to(lambda: self.workers.report_worker(self.worker))
        self.try_to(lambda: self.workers.remove_worker(self.worker.name))

    def try_to(self, write: Callable[[], None]) -> None:
        """Write to the database, or log why that is not possible now."""
        try:
            write()
        except OmniVideoError as error:
            log.warning("%s", error)

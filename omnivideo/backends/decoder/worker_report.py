"""Report to the database that a worker runs, with which weights, and where each part of its model computes."""

import logging

from omnivideo.backends.decoder.renderer import Renderer
from omnivideo.backends.periodic import PeriodicThread
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


class WorkerReporter(PeriodicThread):
    """Reports a worker at once and every REPORT_SECONDS, in a thread, until it is stopped."""

    def __init__(self, worker: WorkerRecord, workers: WorkerRepository):
        super().__init__("worker-report", REPORT_SECONDS, self.report, log)
        self.worker, self.workers = worker, workers

    def run(self) -> None:
        self.call(self.report)
        super().run()
        self.call(lambda: self.workers.remove_worker(self.worker.name))

    def report(self) -> None:
        self.workers.report_worker(self.worker)

"""The workers that run now, with the weights that they have loaded and where each part computes."""

from sqlalchemy import delete, select

from omnivideo.records import WorkerRecord
from omnivideo.storage.database.repository import Repository, record_from_row, unix_now
from omnivideo.storage.database.schema import workers

KEPT_SECONDS = 3600.0  # how long a worker that was killed stays in the table


class WorkerRepository(Repository):
    """Each worker writes its own row, again and again while it runs."""

    def report_worker(self, worker: WorkerRecord) -> None:
        """Record that a worker runs now, and forget those that have not reported for KEPT_SECONDS."""
        values = worker.model_dump() | {"seen_at": unix_now()}
        insertion = self.insert_into(workers).values(values)
        self.fetch_all(insertion.on_conflict_do_update(index_elements=["name"], set_=values))
        self.fetch_all(delete(workers).where(workers.c.seen_at < unix_now() - KEPT_SECONDS))

    def remove_worker(self, name: str) -> None:
        self.fetch_all(delete(workers).where(workers.c.name == name))

    def list_workers(self, max_age_seconds: float) -> list[WorkerRecord]:
        """Return the workers that have reported within the last `max_age_seconds`, by name."""
        query = select(workers).where(workers.c.seen_at > unix_now() - max_age_seconds).order_by(workers.c.name)
        return [record_from_row(WorkerRecord, row) for row in self.fetch_all(query)]

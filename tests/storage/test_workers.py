"""The workers that run now, as they report themselves to the database."""

from sqlalchemy import Engine, update

from omnivideo.api.stores import WorkerStore
from omnivideo.records import PartRecord, WorkerRecord
from omnivideo.storage.database.schema import workers
from omnivideo.storage.database.workers import KEPT_SECONDS, WorkerRepository

DECODER = PartRecord(
    name="decoder", location="gpu-in-blocks", dtype="bfloat16", compute_dtype="bfloat16", size_bytes=28_600_000_000
)
WORKER = WorkerRecord(
    name="host:1", preset="omnivideo2-a14b", weights="a" * 64, precision="preset",
    placement="decoder in blocks on the GPU", parts=(DECODER,),
)  # fmt: skip


def age(database: Engine, name: str, seconds: float) -> None:
    """Let a worker have reported itself earlier."""
    row = update(workers).where(workers.c.name == name)
    with database.begin() as connection:
        connection.execute(row.values(seen_at=workers.c.seen_at - seconds))


def test_a_worker_is_listed_as_long_as_it_reports(empty_database: Engine) -> None:
    repository = WorkerRepository(empty_database)
    other = WORKER.model_copy(update={"name": "host:2", "parts": ()})
    repository.report_worker(other)
    repository.report_worker(WORKER)
    store: WorkerStore = repository
    assert store.list_workers(30) == [WORKER, other]
    age(empty_database, "host:2", 31)
    assert store.list_workers(30) == [WORKER]
    moved = WORKER.model_copy(update={"placement": "CPU"})
    repository.report_worker(moved)
    assert store.list_workers(30) == [moved]
    repository.remove_worker("host:1")
    assert store.list_workers(30) == [] and store.list_workers(60) == [other]


def test_a_worker_that_was_killed_is_forgotten(empty_database: Engine) -> None:
    repository = WorkerRepository(empty_database)
    repository.report_worker(WORKER)
    age(empty_database, WORKER.name, KEPT_SECONDS + 1)
    assert repository.list_workers(2 * KEPT_SECONDS) == [WORKER]
    repository.report_worker(WORKER.model_copy(update={"name": "host:2"}))
    assert [worker.name for worker in repository.list_workers(2 * KEPT_SECONDS)] == ["host:2"]

"""Celery workers as processes of their own over a real broker: Redis with PostgreSQL, RabbitMQ with SQLite."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from kombu import Connection

from omnivideo.backends.queue.celery import create_celery_app, create_notifier
from omnivideo.backends.queue.durable import DurableQueue
from omnivideo.backends.queue.reaper import Reaper
from omnivideo.contracts import Artifact, Job, resolve_sampling_params
from omnivideo.errors import JobCancelled
from omnivideo.presets import TINY
from omnivideo.storage.database.engine import create_database_engine, upgrade_schema
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.objects.local import LocalObjectStore
from tests.support.servers import postgres, rabbitmq, redis

SILENT = 2.0


class Plant:
    """A broker, a database, a store, and as many workers as a test starts."""

    def __init__(self, home: Path, broker: str, database: str, weights: Path):
        self.home, self.broker = home, broker
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[3]),
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
            "OMNIVIDEO_HOME": str(home), "OMNIVIDEO_BROKER": broker, "OMNIVIDEO_DATABASE": database,
            "OMNIVIDEO_WEIGHTS": str(weights), "OMNIVIDEO_HEARTBEAT_TIMEOUT": str(SILENT),
            "OMNIVIDEO_SAVE_STATE_EVERY_STEPS": "2",
            "OMNIVIDEO_SAVE_STATE_EVERY_SECONDS": "0",
        }  # fmt: skip
        self.store = LocalObjectStore(home / "store")
        engine = create_database_engine(database or f"sqlite:///{home}/service.sqlite")
        upgrade_schema(engine)
        self.jobs = JobRepository(engine)
        self.tell = create_notifier(create_celery_app(broker))
        self.queue = DurableQueue(self.jobs, self.store, self.tell)

    @contextmanager
    def worker(self) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "omnivideo.cli", "worker", "--device", "cpu"]
        with (self.home / f"worker-{time.monotonic_ns()}.log").open("wb") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def until(self, name: str, *, step: int = 0, ended: bool = False) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            status = self.jobs.get_status(name)
            if status.state in ("done", "failed", "cancelled") or (status.step >= step and not ended):
                return
            time.sleep(0.01)
        logs = "".join(path.read_text()[-2000:] for path in self.home.glob("worker-*.log"))
        raise AssertionError(f"{name} is {status.state} at step {status.step}\n{logs}")


@pytest.fixture(scope="module", params=["redis", "rabbitmq"])
def plant(request, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    broker = {"redis": redis, "rabbitmq": rabbitmq}[request.param](folder / "broker")
    database = postgres(folder / "database") if request.param == "redis" else nullcontext("")
    with broker as broker_address, database as database_address:
        with Connection(broker_address) as connection:
            connection.ensure_connection(max_retries=50, interval_start=0.2, interval_max=0.5)
        plant = Plant(folder, broker_address, database_address, weights)
        yield plant
        plant.jobs.engine.dispose()


def test_notifying_workers_loads_no_model_library() -> None:
    code = "import sys; import omnivideo.backends.queue.celery; print('torch' in sys.modules)"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "False"


def job(name: str, steps: int = 4) -> Job:
    params = resolve_sampling_params(TINY, "text-to-video", seed=5, steps=steps)
    return Job(id=name, prompt="a red ball", visual_tokens=None, source=None, params=params)


def child_of(worker: subprocess.Popen[bytes]) -> int:
    """The process that draws: the worker's own child."""
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    return int(children[-1])


def test_workers_draw_are_killed_and_lose_nothing(plant):
    with plant.worker() as worker:
        made = list(plant.queue.run(job("first")))[-1]
        assert isinstance(made, Artifact) and plant.store.has(made.key)
        whole = list(plant.queue.run(job("whole", 150)))[-1]

        # The child is killed: its own parent starts another, which goes on from the last point.
        plant.jobs.submit(job("cut", 150))
        plant.tell()
        plant.until("cut", step=20)
        os.kill(child_of(worker), signal.SIGKILL)
        plant.until("cut", ended=True)
        status = plant.jobs.get_status("cut")
        assert (status.state, status.attempt) == ("done", 2)
        assert (status.result.key, status.result.latents) == (whole.key, whole.latents)

        running = plant.queue.run(job("unwanted", 200))
        next(running)
        plant.queue.cancel("unwanted")
        with pytest.raises(JobCancelled):
            list(running)

        # All of the worker is killed; nobody is left to notice but the service's own reaper.
        plant.jobs.submit(job("left", 150))
        plant.tell()
        plant.until("left", step=20)
        os.killpg(worker.pid, signal.SIGKILL)
    reaper = Reaper(plant.jobs, SILENT, plant.tell).start()
    try:
        with plant.worker():
            plant.until("left", ended=True)
    finally:
        reaper.stop()
    status = plant.jobs.get_status("left")
    assert (status.state, status.result.key) == ("done", whole.key)
    assert plant.jobs.count_queued() == 0


class Opens:
    """Would make a file, were it ever unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_attack_a_pickled_message_is_never_opened(plant, tmp_path):
    made = tmp_path / "opened"
    with Connection(plant.broker) as connection:
        producer = connection.Producer(serializer="pickle")
        producer.publish(
            [(Opens(made),), {}, {}], routing_key="omnivideo", headers={"task": "omnivideo.work", "id": "x"}
        )
    with plant.worker():
        assert isinstance(list(plant.queue.run(job("after")))[-1], Artifact)
    assert not made.exists()


def test_a_worker_that_is_told_to_end_finishes_its_job(plant):
    with plant.worker() as worker:
        plant.jobs.submit(job("last", 100))
        plant.tell()
        plant.until("last", step=5)
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)
    status = plant.jobs.get_status("last")
    assert (status.state, status.attempt) == ("done", 1)


def test_a_broker_that_is_away_loses_no_job(tmp_path, weights):
    """The job is in the database; the message comes when the broker does."""
    with redis(tmp_path / "broker") as address:
        port = int(address.rpartition(":")[2].partition("/")[0])
    plant = Plant(tmp_path, address, "", weights)
    plant.jobs.submit(job("early"))
    plant.tell()
    assert plant.jobs.get_status("early").state == "queued"
    with plant.jobs.engine.connect() as connection:
        connection.exec_driver_sql("UPDATE jobs SET notified_at = notified_at - 60")
    with redis(tmp_path / "broker", port), plant.worker():
        reaper = Reaper(plant.jobs, SILENT, plant.tell).start()
        try:
            plant.until("early", ended=True)
        finally:
            reaper.stop()
    assert plant.jobs.get_status("early").state == "done"

"""A broker, a database and a store, with Celery workers in separate processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omnivideo.backends.queue.celery import build_queue_name, create_celery_app, create_notifier
from omnivideo.backends.queue.durable import DurableQueue
from omnivideo.storage.database.engine import create_database_engine, identify_database, upgrade_schema
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.objects.local import LocalObjectStore

HEARTBEAT_TIMEOUT = 2.0


class Deployment:
    """A broker, a database, a store, and the workers that a test starts."""

    def __init__(self, home: Path, broker: str, database: str, weights: Path):
        self.home, self.broker = home, broker
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
            "OMNIVIDEO_HOME": str(home), "OMNIVIDEO_BROKER": broker, "OMNIVIDEO_DATABASE": database,
            "OMNIVIDEO_WEIGHTS": str(weights), "OMNIVIDEO_HEARTBEAT_TIMEOUT": str(HEARTBEAT_TIMEOUT),
            "OMNIVIDEO_SAVE_STATE_EVERY_STEPS": "2",
            "OMNIVIDEO_SAVE_STATE_EVERY_SECONDS": "0",
        }  # fmt: skip
        self.store = LocalObjectStore(home / "store")
        engine = create_database_engine(database or f"sqlite:///{home}/service.sqlite")
        upgrade_schema(engine)
        self.jobs = JobRepository(engine)
        self.queue_name = build_queue_name(identify_database(engine))
        self.notify_workers = create_notifier(create_celery_app(broker, self.queue_name))
        self.queue = DurableQueue(self.jobs, self.store, self)

    @contextmanager
    def run_worker(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, *(arguments or ("-m", "omnivideo.cli", "worker", "--device", "cpu"))]
        with (self.home / f"worker-{time.monotonic_ns()}.log").open("wb") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait_for(self, name: str, *, step: int = 0, ended: bool = False, timeout_seconds: float = 90) -> None:
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            status = self.jobs.get_status(name)
            if status.state in ("done", "failed", "cancelled") or (status.step >= step and not ended):
                return
            time.sleep(0.01)
        logs = "".join(path.read_text()[-2000:] for path in self.home.glob("worker-*.log"))
        raise AssertionError(f"{name} is {status.state} at step {status.step}\n{logs}")

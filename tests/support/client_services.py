"""The two services that clients are put before: one process, and the processes of the deployed system."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from sqlalchemy import Engine

from omnivideo.storage.database.engine import create_database_engine
from omnivideo.storage.database.jobs import JobRepository
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, s3_server
from tests.support.servers import free_port, postgres, redis, wait_for

KEY = "a-key-for-the-clients"
MLLM_SECONDS = 120  # until the model is loaded on a busy machine


@dataclass(frozen=True)
class RunningService:
    """A service with the shipped weights: its address, a connection with the admin's key, and its database."""

    name: str
    address: str
    http: httpx.Client
    engine: Engine

    def count_jobs(self) -> int:
        """Return how many pictures and clips have been generated or queued so far."""
        return sum(count for _, _, count in JobRepository(self.engine).count_by_lane_and_state())

    def find_source(self, link: str) -> str | None:
        """Return the key of the artifact that the artifact behind a link of an answer was edited from."""
        thread = link.partition("/v1/threads/")[2].partition("/artifacts/")[0]
        answer = self.http.get(f"/v1/threads/{thread}")
        assert answer.status_code == 200, answer.text
        return next(item["source"] for item in answer.json()["artifacts"] if item["key"] == read_key(link))


def read_key(link: str) -> str:
    """Return the artifact's key in a link, without the signature and the preview's name."""
    return link.partition("/artifacts/")[2].partition("?")[0].partition("/")[0]


@contextmanager
def run_process(environment: dict[str, str], log: Path, *arguments: str, port: int = 0) -> Iterator[None]:
    """Run one of our commands as a process of its own, and wait until it listens on the port."""
    command = [sys.executable, "-m", "omnivideo.cli", *arguments]
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=log.parent)
    try:
        if port:
            wait_for(port, process, MLLM_SECONDS)
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def build_environment(folder: Path, address: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "OMNIVIDEO_HOME": str(folder / "home"),
        "OMNIVIDEO_ADMIN_KEY": KEY, "OMNIVIDEO_PUBLIC_URL": address, "OMNIVIDEO_CORS_ORIGINS": "*",
        "OMNIVIDEO_WEBHOOK_HOSTS": "127.0.0.1,localhost",
    }  # fmt: skip


@contextmanager
def connect(name: str, address: str, database: str) -> Iterator[RunningService]:
    headers = {"Authorization": f"Bearer {KEY}"}
    engine = create_database_engine(database)
    with httpx.Client(base_url=address, headers=headers, timeout=60, trust_env=False) as http:
        yield RunningService(name, address, http, engine)
    engine.dispose()


@contextmanager
def run_embedded_service(folder: Path) -> Iterator[RunningService]:
    """Run what `make serve` runs: one process with SQLite, a folder, the language model and a worker."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = build_environment(folder, address)
    serve = ("serve", "--port", str(port), "--device", "cpu")
    with (
        run_process(environment, folder / "api.log", *serve, port=port),
        connect("embedded", address, f"sqlite:///{folder}/home/service.sqlite") as service,
    ):
        yield service


@contextmanager
def run_deployed_service(folder: Path) -> Iterator[RunningService]:
    """Run what deploy/compose.yaml runs: API, worker and language model server, with PostgreSQL, Redis and S3."""
    port, mllm_port = free_port(), free_port()
    address = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        database = stack.enter_context(postgres(folder / "postgres"))
        broker = stack.enter_context(redis(folder / "redis"))
        store = stack.enter_context(s3_server(folder / "s3"))
        environment = build_environment(folder, address) | {
            "OMNIVIDEO_DATABASE": database, "OMNIVIDEO_BROKER": broker, "OMNIVIDEO_S3": store.address,
            "OMNIVIDEO_S3_ACCESS_KEY": ACCESS_KEY, "OMNIVIDEO_S3_SECRET_KEY": SECRET_KEY,
            "OMNIVIDEO_MLLM": f"http://127.0.0.1:{mllm_port}",
        }  # fmt: skip
        subprocess.run([sys.executable, "-m", "omnivideo.cli", "migrate"], env=environment, check=True, timeout=120)
        serve_mllm = ("mllm", "serve", "--engine", "transformers", "--device", "cpu", "--port", str(mllm_port))
        stack.enter_context(run_process(environment, folder / "mllm.log", *serve_mllm, port=mllm_port))
        stack.enter_context(run_process(environment, folder / "worker.log", "worker", "--device", "cpu"))
        serve = ("serve", "--port", str(port), "--device", "cpu")
        stack.enter_context(run_process(environment, folder / "api.log", *serve, port=port))
        yield stack.enter_context(connect("deployed", address, database))


SERVICES = {"embedded": run_embedded_service, "deployed": run_deployed_service}

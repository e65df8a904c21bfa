"""The whole service on this machine for benchmarks: each process and server can be killed and started again."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx

from omnivideo.backends.queue.celery import create_celery_app
from omnivideo.settings import load_settings
from omnivideo.wiring import ServiceWiring
from tests.support.s3_faults import FaultyS3Proxy, Mode
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, S3Server
from tests.support.servers import Postgres, RabbitMQ, Redis, free_port

KEY = "a-key-for-the-faults"
START_SECONDS = 180.0  # a busy machine may need a minute


class OmnivideoProcess:
    """A process of ours that can be started and killed like the servers."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, ready: str = "", max_files: int = 0):
        self.command, self.environment, self.log, self.ready = command, environment, log, ready
        self.prefix = ["prlimit", f"--nofile={max_files}:{max_files}"] if max_files else []

    def start(self) -> None:
        command = [*self.prefix, sys.executable, "-m", "omnivideo.cli", *self.command]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while self.ready:
            with suppress(httpx.HTTPError):
                if httpx.get(self.ready, trust_env=False, timeout=5).status_code == 200:
                    return
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"{self.command[0]} did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill_child(self) -> None:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)


class ServiceCluster:
    """The whole service, running in a folder.

    With `frequent_saves` workers save resume points as often as short jobs need them. `max_files` limits the open files
    of the API. `broker` is redis or rabbitmq. With `has_s3_proxy` the S3 server is behind a proxy, which can change its
    answers.
    """

    def __init__(
        self, folder: Path, weights: str, stack: ExitStack, workers: int = 2, frequent_saves: bool = True,
        max_files: int = 0, extra_settings: dict[str, str] | None = None,
        broker: str = "redis", has_s3_proxy: bool = False,
    ):  # fmt: skip
        self.broker = {"redis": Redis, "rabbitmq": RabbitMQ}[broker](folder / broker)
        self.postgres, self.s3 = Postgres(folder / "pg"), S3Server(folder / "s3")
        for server in (self.broker, self.postgres, self.s3):
            server.start()
            stack.callback(server.kill)
        self.s3_proxy = FaultyS3Proxy(self.s3.port)
        stack.callback(self.s3_proxy.close)
        port, mllm_port = free_port(), free_port()
        settings = {
            "DATABASE": self.postgres.address, "BROKER": self.broker.address,
            "S3": self.s3_proxy.address if has_s3_proxy else self.s3.address,
            "S3_ACCESS_KEY": ACCESS_KEY, "S3_SECRET_KEY": SECRET_KEY, "MLLM": f"http://127.0.0.1:{mllm_port}",
            "WEIGHTS": weights, "HOME": str(folder), "HEARTBEAT_TIMEOUT": "3",
            "ADMIN_KEY": KEY, "ARTIFACT_LIFETIME_SECONDS": "60",
        }  # fmt: skip
        settings |= {"SAVE_STATE_EVERY_STEPS": "8", "SAVE_STATE_EVERY_SECONDS": "0"} if frequent_saves else {}
        settings |= extra_settings or {}
        self.environment = os.environ | {f"OMNIVIDEO_{name}": value for name, value in settings.items() if value}
        self.environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self.address = f"http://127.0.0.1:{port}"
        self.api = OmnivideoProcess(
            ["serve", "--port", str(port)], self.environment, folder / "api.log", f"{self.address}/ready", max_files
        )
        self.mllm = OmnivideoProcess(
            ["mllm", "serve", "--port", str(mllm_port), "--device", "cpu", "--engine", "transformers"],
            self.environment, folder / "mllm.log", f"http://127.0.0.1:{mllm_port}/health",
        )  # fmt: skip
        command = ["worker", "--device", "cpu"]
        self.workers = [
            OmnivideoProcess(command, self.environment, folder / f"worker{index}.log") for index in range(workers)
        ]
        overrides = {name.lower(): value for name, value in settings.items() if value}
        self.wiring = ServiceWiring(load_settings(**overrides))
        self.wiring.migrate_database()
        for program in (self.mllm, self.api, *self.workers):
            program.start()
            stack.callback(program.kill)
        stack.callback(self.wiring.close)
        self.http = httpx.Client(
            base_url=self.address, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False, timeout=30
        )
        stack.callback(self.http.close)

    def submit(self, seed: int, steps: int = 60) -> str:
        """Submit a job and return its id; retry while the API is down, with a key that makes it one job."""
        body = {"prompt": f"a red ball {seed}", "seed": seed, "num_inference_steps": steps}
        headers = {"Idempotency-Key": f"{time.monotonic_ns()}"}
        while True:
            with suppress(httpx.HTTPError):
                response = self.http.post("/v1/videos", json=body, headers=headers)
                if response.status_code == 200:
                    return str(response.json()["id"])
            time.sleep(0.2)

    def kill_target(self, target: str) -> None:
        """Kill a process or server and start it again; a worker restarts its child by itself."""
        match target:
            case "worker child":
                self.workers[0].kill_child()
            case "worker":
                self.workers[0].kill()
                self.workers[0].start()
            case "api":
                self.api.kill()
                self.api.start()
            case _:
                servers: dict[str, Redis | RabbitMQ | Postgres | S3Server] = {
                    "broker": self.broker, "postgresql": self.postgres, "s3": self.s3,
                }  # fmt: skip
                server = servers[target]
                server.kill()
                time.sleep(1.0)
                server.start()

    def disturb_store(self, mode: Mode, seconds: float) -> int:
        """Let the S3 server's answers be wrong for some time; return the number of faults."""
        before, self.s3_proxy.mode = self.s3_proxy.num_faults, mode
        time.sleep(seconds)
        self.s3_proxy.mode = ""
        return self.s3_proxy.num_faults - before

    def wait_for_jobs(self, ids: list[str], seconds: float = 240) -> dict[str, tuple[str, str, int]]:
        """Wait until no job is open, or for some seconds; return the state, artifact and attempts of each."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(Exception):
                statuses = self.wiring.jobs.list_statuses(ids)
                if all(status.state not in ("queued", "running") for status in statuses):
                    return {status.id: (status.state, status.result.key if status.result else "", status.attempt)
                            for status in statuses}  # fmt: skip
            time.sleep(0.1)
        return {status.id: (status.state, "", status.attempt) for status in self.wiring.jobs.list_statuses(ids)}

    def count_queue_messages(self) -> int:
        """Return the number of messages in the queue after the workers have become idle."""
        time.sleep(0.5)
        with create_celery_app(self.broker.address, self.wiring.queue_name).connection_for_read() as connection:
            return int(connection.default_channel.queue_declare(self.wiring.queue_name, passive=True).message_count)

    def count_orphans(self) -> int:
        """Sweep the object store and return the number of objects that nothing refers to."""
        referenced = self.wiring.jobs.collect_referenced_keys(86_400)
        self.wiring.store.sweep(referenced, 0.0)
        return len(set(self.wiring.store.iter_keys()) - referenced)

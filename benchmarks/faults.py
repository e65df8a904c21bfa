"""The fault matrix: kill one process after another and check that every job still ends once, with the same bytes.

python -m benchmarks.faults [--runs 20] [--only redis,worker] [--weights FOLDER]

It runs Redis, PostgreSQL, an S3 server (rclone), two Celery workers and the API as separate processes. In each run ten
clips are in flight when one of these processes is killed with SIGKILL at a random time and then restarted.
"""

import argparse
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from omnivideo.backends.queue.celery import create_celery_app
from omnivideo.settings import load_settings
from omnivideo.wiring import ServiceWiring
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, S3Server
from tests.support.servers import Postgres, Redis, free_port

JOBS, STEPS = 10, 60
KEY = "a-key-for-the-faults"
TARGETS = ("worker child", "worker", "api", "redis", "postgresql", "s3")


class OmnivideoProcess:
    """A process of ours that can be started and killed like the servers."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, ready: str = ""):
        self.command, self.environment, self.log, self.ready = command, environment, log, ready

    def start(self) -> None:
        command = [sys.executable, "-m", "omnivideo.cli", *self.command]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while self.ready and time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                if httpx.get(self.ready, trust_env=False, timeout=5).status_code == 200:
                    return
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

    With `frequent_saves` workers save resume points as often as short jobs need them.
    """

    def __init__(self, folder: Path, weights: str, stack: ExitStack, workers: int = 2, frequent_saves: bool = True):
        self.redis, self.postgres, self.s3 = Redis(folder / "redis"), Postgres(folder / "pg"), S3Server(folder / "s3")
        for server in (self.redis, self.postgres, self.s3):
            server.start()
            stack.callback(server.kill)
        port = free_port()
        settings = {
            "DATABASE": self.postgres.address, "BROKER": self.redis.address, "S3": self.s3.address,
            "S3_ACCESS_KEY": ACCESS_KEY, "S3_SECRET_KEY": SECRET_KEY, "MLLM": "http://127.0.0.1:9",
            "WEIGHTS": weights, "HOME": str(folder), "HEARTBEAT_TIMEOUT": "3",
            "ADMIN_KEY": KEY, "ARTIFACT_LIFETIME_SECONDS": "60",
        }  # fmt: skip
        settings |= {"SAVE_STATE_EVERY_STEPS": "8", "SAVE_STATE_EVERY_SECONDS": "0"} if frequent_saves else {}
        self.environment = os.environ | {f"OMNIVIDEO_{name}": value for name, value in settings.items() if value}
        self.environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self.address = f"http://127.0.0.1:{port}"
        self.api = OmnivideoProcess(
            ["serve", "--port", str(port)], self.environment, folder / "api.log", f"{self.address}/ready"
        )
        command = ["worker", "--device", "cpu"]
        self.workers = [
            OmnivideoProcess(command, self.environment, folder / f"worker{index}.log") for index in range(workers)
        ]
        overrides = {name.lower(): value for name, value in settings.items() if value}
        self.wiring = ServiceWiring(load_settings(**overrides))
        self.wiring.migrate_database()
        for program in (self.api, *self.workers):
            program.start()
            stack.callback(program.kill)
        stack.callback(self.wiring.close)
        self.http = httpx.Client(
            base_url=self.address, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False, timeout=30
        )
        stack.callback(self.http.close)

    def submit(self, seed: int) -> str:
        """Submit a job and return its id; retry while the API is down, with a key that makes it one job."""
        body = {"prompt": f"a red ball {seed}", "seed": seed, "num_inference_steps": STEPS}
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
                servers: dict[str, Redis | Postgres | S3Server] = {
                    "redis": self.redis, "postgresql": self.postgres, "s3": self.s3,
                }  # fmt: skip
                server = servers[target]
                server.kill()
                time.sleep(1.0)
                server.start()

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
        with create_celery_app(self.redis.address, self.wiring.queue_name).connection_for_read() as connection:
            return int(connection.default_channel.client.llen(self.wiring.queue_name))

    def count_orphans(self) -> int:
        """Sweep the object store and return the number of objects that nothing refers to."""
        referenced = self.wiring.jobs.collect_referenced_keys(86_400)
        self.wiring.store.sweep(referenced, 0.0)
        return len(set(self.wiring.store.iter_keys()) - referenced)


def run_once(
    cluster: ServiceCluster, target: str, rng: random.Random, expected: list[str]
) -> tuple[int, int, int, int, float]:
    """Kill a target while jobs run.

    Return the jobs done, the jobs with the right bytes, further attempts, messages in the queue, and the seconds.
    """
    start = time.perf_counter()
    ids = [cluster.submit(seed) for seed in range(JOBS)]
    time.sleep(rng.uniform(0, 4))
    cluster.kill_target(target)
    ends = cluster.wait_for_jobs(ids)
    done = sum(state == "done" for state, _, _ in ends.values())
    same_bytes = sum(ends[job_id][1] == key for job_id, key in zip(ids, expected, strict=True))
    retries = sum(attempt - 1 for _, _, attempt in ends.values())
    return done, same_bytes, retries, cluster.count_queue_messages(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--only", default=",".join(TARGETS))
    parser.add_argument("--weights", default="")
    arguments = parser.parse_args()
    console, rng = Console(width=120), random.Random(0)
    table = Table(title=f"{JOBS} clips of {STEPS} steps in flight, 2 workers, {platform.machine()}")
    for column in ("killed", "runs", "jobs", "done once", "same bytes", "taken over", "in queue", "s per run"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        cluster = ServiceCluster(Path(folder), arguments.weights, stack)
        ids = [cluster.submit(seed) for seed in range(JOBS)]
        ends = cluster.wait_for_jobs(ids)
        expected = [ends[job_id][1] for job_id in ids]
        assert all(expected), ends
        for target in arguments.only.split(","):
            sums = [0, 0, 0, 0, 0.0]
            for run in range(arguments.runs):
                result = run_once(cluster, target, rng, expected)
                sums = [total + value for total, value in zip(sums, result, strict=True)]
                console.print(f"[dim]{target} {run + 1}/{arguments.runs}: {sums}[/dim]")
            done, same_bytes, retries, queued, seconds = sums
            jobs = arguments.runs * JOBS
            table.add_row(target, str(arguments.runs), str(jobs), str(done), str(same_bytes), str(retries), str(queued),
                          f"{seconds / arguments.runs:.1f}")  # fmt: skip
        orphans = cluster.count_orphans()
    console.print(table)
    console.print(f"unreferenced objects after a sweep: {orphans}")


if __name__ == "__main__":
    main()

"""The fault matrix: whatever is killed, every job ends once, with the bytes of an undisturbed run, and nothing stays.

python -m benchmarks.faults [--runs 20] [--only redis,worker] [--weights FOLDER]

Real Redis, PostgreSQL and S3 server (rclone), two Celery workers and the API, each a process of its own.  In each run
ten clips are in flight when one of them is killed with SIGKILL at a random moment, and started again a moment later.
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
from kombu import Connection
from rich.console import Console
from rich.table import Table

from omnivideo.settings import load_settings
from omnivideo.wiring import ServiceWiring
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, S3Server
from tests.support.servers import Postgres, Redis, free_port

JOBS, STEPS = 10, 60
KEY = "a-key-for-the-faults"
TARGETS = ("worker child", "worker", "api", "redis", "postgresql", "s3")


class Program:
    """One of our own processes, `start`ed and `kill`ed like the servers."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, ready: str = ""):
        self.command, self.environment, self.log, self.ready = command, environment, log, ready

    def start(self) -> None:
        command = [sys.executable, "-m", "omnivideo.cli", *self.command]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + 60
        while self.ready and time.monotonic() < until:
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


class Plant:
    """Everything, running, in a folder; `hurried` leaves points to go on from as often as a short test needs them."""

    def __init__(self, folder: Path, weights: str, stack: ExitStack, workers: int = 2, hurried: bool = True):
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
        settings |= {"SAVE_STATE_EVERY_STEPS": "8", "SAVE_STATE_EVERY_SECONDS": "0"} if hurried else {}
        self.environment = os.environ | {f"OMNIVIDEO_{name}": value for name, value in settings.items() if value}
        self.environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self.address = f"http://127.0.0.1:{port}"
        self.api = Program(
            ["serve", "--port", str(port)], self.environment, folder / "api.log", f"{self.address}/ready"
        )
        command = ["worker", "--device", "cpu"]
        self.workers = [Program(command, self.environment, folder / f"worker{at}.log") for at in range(workers)]
        for program in (self.api, *self.workers):
            program.start()
            stack.callback(program.kill)
        given = {name.lower(): value for name, value in settings.items() if value}
        self.rooms = ServiceWiring(load_settings(**given))
        stack.callback(self.rooms.close)
        self.http = httpx.Client(
            base_url=self.address, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False, timeout=30
        )
        stack.callback(self.http.close)

    def submit(self, seed: int) -> str:
        """Through the API, asked again while it is away; the key makes it one job."""
        body = {"prompt": f"a red ball {seed}", "seed": seed, "num_inference_steps": STEPS}
        headers = {"Idempotency-Key": f"{time.monotonic_ns()}"}
        while True:
            with suppress(httpx.HTTPError):
                answer = self.http.post("/v1/videos", json=body, headers=headers)
                if answer.status_code == 200:
                    return str(answer.json()["id"])
            time.sleep(0.2)

    def hurt(self, target: str) -> None:
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
                server = {"redis": self.redis, "postgresql": self.postgres, "s3": self.s3}[target]
                server.kill()
                time.sleep(1.0)
                server.start()

    def ended(self, ids: list[str], seconds: float = 240) -> dict[str, tuple[str, str, int]]:
        """State, artifact and attempts of each, once none is open (or the time is over)."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(Exception):
                found = {one.id: one for one in self.rooms.jobs.list_statuses(ids)}
                if all(one.state not in ("queued", "running") for one in found.values()):
                    return {name: (one.state, one.result.key if one.result else "", one.attempt)
                            for name, one in found.items()}  # fmt: skip
            time.sleep(0.1)
        return {one.id: (one.state, "", one.attempt) for one in self.rooms.jobs.list_statuses(ids)}

    def left_in_queue(self) -> int:
        """Messages that nobody took, once the workers are idle."""
        time.sleep(0.5)
        with Connection(self.redis.address) as connection:
            return int(connection.default_channel.client.llen("omnivideo"))

    def orphans(self) -> int:
        """Objects that nothing refers to after a sweep of whatever is not young."""
        referred = self.rooms.jobs.collect_referenced_keys(86_400)
        self.rooms.store.sweep(referred, 0.0)
        kept = set(self.rooms.store.iter_keys())
        return len(kept - referred)


def run(plant: Plant, target: str, rng: random.Random, expected: list[str]) -> tuple[int, int, int, int, float]:
    """Jobs done once, jobs with the right bytes, attempts above one, messages left, and the seconds it took."""
    began = time.perf_counter()
    ids = [plant.submit(seed) for seed in range(JOBS)]
    time.sleep(rng.uniform(0, 4))
    plant.hurt(target)
    ends = plant.ended(ids)
    done = sum(state == "done" for state, _, _ in ends.values())
    right = sum(ends[name][1] == key for name, key in zip(ids, expected, strict=True))
    again = sum(attempt - 1 for _, _, attempt in ends.values())
    return done, right, again, plant.left_in_queue(), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--only", default=",".join(TARGETS))
    parser.add_argument("--weights", default="")
    given = parser.parse_args()
    out, rng = Console(width=120), random.Random(0)
    table = Table(title=f"{JOBS} clips of {STEPS} steps in flight, 2 workers, {platform.machine()}")
    for column in ("killed", "runs", "jobs", "done once", "same bytes", "taken over", "left in queue", "s a run"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        plant = Plant(Path(folder), given.weights, stack)
        quiet = [plant.submit(seed) for seed in range(JOBS)]
        ends = plant.ended(quiet)
        expected = [ends[name][1] for name in quiet]
        assert all(expected), ends
        for target in given.only.split(","):
            sums = [0, 0, 0, 0, 0.0]
            for at in range(given.runs):
                sums = [one + more for one, more in zip(sums, run(plant, target, rng, expected), strict=True)]
                out.print(f"[dim]{target} {at + 1}/{given.runs}: {sums}[/dim]")
            done, right, again, left, seconds = sums
            jobs = given.runs * JOBS
            table.add_row(target, str(given.runs), str(jobs), str(done), str(right), str(again), str(left),
                          f"{seconds / given.runs:.1f}")  # fmt: skip
        orphans = plant.orphans()
    out.print(table)
    out.print(f"objects that nothing refers to after a sweep: {orphans}")


if __name__ == "__main__":
    main()

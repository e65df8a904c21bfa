"""Measure what grows: 2,000 turns in one thread and 2,000 jobs, then the time after which the sweep may remove them.

python -m benchmarks.growth [--turns 2000] [--jobs 2000] [--rounds 10] [--out docs/pictures]

The service runs in a process of its own, over a decoder and an MLLM that take no time (tests/support/twins.py), with
SQLite and a folder. After each round it states the sizes of both databases and of the store, the memory of the API and
of `omnivideo sweep`, and the times of a turn, of a fork of the first turn and of a new thread. At the end all times in
the database and in the store are moved into the past, as a clock would after the lifetime of artifacts, and the sweep
runs again. It writes growth.json and growth.png.
"""

import argparse
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from omnivideo.contracts import ModelIdentity
from omnivideo.errors import SECONDS_PER_DAY
from omnivideo.settings import load_settings
from omnivideo.startup import exempt_loaded_objects
from omnivideo.storage.database.schema import metadata
from omnivideo.wiring import ServiceWiring
from tests.support.api_server import run_api_server
from tests.support.servers import free_port
from tests.support.twins import InstantDecoder, ScriptedMLLM

MEGABYTE = 2**20
TEXTS = ("a red ball", "make it blue", "a picture of a green star", "a blue star moving left")
PANELS = {
    "databases (MB)": ("service_mb", "threads_mb"),
    "store (kB)": ("store_kb",),
    "memory (MB)": ("api_mb", "sweep_mb"),
    "a turn (ms)": ("turn_ms",),
    "a fork of the first turn, a new thread (ms)": ("fork_ms", "thread_ms"),
    "a sweep (s)": ("sweep_seconds",),
}
LABELS = {
    "service_mb": "jobs, turns, events", "threads_mb": "checkpoints", "store_kb": "objects", "api_mb": "API",
    "sweep_mb": "sweep, at most", "turn_ms": "median", "fork_ms": "fork", "thread_ms": "new thread",
    "sweep_seconds": "sweep",
}  # fmt: skip
Row = dict[str, float]


# ---------------------------------------------------------------- the service


class InstantRenderer(InstantDecoder):
    """An InstantDecoder with what a worker asks of its renderer."""

    def __init__(self, wiring: ServiceWiring):
        self.store = wiring.store  # type: ignore[assignment]
        self.model = ModelIdentity(preset="tiny", weights="instant", precision="none")
        self.omni = SimpleNamespace(placement=None, device="cpu")


class ForgetfulMLLM(ScriptedMLLM):
    """A ScriptedMLLM whose tokens are in the service's store, and which does not keep what it was asked."""

    def __init__(self, wiring: ServiceWiring):
        super().__init__()
        self.store, self.asks = wiring.store, deque(maxlen=1)  # type: ignore[assignment]


def serve(home: Path, port: int) -> None:
    """Run the service until it receives SIGTERM."""
    wiring = ServiceWiring(load_settings(home=home), "cpu")
    wiring.renderer = InstantRenderer(wiring)  # type: ignore[assignment]
    wiring.mllm = ForgetfulMLLM(wiring)
    with run_api_server(wiring, port):
        exempt_loaded_objects()
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


@contextmanager
def start_service(home: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.growth", "--serve", str(home), str(port)]
    process = subprocess.Popen(command)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as http:
            wait_until_ready(http, process)
            yield process, http
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(http: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.HTTPError):
            if http.get("/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise SystemExit("the service does not start")


# ---------------------------------------------------------------- its load


def run_turns(http: httpx.Client, thread: str, first: int, count: int) -> list[float]:
    """Run turns, one after the other, and return their times in seconds."""
    seconds = []
    for number in range(first, first + count):
        body = {"text": TEXTS[number % len(TEXTS)], "seed": number, "steps": 2, "stream": True}
        started_at = time.perf_counter()
        with http.stream("POST", f"/v1/threads/{thread}/turns", json=body) as response:
            text = "".join(response.iter_text())
        assert '"kind":"done"' in text.replace(" ", ""), text[-500:]
        seconds.append(time.perf_counter() - started_at)
    return seconds


def run_jobs(http: httpx.Client, first: int, count: int) -> None:
    """Submit jobs, and wait until all of them are done."""
    body = {"prompt": "a red ball", "num_inference_steps": 2}
    ids = [http.post("/v1/videos", json=body | {"seed": seed}).json()["id"] for seed in range(first, first + count)]
    for video_id in ids:
        while (state := http.get(f"/v1/videos/{video_id}").json()["status"]) != "completed":
            assert state in ("queued", "in_progress"), state
            time.sleep(0.05)


# ---------------------------------------------------------------- samples


def measure_seconds(http: httpx.Client, path: str, body: dict[str, Any], repetitions: int = 3) -> float:
    """Return the median time of a request."""
    seconds = []
    for _ in range(repetitions):
        started_at = time.perf_counter()
        http.post(path, json=body).raise_for_status()
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds)


def run_sweep(home: Path) -> tuple[float, float]:
    """Run `omnivideo sweep` as an operator does. Return the largest memory in MB, and the time in seconds."""
    started_at = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "omnivideo.cli", "sweep", "--home", str(home)], stdout=subprocess.DEVNULL
    )
    largest_mb = 0.0
    while process.poll() is None:  # ru_maxrss would be at least the memory of this process
        with suppress(OSError, ValueError):  # it has ended meanwhile
            largest_mb = max(largest_mb, read_memory(process.pid, "VmHWM"))
        time.sleep(0.02)
    assert process.returncode == 0
    return largest_mb, time.perf_counter() - started_at


def read_memory(process_id: int, field: str = "VmRSS") -> float:
    """Return the memory of a process in MB."""
    (line,) = (line for line in Path(f"/proc/{process_id}/status").read_text().splitlines() if field in line)
    return int(line.split()[1]) / 1024


def measure_database(path: Path) -> float:
    """Return the size of a SQLite database in MB, without pages that are free to be used again."""
    with sqlite3.connect(path, timeout=30) as connection:
        used = connection.execute("SELECT page_count - freelist_count FROM pragma_page_count, pragma_freelist_count")
        pages = used.fetchone()[0]
        page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
    connection.close()
    return float(pages * page_bytes / MEGABYTE)


def take_sample(home: Path, process: subprocess.Popen[bytes], http: httpx.Client, thread: str) -> Row:
    fork_seconds = measure_seconds(http, f"/v1/threads/{thread}/forks", {"after_turn": 1})
    thread_seconds = measure_seconds(http, "/v1/threads", {})
    sweep_mb, sweep_seconds = run_sweep(home)
    objects = [path.stat().st_size for path in (home / "store").rglob("*") if path.is_file()]
    return {
        "service_mb": measure_database(home / "service.sqlite"),
        "threads_mb": measure_database(home / "threads.sqlite"),
        "store_kb": sum(objects) / 1024,
        "objects": len(objects),
        "api_mb": read_memory(process.pid),
        "sweep_mb": sweep_mb,
        "sweep_seconds": sweep_seconds,
        "fork_ms": 1000 * fork_seconds,
        "thread_ms": 1000 * thread_seconds,
    }


def move_into_past(home: Path, seconds: float) -> None:
    """Move all times in the service's database and in the store into the past."""
    with sqlite3.connect(home / "service.sqlite", timeout=30) as connection:
        for table in metadata.sorted_tables:
            for name in [column.name for column in table.columns if column.name.endswith("_at")]:
                connection.execute(f"UPDATE {table.name} SET {name} = {name} - ? WHERE {name} IS NOT NULL", (seconds,))
    connection.close()
    for path in (home / "store").rglob("*"):
        if path.is_file():
            modified_at = path.stat().st_mtime - seconds
            os.utime(path, (modified_at, modified_at))


def measure_growth(home: Path, num_turns: int, num_jobs: int, num_rounds: int) -> list[Row]:
    """Return a row for each round, and a last one for after the lifetime of artifacts."""
    rows: list[Row] = []
    with start_service(home) as (process, http):
        thread = http.post("/v1/threads", json={}).json()["id"]
        for number in range(num_rounds):
            turns, jobs = num_turns // num_rounds, num_jobs // num_rounds
            turn_seconds = run_turns(http, thread, number * turns, turns)
            run_jobs(http, number * jobs, jobs)
            row = {
                "days": 0.0, "turns": (number + 1) * turns, "jobs": (number + 1) * jobs,
                "turn_ms": 1000 * statistics.median(turn_seconds), **take_sample(home, process, http, thread),
            }  # fmt: skip
            rows.append(row)
            print({name: round(value, 1) for name, value in row.items()}, flush=True)
        settings = load_settings(home=home)
        move_into_past(home, settings.artifact_lifetime_seconds + SECONDS_PER_DAY)
        run_sweep(home)
        days = settings.artifact_lifetime_seconds / SECONDS_PER_DAY + 1
        turn_ms = 1000 * statistics.median(run_turns(http, thread, num_turns, 4))
        rows.append(rows[-1] | {"days": days, "turn_ms": turn_ms} | take_sample(home, process, http, thread))
    return rows


# ---------------------------------------------------------------- results


def print_rows(rows: list[Row]) -> None:
    columns = [name for names in PANELS.values() for name in names]
    table = Table("turns and jobs", *columns)
    for row in rows:
        label = f"{row['turns']:.0f}, {row['jobs']:.0f}" + (f", {row['days']:.0f} days later" if row["days"] else "")
        table.add_row(label, *(f"{row[name]:.1f}" for name in columns))
    Console(width=200).print(table)


def plot_rows(rows: list[Row], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    during, after = [row for row in rows if not row["days"]], rows[-1]
    for index, (title, names) in enumerate(PANELS.items(), start=1):
        axes = figure.add_subplot(2, 3, index)
        for name in names:
            (line,) = axes.plot([row["turns"] for row in during], [row[name] for row in during], label=LABELS[name])
            axes.plot([after["turns"]], [after[name]], "o", color=line.get_color())
        axes.set(title=title, xlabel="turns in one thread, and as many jobs")
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.suptitle(f"a dot: {after['days']:.0f} days later, after the sweep")
    figure.savefig(picture, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--serve", nargs=2, metavar=("HOME", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(Path(arguments.serve[0]), int(arguments.serve[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_growth(Path(folder), arguments.turns, arguments.jobs, arguments.rounds)
    print_rows(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "growth.json").write_text(json.dumps(rows, indent=1))
    plot_rows(rows, arguments.out / "growth.png")


if __name__ == "__main__":
    main()

"""The process that runs a deployed service's turns: it is started again, and ends with the one that started it."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.cluster import ServiceCluster
from omnivideo.api import turn_process
from omnivideo.api.turn_process import TurnProcess
from omnivideo.errors import StoreError


def wait_until(is_true: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- the supervisor


@pytest.fixture
def run_script(monkeypatch) -> Iterator[Callable[[str], TurnProcess]]:
    monkeypatch.setattr(turn_process, "RESTART_SECONDS", (0.02, 0.1))
    processes = []

    def start(script: str) -> TurnProcess:
        processes.append(TurnProcess([sys.executable, "-c", script]))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.stop()


def test_a_process_that_is_killed_is_started_again(run_script):
    process = run_script("import sys; sys.stdin.read()")
    for _ in range(4):
        wait_until(lambda: process.process and process.process.poll() is None)
        killed = process.process
        os.kill(killed.pid, signal.SIGKILL)
        wait_until(lambda killed=killed: process.process is not killed)
    process.check_running()  # a turn that kills its process does not take the service out of use


def test_a_process_that_does_not_start_is_reported(run_script):
    process = run_script("raise SystemExit(1)")
    wait_until(lambda: process.failed_starts >= turn_process.MAX_FAILED_STARTS)
    with pytest.raises(StoreError, match="turns: the process that runs them does not start"):
        process.check_running()


def test_a_process_that_starts_after_all_makes_the_service_ready(run_script, monkeypatch, tmp_path):
    """Its database was down for a while, for example."""
    monkeypatch.setattr(turn_process, "STABLE_SECONDS", 0.5)
    file = tmp_path / "can-start"
    process = run_script(f"import pathlib, sys; pathlib.Path({str(file)!r}).exists() or sys.exit(1); sys.stdin.read()")
    wait_until(lambda: process.failed_starts >= turn_process.MAX_FAILED_STARTS)
    file.touch()
    wait_until(lambda: process.failed_starts == 0)
    process.check_running()


@pytest.mark.parametrize("script", ["import sys; sys.stdin.read()", "import time; time.sleep(60)"])
def test_a_stop_ends_the_process_for_good(run_script, monkeypatch, script):
    monkeypatch.setattr(turn_process, "STOP_TIMEOUT_SECONDS", 0.5)
    process = run_script(script)
    wait_until(lambda: process.process)
    process.stop()
    assert process.process.poll() is not None
    process.supervisor.join(5)
    assert not process.supervisor.is_alive()


# ---------------------------------------------------------------- a deployed service


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[ServiceCluster]:
    with ExitStack() as stack:
        yield ServiceCluster(tmp_path_factory.mktemp("cluster"), "", stack, workers=0)


def find_turn_process(cluster: ServiceCluster) -> int | None:
    api = cluster.api.process.pid
    for child in Path(f"/proc/{api}/task").glob("*/children"):
        for pid in child.read_text().split():
            if exists(int(pid)) and b"run-turns" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    return None


def ask(cluster: ServiceCluster, text: str) -> str:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
    response = cluster.http.post("/v1/chat/completions", json=body, timeout=90)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_turns_run_in_another_process_than_requests(cluster):
    """It is found again after it was killed, and ends with the API, which may end in any way."""
    assert "shapes" in ask(cluster, "what can you do?")
    first = find_turn_process(cluster)
    assert first and os.getpriority(os.PRIO_PROCESS, first) > 0
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: find_turn_process(cluster) not in (None, first))
    assert "shapes" in ask(cluster, "what can you do?")
    assert cluster.http.get("/ready").status_code == 200
    for signal_number in (signal.SIGKILL, signal.SIGTERM):
        child = find_turn_process(cluster)
        os.kill(cluster.api.process.pid, signal_number)
        cluster.api.process.wait()
        wait_until(lambda child=child: not exists(child))
        cluster.api.start()

"""The process that runs a service's turns: it is started again, and ends with the one that started it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from benchmarks.cluster import OmnivideoProcess, ServiceCluster
from omnivideo.api import turn_process
from omnivideo.api.turn_process import TurnProcess, exchange_changes
from omnivideo.contracts import Change
from omnivideo.errors import StoreError
from omnivideo.storage.database.engine import create_database_engine, create_memory_database, upgrade_schema
from omnivideo.storage.database.notifications import get_notifier
from omnivideo.storage.database.turns import TurnRepository
from tests.support.servers import free_port


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

RUN = "import os, sys; os.write(0, b'ready\\n'); sys.stdin.read()"


@pytest.fixture
def notifier():
    return get_notifier(create_memory_database())


@pytest.fixture
def run_script(monkeypatch, notifier) -> Iterator[Callable[..., TurnProcess]]:
    monkeypatch.setattr(turn_process, "RESTART_SECONDS", (0.02, 0.1))
    processes = []

    def start(script: str, **options) -> TurnProcess:
        processes.append(TurnProcess([sys.executable, "-c", script], **options).start())
        processes[-1].begin(notifier)
        return processes[-1]

    yield start
    for process in processes:
        process.stop()


def test_a_process_that_is_killed_is_started_again(run_script):
    process = run_script(RUN)
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


def test_a_process_that_starts_after_all_makes_the_service_ready(run_script, tmp_path):
    """Its database was down for a while, for example."""
    file = tmp_path / "can-start"
    process = run_script(f"import pathlib, sys; pathlib.Path({str(file)!r}).exists() or sys.exit(1); {RUN}")
    wait_until(lambda: process.failed_starts >= turn_process.MAX_FAILED_STARTS)
    file.touch()
    wait_until(lambda: process.failed_starts == 0)
    process.check_running()


def test_a_process_that_must_start_is_waited_for_and_not_started_again(run_script):
    assert run_script(RUN, must_start=True).wait_until_started() == 0
    process = run_script("raise SystemExit(2)", must_start=True)
    assert process.wait_until_started() == 2 and not process.supervisor.is_alive()


@pytest.mark.parametrize("script", [RUN, "import time; time.sleep(60)"])
def test_a_stop_ends_the_process_for_good(run_script, script):
    process = run_script(script, stop_seconds=0.5)
    wait_until(lambda: process.process)
    process.stop()
    assert process.process.poll() is not None
    process.supervisor.join(5)
    assert not process.supervisor.is_alive()


def test_a_process_that_has_not_begun_is_not_waited_for():
    """It may be loading modules, and has nothing to give back."""
    process = TurnProcess([sys.executable, "-c", "import time; time.sleep(60)"], stop_seconds=60).start()
    wait_until(lambda: process.process)
    started_at = time.monotonic()
    process.stop()
    assert process.process.poll() is not None and time.monotonic() - started_at < 10


# ---------------------------------------------------------------- changes between two processes


def test_changes_pass_in_both_directions(run_script, notifier):
    """The script answers each change with one of another topic, as a turn answers a message."""
    process = run_script(
        "import json, os, sys\n"
        "assert sys.stdin.readline() == 'begin \\n'; os.write(0, b'ready\\n')\n"
        "for line in sys.stdin:\n"
        "    change = json.loads(line) | {'topic': 'answer ' + json.loads(line)['topic']}\n"
        "    os.write(0, json.dumps(change).encode() + b'\\n')\n"
    )
    received = []
    with notifier.subscribe(("answer",), received.append):
        assert process.wait_until_started() == 0
        wait_until(lambda: notifier.forward is not None)
        notifier.publish(Change(topic="one", number=3, body={"text": "gr\u00fcn\n"}))
        notifier.deliver(Change(topic="from the other process"))  # which does not return to it
        notifier.publish(Change(topic="two"))
        wait_until(lambda: len(received) == 2)
    assert [change.topic for change in received] == ["answer one", "answer two"]
    assert received[0].number == 3 and received[0].body == {"text": "gr\u00fcn\n"}


def test_turns_of_one_process_are_followed_in_the_other_on_sqlite(tmp_path):
    """Two addresses of one file stand for two processes: each has its own notifier."""
    (tmp_path / "home").mkdir()
    engines = [create_database_engine(f"sqlite:///{tmp_path}/{name}/db") for name in ("home", "home/../home")]
    upgrade_schema(engines[0])
    requests, turns = map(TurnRepository, engines)
    ends, new_turns, events = socket.socketpair(), [], []
    for end, engine in zip(ends, engines, strict=True):
        threading.Thread(target=exchange_changes, args=(end, get_notifier(engine)), daemon=True).start()
    wait_until(lambda: all(get_notifier(engine).forward for engine in engines))
    with turns.follow_new_turns(lambda: new_turns.append(1)), requests.notifier.subscribe(("turn t",), events.append):
        requests.create_thread("thread", "ann")
        requests.create_turn("t", "thread", "ann", 1, {"text": "a red ball"})
        wait_until(lambda: new_turns)
        turn = turns.claim_next_turn(15.0, [], [])
        turns.append_event(turn, {"kind": "text", "delta": "hello"})
        wait_until(lambda: events)
        assert events[0].body == {"kind": "text", "delta": "hello"}
    for end in ends:
        end.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: not any(get_notifier(engine).forward for engine in engines))
    for end, engine in zip(ends, engines, strict=True):
        end.close()
        engine.dispose()


def test_a_process_that_does_not_read_keeps_nobody_waiting(run_script, notifier, monkeypatch):
    monkeypatch.setattr(turn_process, "MAX_WAITING_CHANGES", 10)
    process = run_script("import os, time; os.write(0, b'ready\\n'); time.sleep(60)", stop_seconds=0.1)
    assert process.wait_until_started() == 0
    wait_until(lambda: notifier.forward is not None)
    started_at = time.monotonic()
    for number in range(2_000):
        notifier.publish(Change(topic="turn 1", number=number, body={"text": "x" * 1_000}))
    assert time.monotonic() - started_at < 5


# ---------------------------------------------------------------- a deployed service


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[ServiceCluster]:
    with ExitStack() as stack:
        yield ServiceCluster(tmp_path_factory.mktemp("cluster"), "", stack, workers=0)


def find_turn_process(api: OmnivideoProcess) -> int | None:
    for child in Path(f"/proc/{api.process.pid}/task").glob("*/children"):
        for pid in child.read_text().split():
            if exists(int(pid)) and b"run-turns" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    return None


def ask(http: httpx.Client, text: str) -> str:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
    response = http.post("/v1/chat/completions", json=body, timeout=90)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def begin_clip(http: httpx.Client, prompt: str) -> str:
    """Ask for a clip that takes a while; return its id once it is being rendered."""
    video: str = http.post("/v1/videos", json={"prompt": prompt, "num_inference_steps": 100}).json()["id"]
    wait_until(lambda: http.get(f"/v1/videos/{video}").json()["progress"] > 0)
    return video


def test_turns_run_in_another_process_than_requests(cluster):
    """It is found again after it was killed, and ends with the API, which may end in any way."""
    assert "shapes" in ask(cluster.http, "what can you do?")
    first = find_turn_process(cluster.api)
    assert first and os.getpriority(os.PRIO_PROCESS, first) > 0
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: find_turn_process(cluster.api) not in (None, first))
    assert "shapes" in ask(cluster.http, "what can you do?")
    assert cluster.http.get("/ready").status_code == 200
    for signal_number in (signal.SIGKILL, signal.SIGTERM):
        child = find_turn_process(cluster.api)
        os.kill(cluster.api.process.pid, signal_number)
        cluster.api.process.wait()
        wait_until(lambda child=child: not exists(child))
        cluster.api.start()


# ---------------------------------------------------------------- an embedded service


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Iterator[tuple[OmnivideoProcess, httpx.Client]]:
    folder, port = tmp_path_factory.mktemp("embedded"), free_port()
    environment = os.environ | {"OMNIVIDEO_HOME": str(folder), "OMNIVIDEO_HEARTBEAT_TIMEOUT": "2"}
    address = f"http://127.0.0.1:{port}"
    api = OmnivideoProcess(["serve", "--port", str(port)], environment, folder / "api.log", f"{address}/ready")
    api.start()
    with httpx.Client(base_url=address, trust_env=False, timeout=90) as http:
        yield api, http
    api.kill()


def test_the_models_of_an_embedded_service_are_in_the_process_of_its_turns(embedded):
    """The process that answers requests has no model, so that it needs little memory and waits for none."""
    api, http = embedded
    turns = find_turn_process(api)
    is_torch_loaded = ["libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in (api.process.pid, turns)]
    assert is_torch_loaded == [False, True]
    assert "omnivideo_mllm_part_bytes" in http.get("/metrics").text


def test_what_an_embedded_service_does_survives_its_models_process(embedded):
    """A turn, a clip and an understanding request go on, at the same address of the MLLM."""
    api, http = embedded
    video = begin_clip(http, "a red circle moving right")
    first = find_turn_process(api)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: find_turn_process(api) not in (None, first))
    assert "shapes" in ask(http, "what can you do?")
    wait_until(lambda: http.get(f"/v1/videos/{video}").json()["status"] == "completed", 90)
    clip = http.get(f"/v1/videos/{video}/content").content
    files = {"source": ("clip.mp4", clip, "video/mp4")}
    answer = http.post("/v1/understand", data={"question": "how many shapes are there?"}, files=files)
    assert answer.status_code == 200, answer.text


def test_an_interrupted_embedded_service_gives_its_clip_back(embedded):
    """Ctrl-C reaches both processes; the clip goes on when the service is started again, and nothing is lost."""
    api, http = embedded
    video = begin_clip(http, "a red circle moving left")
    turns = find_turn_process(api)
    os.killpg(api.process.pid, signal.SIGINT)
    assert api.process.wait(60) == 0
    assert not exists(turns)
    assert "Traceback" not in api.log.read_text()
    api.start()
    wait_until(lambda: http.get(f"/v1/videos/{video}").json()["status"] == "completed", 90)


def test_an_embedded_service_that_cannot_load_its_weights_says_so_and_ends(tmp_path):
    command = [sys.executable, "-m", "omnivideo", "serve", "--port", str(free_port()), "--weights", str(tmp_path)]
    environment = os.environ | {"OMNIVIDEO_HOME": str(tmp_path / "home")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "no model_index.json" in result.stderr and "it is started again" not in result.stderr

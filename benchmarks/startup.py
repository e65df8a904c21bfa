"""Measure the start: seconds and CPU seconds from a command to its first denoising step and to its first answer.

python -m benchmarks.startup [--runs 3] [--busy 0] [--report FILE]

`--help`, `generate`, `chat`, `serve` until /ready, and a worker until its first clip (where redis-server is installed).
`--busy N` runs N processes beside them that compute all the time. The home is temporary, the weights are the shipped
ones. The commands write to a pseudo-terminal, so that the progress bar tells when the first step is done.
"""

import argparse
import json
import multiprocessing
import os
import platform
import pty
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

COMMAND = [sys.executable, "-m", "omnivideo"]
PROMPT = "a small red circle moving right"
GOALS = {"generate: answer": 4.0, "serve: ready": 5.0}  # seconds on an idle machine
OUTPUT = "clip.mp4"
# What the commands print, without the terminal's codes. tests/benchmarks/test_startup.py compares it with the CLI.
TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HELP, THREAD, CHAT_CLIP = r"Installation", r"thread \w", r"video\s+/\S+"
FIRST_STEP = r"\b[1-9]\d*/\d+"  # of the progress bar
ANSWER = re.escape(OUTPUT)  # the name of the file that was written
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
Times = dict[str, tuple[float, float]]  # what happened -> seconds and CPU seconds since the command


class Command:
    """A running command, whose output is read as it comes; times are counted from its start."""

    def __init__(self, *words: str, home: Path, **settings: str):
        self.output, output = pty.openpty()
        self.start = time.perf_counter()
        self.process = subprocess.Popen(
            [*COMMAND, *words], stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=home,
            env=os.environ | settings | {"OMNIVIDEO_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
        os.close(output)

    def read_times(self) -> tuple[float, float]:
        """Return the seconds and the CPU seconds, of the process and its ended children, until now."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return time.perf_counter() - self.start, sum(map(int, fields[11:15])) / CLOCK_TICKS

    def wait_for(self, pattern: str) -> tuple[float, float]:
        """Read the output until it contains the pattern, and return the times then."""
        text = ""
        while not re.search(pattern, TERMINAL_CODES.sub("", text)):
            try:
                text += os.read(self.output, 65536).decode(errors="replace")
            except OSError:
                raise SystemExit(f"the command ended without {pattern!r}:\n{text}") from None
        return self.read_times()

    def wait_until_ended(self) -> tuple[float, float]:
        _, _, usage = os.wait4(self.process.pid, 0)
        return time.perf_counter() - self.start, usage.ru_utime + usage.ru_stime

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        self.process.kill()
        self.process.wait()
        os.close(self.output)


@contextmanager
def run_command(*words: str, home: Path, **settings: str) -> Iterator[Command]:
    command = Command(*words, home=home, **settings)
    try:
        yield command
    finally:
        command.stop()


def measure_help(home: Path) -> Times:
    with run_command("--help", home=home) as command:
        return {"--help: answer": command.wait_for(HELP)}


def measure_generate(home: Path) -> Times:
    with run_command("generate", PROMPT, "--video", "-o", OUTPUT, home=home) as command:
        step = command.wait_for(FIRST_STEP)
        answer = command.wait_for(ANSWER)
        return {"generate: first step": step, "generate: answer": answer, "generate: end": command.wait_until_ended()}


def measure_chat(home: Path) -> Times:
    with run_command("chat", home=home) as command:
        ready = command.wait_for(THREAD)
        command.send(PROMPT)
        return {"chat: ready": ready, "chat: clip": command.wait_for(CHAT_CLIP)}


def measure_serve(home: Path) -> Times:
    port = find_free_port()
    with run_command("serve", "--port", str(port), home=home) as command:
        ready = wait_until_ready(command, port)
        send_request(port, "/v1/videos/sync", {"prompt": PROMPT})
        return {"serve: ready": ready, "serve: first clip": command.read_times()}


def measure_worker(home: Path) -> Times:
    """Start a worker of a service that has a job; the service itself is running already."""
    port, broker_port = find_free_port(), find_free_port()
    settings = {"OMNIVIDEO_BROKER": f"redis://127.0.0.1:{broker_port}/0"}
    broker = subprocess.Popen(["redis-server", "--port", str(broker_port), "--save", ""], stdout=subprocess.DEVNULL)
    try:
        with run_command("serve", "--port", str(port), home=home, **settings) as service:
            wait_until_ready(service, port)
            video = json.loads(send_request(port, "/v1/videos", {"prompt": PROMPT}))
            with run_command("worker", home=home, **settings) as command:
                while json.loads(send_request(port, f"/v1/videos/{video['id']}"))["status"] != "completed":
                    time.sleep(0.05)
                return {"worker: first clip": command.read_times()}
    finally:
        broker.terminate()
        broker.wait()


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(command: Command, port: int) -> tuple[float, float]:
    """Wait until the service answers that it is ready, and return the times then."""
    while command.process.poll() is None:
        with suppress(OSError):
            send_request(port, "/ready")
            return command.read_times()
        time.sleep(0.02)
    raise SystemExit("the service ended before it was ready")


def send_request(port: int, path: str, body: dict[str, str] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return bytes(response.read())


def list_measurements() -> list[Callable[[Path], Times]]:
    measurements: list[Callable[[Path], Times]] = [measure_help, measure_generate, measure_chat, measure_serve]
    if shutil.which("redis-server"):
        return [*measurements, measure_worker]
    print("redis-server is not installed: the worker was not measured")
    return measurements


def compute_forever() -> None:
    while True:
        sum(range(100_000))


@contextmanager
def keep_busy(count: int) -> Iterator[None]:
    """Run processes that compute all the time."""
    processes = [multiprocessing.Process(target=compute_forever, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside the commands")
    parser.add_argument("--report", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    samples: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, keep_busy(arguments.busy):
        for run in range(arguments.runs):
            for measure in list_measurements():
                home = Path(folder, f"{run}-{measure.__name__}")
                home.mkdir()
                for name, times in measure(home).items():
                    samples.setdefault(name, []).append(times)
    machine, load = platform.processor() or platform.machine(), os.getloadavg()[0]
    print(f"{machine}, {os.cpu_count()} cores, load {load:.1f}, {arguments.busy} busy")
    medians = {
        name: [statistics.median(values) for values in zip(*times, strict=True)] for name, times in samples.items()
    }
    for name, (seconds, cpu_seconds) in medians.items():
        goal = f"   goal on an idle machine: {GOALS[name]:g} s" if name in GOALS else ""
        print(f"{name:20} {seconds:7.2f} s   {cpu_seconds:7.2f} CPU s{goal}")
    if arguments.report:
        arguments.report.write_text(json.dumps({"load": load, "busy": arguments.busy, "medians": medians}, indent=2))


if __name__ == "__main__":
    main()

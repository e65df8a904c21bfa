"""Measure the MLLM in vLLM: visual tokens against a one-token chat, many users against one, and the in-process twin.

    python -m benchmarks.mllm --weights FOLDER [--rounds 60] [--users 16] [--address http://...]

Without an address it starts a server on the CPU (tests/support/vllm_server.py). Calls of different kinds alternate, so
that other load on the machine affects all of them alike. Every call has a new prompt, because a repeated prompt would
be read from the prefix cache.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import httpx

from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.remote import RemoteMLLM
from omnivideo.contracts import MLLMRequest
from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.shipped import SHIPPED_WEIGHTS_FOLDER
from omnivideo.storage.objects.memory import MemoryObjectStore
from tests.support.servers import free_port
from tests.support.vllm_server import Server, find_vllm_python

Call = Callable[[str], object]
prompt_numbers = count()


def make_prompt() -> str:
    """Return a new prompt of about the usual length."""
    return f"{next(prompt_numbers)} is the number of a small red ball that moves to the left over blue water, slowly"


def time_call(call: Call) -> float:
    text = make_prompt()
    start = time.perf_counter()
    call(text)
    return time.perf_counter() - start


def measure_medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Call each in turn, repeatedly, and return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 3):
        for name, call in calls.items():
            seconds = time_call(call)
            if index >= 3:  # the first three warm up
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure_rate(call: Call, users: int, calls: int) -> float:
    """Return the calls per second of users who each make one call after another."""
    start = time.perf_counter()
    with ThreadPoolExecutor(users) as pool:
        list(pool.map(call, [make_prompt() for _ in range(calls)]))
    return calls / (time.perf_counter() - start)


def measure_rates(call: Call, users: int, calls: int, rounds: int = 5) -> tuple[float, float]:
    """Return the rates of one user and of many users: medians over alternating rounds."""
    one, many = zip(
        *((measure_rate(call, 1, calls), measure_rate(call, users, calls)) for _ in range(rounds)), strict=True
    )
    return statistics.median(one), statistics.median(many)


def open_chat(address: str) -> Call:
    http = httpx.Client(base_url=address, timeout=120, trust_env=False)

    def chat(text: str) -> None:
        body = {"model": "omnivideo", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
        http.post("/v1/chat/completions", json=body | {"temperature": 0}).raise_for_status()

    return chat


@contextmanager
def run_server(weights: Path, users: int, folder: Path) -> Iterator[str]:
    server = Server(find_vllm_python(), weights, folder, free_port(), max_num_seqs=users).start()
    try:
        yield server.wait(900).address
    finally:
        server.stop()


def measure(address: str, weights: Path, arguments: argparse.Namespace) -> None:
    store = MemoryObjectStore()  # in memory, because only the models are measured
    remote, twin = RemoteMLLM(address, store), LocalMLLM(checkpoint.load(weights), store)
    calls: dict[str, Call] = {
        "chat, one token": open_chat(address),
        "visual tokens": lambda text: remote.predict_visual_tokens(MLLMRequest(text=text), "video"),
        "route": lambda text: remote.route(MLLMRequest(text=text)),
        "twin, visual tokens": lambda text: twin.predict_visual_tokens(MLLMRequest(text=text), "video"),
        "twin, route": lambda text: twin.route(MLLMRequest(text=text)),
    }
    medians = measure_medians(calls, arguments.rounds)
    for name, median in medians.items():
        print(f"{name:20} {1000 * median:7.1f} ms, {median / medians['chat, one token']:.2f} of a one-token chat")
    for name in ("chat, one token", "visual tokens"):
        one, many = measure_rates(calls[name], arguments.users, arguments.rounds)
        print(f"{name:20} {one:7.1f} per second; {arguments.users} users {many:.1f}, {many / one:.2f} times as many")
    print(
        f"{'twin, visual tokens':20} {measure_rate(calls['twin, visual tokens'], 1, arguments.rounds):7.1f} per second"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS_FOLDER / "tiny")
    parser.add_argument("--address")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--users", type=int, default=16)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if arguments.address:
        measure(arguments.address, arguments.weights, arguments)
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        run_server(arguments.weights, arguments.users, Path(folder)) as address,
    ):
        measure(address, arguments.weights, arguments)


if __name__ == "__main__":
    main()

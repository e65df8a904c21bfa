"""vLLM's language model server in figures: visual tokens beside a one-token chat, many users beside one, and the twin
in a process.

    python -m benchmarks.mllm --weights FOLDER [--rounds 60] [--users 16] [--address http://...]

Without an address it starts a server on the CPU (tests/support/vllm_server.py).  Calls of different kinds take
turns, so that whatever else the machine does falls on all of them alike; every call has a prompt of its own, since the
second time a prompt would come out of the prefix cache.
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
from omnivideo.storage.objects.memory import MemoryObjectStore
from tests.support.servers import free_port
from tests.support.vllm_server import Server, interpreter

Call = Callable[[str], object]
number = count()


def prompt() -> str:
    """Not one that was there before, and always about as long."""
    return f"{next(number)} is the number of a small red ball that moves to the left over blue water, slowly"


def spent(call: Call) -> float:
    text = prompt()
    began = time.perf_counter()
    call(text)
    return time.perf_counter() - began


def in_turn(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """The median time of each, in s."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for at in range(rounds + 3):
        for name, call in calls.items():
            took = spent(call)
            if at >= 3:  # the first warm up
                times[name].append(took)
    return {name: statistics.median(every) for name, every in times.items()}


def rate(call: Call, users: int, calls: int) -> float:
    """Calls a second, of so many users who each ask one thing after another."""
    began = time.perf_counter()
    with ThreadPoolExecutor(users) as pool:
        list(pool.map(call, [prompt() for _ in range(calls)]))
    return calls / (time.perf_counter() - began)


def alternating(call: Call, users: int, calls: int, rounds: int = 5) -> tuple[float, float]:
    """One user's rate and many users' rate, medians of turns about."""
    one, many = zip(*((rate(call, 1, calls), rate(call, users, calls)) for _ in range(rounds)), strict=True)
    return statistics.median(one), statistics.median(many)


def chat_of(address: str) -> Call:
    http = httpx.Client(base_url=address, timeout=120, trust_env=False)

    def chat(text: str) -> None:
        body = {"model": "omnivideo", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
        http.post("/v1/chat/completions", json=body | {"temperature": 0}).raise_for_status()

    return chat


@contextmanager
def serving(weights: Path, users: int, folder: Path) -> Iterator[str]:
    server = Server(interpreter(), weights, folder, free_port(), max_num_seqs=users).start()
    try:
        yield server.wait(900).address
    finally:
        server.stop()


def measure(address: str, weights: Path, given: argparse.Namespace) -> None:
    store = MemoryObjectStore()  # costs nothing: only the models' servers are measured
    away, twin = RemoteMLLM(address, store), LocalMLLM(checkpoint.load(weights), store)
    calls: dict[str, Call] = {
        "chat, one token": chat_of(address),
        "visual tokens": lambda text: away.predict_visual_tokens(MLLMRequest(text=text), "video"),
        "route": lambda text: away.route(MLLMRequest(text=text)),
        "twin, visual tokens": lambda text: twin.predict_visual_tokens(MLLMRequest(text=text), "video"),
        "twin, route": lambda text: twin.route(MLLMRequest(text=text)),
    }
    medians = in_turn(calls, given.rounds)
    for name, median in medians.items():
        print(f"{name:20} {1000 * median:7.1f} ms, {median / medians['chat, one token']:.2f} of a one-token chat")
    for name in ("chat, one token", "visual tokens"):
        one, many = alternating(calls[name], given.users, given.rounds)
        print(f"{name:20} {one:7.1f} a second, {given.users} users {many:.1f}: {many / one:.2f} times as many")
    print(f"{'twin, visual tokens':20} {rate(calls['twin, visual tokens'], 1, given.rounds):7.1f} a second")


def main() -> None:
    reader = argparse.ArgumentParser()
    reader.add_argument("--weights", type=Path, default=checkpoint.SHIPPED_WEIGHTS_FOLDER / "tiny")
    reader.add_argument("--address")
    reader.add_argument("--rounds", type=int, default=60)
    reader.add_argument("--users", type=int, default=16)
    given = reader.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if given.address:
        measure(given.address, given.weights, given)
        return
    with tempfile.TemporaryDirectory() as folder, serving(given.weights, given.users, Path(folder)) as address:
        measure(address, given.weights, given)


if __name__ == "__main__":
    main()

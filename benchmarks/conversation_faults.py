"""Faults of what an API process does besides requests: turns killed at every node, batches, and webhooks.

benchmarks/faults.py runs them on an embedded service, whose processes are killed with SIGKILL and started again.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import httpx

from benchmarks.cluster import START_SECONDS
from tests.support.servers import free_port

RED, BLUE, GREEN = "a picture of a red circle", "make it blue", "a picture of a green star"
# The words of a conversation that passes through each node. A reply follows a turn that asks.
CONVERSATIONS: dict[str, list[str]] = {
    "plan": [RED], "search": [RED], "refer": [RED], "think": [RED], "route": [RED], "generate": [RED], "check": [RED],
    "answer": [RED], "edit": [RED, BLUE], "understand": [RED, "what colour is the circle?"],
    "limit": ["; then ".join([RED] * 5), "yes"], "ask": ["a picture of a red blue circle", "blue"],
    "decline": ["un cercle rouge sur un fond noir"], "command": [RED, "undo"],
}  # fmt: skip
OPEN = ("queued", "running")
END_SECONDS = 180.0
BATCH_LINES, HOOKED_CLIPS = 8, 6


@dataclass
class FaultResult:
    """A row of the table: what was killed, how often, what was to be done, and how much of it was done once."""

    name: str
    runs: int = 0
    wanted: int = 0
    done_once: int = 0
    same_result: int = 0
    repeated: int = 0
    seconds: float = 0.0


class EmbeddedService:
    """`omnivideo serve` with a worker, in a folder; the nodes that are disturbed kill the process of its turns."""

    def __init__(self, folder: Path, heartbeat_timeout: float = 3.0):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, free_port()
        serve = ["serve", "--port", str(self.port), "--device", "cpu"]
        self.kills = folder / "kills"
        self.kills.mkdir(exist_ok=True)
        self.command = [sys.executable, "-m", "benchmarks.killed_at", str(self.kills), *serve]
        self.environment = os.environ | {
            "OMNIVIDEO_HOME": str(folder), "OMNIVIDEO_HEARTBEAT_TIMEOUT": str(heartbeat_timeout),
            "OMNIVIDEO_WEBHOOK_HOSTS": "127.0.0.1",
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
        }  # fmt: skip
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=60)

    def start(self) -> None:
        with (self.folder / "api.log").open("ab") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(httpx.HTTPError):
                if self.http.get("/health").status_code == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the service did not start; see {self.folder}/api.log")

    def disturb_node(self, node: str, fault: Literal["kill", "raise"]) -> Path:
        """Let a node kill its process or raise an exception when it has next run; the file exists until then."""
        file = self.kills / node
        file.write_text(fault)
        return file

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self.http.close()

    def restart_if_dead(self) -> bool:
        """Start the service again if its process has ended, and return whether it had."""
        is_dead = self.process.poll() is not None
        if is_dead:
            self.start()
        return is_dead

    def request(self, method: str, path: str, key: str = "", **options: Any) -> Any:
        """Send a request until it is answered; a process that was killed is started again meanwhile."""
        headers = {"Idempotency-Key": key} if key else {}
        while True:
            with suppress(httpx.HTTPError):
                response = self.http.request(method, path, headers=headers, **options)
                response.raise_for_status()
                return response.json() if "json" in response.headers.get("content-type", "") else response.content
            self.restart_if_dead()
            time.sleep(0.1)


@contextmanager
def run_embedded(folder: Path) -> Iterator[EmbeddedService]:
    service = EmbeddedService(folder)
    service.start()
    try:
        yield service
    finally:
        service.close()


# ---------------------------------------------------------------- turns


def hold_conversation(service: EmbeddedService, thread_id: str, texts: list[str]) -> list[tuple[str, list[str], int]]:
    """Send the turns, and return the state, the artifacts and the number of endings of each."""
    outcomes = []
    service.request("POST", "/v1/threads", f"thread {thread_id}", json={"id": thread_id})
    for number, text in enumerate(texts):
        path = f"/v1/threads/{thread_id}/turns"
        body = {"text": text, "steps": 2, "seed": 7}
        turn = service.request("POST", path, f"turn {thread_id} {number}", json=body)
        deadline = time.monotonic() + END_SECONDS
        while turn["state"] in OPEN and time.monotonic() < deadline:
            service.restart_if_dead()
            time.sleep(0.1)
            turn = service.request("GET", f"{path}/{turn['id']}")
        kinds = read_event_kinds(service, f"{path}/{turn['id']}/events")
        results = (turn.get("turn") or {}).get("results", [])
        artifacts = [result["artifact"]["key"] for result in results if result.get("artifact")]
        outcomes.append((turn["state"], artifacts, kinds["done"] + kinds["question"]))
    return outcomes


def read_event_kinds(service: EmbeddedService, path: str) -> Counter[str]:
    events = service.request("GET", path).decode().splitlines()
    return Counter(json.loads(line.removeprefix("data: "))["kind"] for line in events if line.startswith("data: {"))


def kill_turns_at_every_node(folder: Path, nodes: list[str] | None = None) -> FaultResult:
    """Kill the process of the turns in each node of the graph; compare with the same conversation without a kill."""
    result, start = FaultResult("turns, at every node"), time.perf_counter()
    conversations = {node: CONVERSATIONS[node] for node in nodes or CONVERSATIONS}
    with run_embedded(folder / "undisturbed") as service:
        expected = {node: hold_conversation(service, node, texts) for node, texts in conversations.items()}
    with run_embedded(folder / "killed") as service:
        for node, texts in conversations.items():
            file = service.disturb_node(node, "kill")
            outcomes = hold_conversation(service, node, texts)
            if file.exists():
                raise RuntimeError(f"the conversation {texts} does not pass through {node}: {outcomes}")
            result.runs += 1
            result.wanted += len(texts)
            result.done_once += sum(ends == 1 for _, _, ends in outcomes)
            result.same_result += sum(a[:2] == b[:2] for a, b in zip(outcomes, expected[node], strict=True))
            if outcomes != expected[node]:
                print(node, outcomes, expected[node])
    result.seconds = (time.perf_counter() - start) / max(1, result.runs)
    return result


def fail_turns_at_every_node(folder: Path) -> FaultResult:
    """Raise an unexpected exception in each node of the graph; the next message must return its own result.

    "done once" counts the turns that ended well or with the error, "same result" the next messages with their clips.
    """
    result, start = FaultResult("exceptions, at every node"), time.perf_counter()
    with run_embedded(folder) as service:
        expected = hold_conversation(service, "undisturbed", [GREEN])
        for node, texts in CONVERSATIONS.items():
            file = service.disturb_node(node, "raise")
            *outcomes, following = hold_conversation(service, node, [*texts, GREEN])
            if file.exists():
                raise RuntimeError(f"the conversation {texts} does not pass through {node}: {outcomes}")
            states = [state for state, _, _ in outcomes]
            result.runs += 1
            result.wanted += 1
            result.done_once += states.count("failed") == 1 and {"failed", "done", "asks"} >= set(states)
            result.same_result += following[:2] == expected[0][:2]
            if following[:2] != expected[0][:2] or states.count("failed") != 1:
                print(node, outcomes, following, expected)
    result.seconds = (time.perf_counter() - start) / max(1, result.runs)
    return result


# ---------------------------------------------------------------- batches


def kill_batches(folder: Path, runs: int, rng: random.Random) -> FaultResult:
    """Kill the process at a random time of a batch of clips and of one of chats."""
    result, start = FaultResult("batches"), time.perf_counter()
    with run_embedded(folder) as service:
        for run in range(runs):
            path, body = [
                ("/v1/videos", {"prompt": "a red ball", "num_inference_steps": 10}),
                (
                    "/v1/chat/completions",
                    {"model": "tiny", "messages": [{"role": "user", "content": "what can you do?"}]},
                ),
            ][run % 2]
            requests = [
                {"custom_id": f"{line}", "method": "POST", "url": path, "body": body} for line in range(BATCH_LINES)
            ]
            data = "\n".join(map(json.dumps, requests)).encode()
            files = {"file": ("lines.jsonl", data)}
            stored = service.request("POST", "/v1/files", f"file {run}", data={"purpose": "batch"}, files=files)
            options = {"input_file_id": stored["id"], "endpoint": path, "completion_window": "24h"}
            batch = service.request("POST", "/v1/batches", f"batch {run}", json=options)
            time.sleep(rng.uniform(0.0, 3.0))
            service.kill()
            service.start()
            deadline = time.monotonic() + END_SECONDS
            while batch["status"] not in ("completed", "failed") and time.monotonic() < deadline:
                time.sleep(0.2)
                batch = service.request("GET", f"/v1/batches/{batch['id']}")
            output = service.request("GET", f"/v1/files/{batch['output_file_id']}/content").decode().splitlines()
            ids = Counter(json.loads(line)["custom_id"] for line in output)
            result.runs += 1
            result.wanted += BATCH_LINES
            result.done_once += sum(count == 1 for count in ids.values())
            result.same_result += sum(json.loads(line)["response"]["status_code"] == 200 for line in output)
            result.repeated += sum(count - 1 for count in ids.values())
    result.seconds = (time.perf_counter() - start) / max(1, runs)
    return result


# ---------------------------------------------------------------- webhooks


class Receiver:
    """An HTTP server that counts the events that it gets, by their id."""

    def __init__(self) -> None:
        counts: Counter[str] = Counter()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                counts[f"{self.headers['webhook-id']} {body['data']['id']}"] += 1
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.counts = counts
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def kill_webhooks(folder: Path, runs: int, rng: random.Random) -> FaultResult:
    """Kill the process while clips end and their events are sent; an event may be sent again, under the same id."""
    result, start, receiver = FaultResult("webhooks"), time.perf_counter(), Receiver()
    with run_embedded(folder) as service:
        service.request("POST", "/v1/webhooks", "hook", json={"url": receiver.address, "name": "a"})
        for run in range(runs):
            body = {"prompt": "a red ball", "num_inference_steps": 2}
            ids = {
                service.request("POST", "/v1/videos", f"clip {run} {number}", json=body | {"seed": number})["id"]
                for number in range(HOOKED_CLIPS)
            }
            time.sleep(rng.uniform(0.0, 3.0))
            service.kill()
            service.start()
            deadline = time.monotonic() + END_SECONDS
            while time.monotonic() < deadline:
                received = [key.split()[1] for key in list(receiver.counts)]
                if ids <= set(received):
                    break
                time.sleep(0.2)
            received = [key.split()[1] for key in list(receiver.counts)]
            result.runs += 1
            result.wanted += len(ids)
            result.done_once += sum(received.count(job_id) == 1 for job_id in ids)  # under one id
        result.same_result = result.done_once
        result.repeated = sum(count - 1 for count in receiver.counts.values())
    receiver.server.shutdown()
    receiver.server.server_close()
    result.seconds = (time.perf_counter() - start) / max(1, runs)
    return result

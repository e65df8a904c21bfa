"""LangSmith's variables, set for other work, send nothing of a conversation."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.langchain import wait_for_all_tracers
from langgraph.checkpoint.memory import InMemorySaver
from langsmith.utils import get_env_var, tracing_is_enabled

from omnivideo.agent.graph import Planner
from omnivideo.agent.thread import Thread
from omnivideo.presets import TINY
from tests.support.twins import InstantQueue, ScriptedMLLM

ROOT = Path(__file__).parents[2]


class TraceHandler(BaseHTTPRequestHandler):
    """Answers as LangSmith's server does to what is sent to it."""

    def do_GET(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_PATCH = do_GET

    def log_message(self, *_: object) -> None:
        """Write nothing."""


@pytest.fixture
def trace_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """Yield a server that the environment names as LangSmith's."""
    server = HTTPServer(("127.0.0.1", 0), TraceHandler)
    server.bodies = []
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("LANGSMITH_TRACING", "true")
    monkeypatch.setenv("LANGSMITH_API_KEY", "key")
    monkeypatch.setenv("LANGSMITH_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    get_env_var.cache_clear()
    yield server
    wait_for_all_tracers()
    monkeypatch.undo()
    get_env_var.cache_clear()
    server.shutdown()
    server.server_close()


def test_a_conversation_is_not_sent_to_langsmith(trace_server: HTTPServer) -> None:
    graph = Planner(ScriptedMLLM(), InstantQueue(), TINY).build_graph(InMemorySaver())
    thread = Thread(graph, "talk", lambda path, made_by: pytest.fail("nothing is attached")).initialize_state()
    for _ in thread.send("a red ball; make it blue"):
        assert tracing_is_enabled()  # the caller's own tracing goes on
    thread.fork(1, "branch")
    wait_for_all_tracers()
    assert trace_server.bodies == []
    RunnableLambda(lambda text: text).invoke("the caller's own work")
    wait_for_all_tracers()
    assert trace_server.bodies  # this server would have received it


CONNECTIONS = """
import json, sys
connections = []

def record(event, arguments):
    if event == "socket.getaddrinfo" or event == "socket.connect" and not isinstance(arguments[1], (str, bytes)):
        connections.append([event, str(arguments[1] if event == "socket.connect" else arguments[0])])

sys.addaudithook(record)
from omnivideo import Studio

thread = Studio(weights=sys.argv[1], device="cpu").open_thread()
for event in thread.send("a red ball", steps=2):
    pass
print(json.dumps(connections))
"""


def test_a_studio_connects_to_nothing(weights: Path, tmp_path: Path) -> None:
    """No dependency reports what is done here, also with every switch of tracing on."""
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "OMNIVIDEO_HOME": str(tmp_path / "home"),
        "LANGSMITH_TRACING": "true", "LANGCHAIN_TRACING_V2": "true", "LANGSMITH_API_KEY": "key",
        "LANGSMITH_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
    }  # fmt: skip
    command = [sys.executable, "-c", CONNECTIONS, str(weights)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == []

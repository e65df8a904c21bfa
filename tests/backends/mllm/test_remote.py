"""The MLLM gives the same answers over HTTP as in this process."""

import subprocess
import sys

import httpx
import pytest
from opentelemetry import trace

from omnivideo.backends.decoder.renderer import Renderer
from omnivideo.backends.mllm import remote
from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.remote import RemoteMLLM
from omnivideo.backends.mllm.server import LRUObjectStore
from omnivideo.contracts import Artifact, MLLMRequest
from omnivideo.errors import ModelUnavailable
from omnivideo.settings import load_settings
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.storage.objects.memory import MemoryObjectStore
from omnivideo.wiring import ServiceWiring
from tests.support.api_server import run_api_server, run_mllm_server
from tests.support.servers import free_port
from tests.support.spans import collect_spans, find_spans
from tests.support.twins import MLLMWithScriptedText


@pytest.fixture(scope="module")
def local(omni, tmp_path_factory):
    return LocalMLLM(omni, LocalObjectStore(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def requests(local):
    from PIL import Image

    path = local.store.folder / "red.png"
    Image.new("RGB", (64, 64), "red").save(path)
    key = local.store.put(path.read_bytes(), "png")
    image = Artifact(key=key, medium="image", width=64, height=64, frames=1, fps=1.0, caption="red", created_by="test")
    return [
        MLLMRequest(text="a red ball"),
        MLLMRequest(text="what is this?", artifacts=(image,)),
        MLLMRequest(text="a coin", system="think"),
    ]


def test_answers_over_http_and_in_process_are_equal(local, requests):
    port = free_port()
    with run_mllm_server(local, port):
        client = RemoteMLLM(f"http://127.0.0.1:{port}", local.store)
        for request in requests:
            assert client.route(request) == local.route(request)
            assert "".join(client.stream_text(request)) == "".join(local.stream_text(request))
            assert client.score_agreement(request) == local.score_agreement(request)
            assert client.count_tokens(request.text) == local.count_tokens(request.text) > 0
            assert client.predict_visual_tokens(request, "video") == local.predict_visual_tokens(request, "video")
        client.close()


def test_a_trace_crosses_to_the_server(local, requests):
    collect_spans()
    port = free_port()
    with run_mllm_server(local, port):
        client = RemoteMLLM(f"http://127.0.0.1:{port}", local.store)
        with trace.get_tracer("test").start_as_current_span("caller") as caller:
            client.predict_visual_tokens(requests[0], "video")
            list(client.stream_text(requests[0]))
        assert "omnivideo_language_model_tokens_total" in client.fetch_metrics()
        client.close()
    spans = find_spans(caller.get_span_context().trace_id)
    for path in ("/v1/visual_tokens", "/v1/write"):
        assert spans[f"ask the language model {path}"] == spans[f"language model {path}"] == 1


def test_a_server_with_a_key_answers_nobody_without_it(local, requests):
    port, key = free_port(), "a key of the operator"
    address = f"http://127.0.0.1:{port}"
    with run_mllm_server(local, port, key):
        client, stranger = RemoteMLLM(address, local.store, key=key), RemoteMLLM(address, local.store)
        assert client.route(requests[0]) == local.route(requests[0]) and client.fetch_metrics()
        for ask in (stranger.route, stranger.score_agreement, lambda request: list(stranger.stream_text(request))):
            with pytest.raises(ModelUnavailable, match="refuses the key; give both processes the same OMNIVIDEO_MLLM"):
                ask(requests[0])
        for path in ("/metrics", "/v1/tokens", "/openapi.json"):
            assert httpx.get(f"{address}{path}", trust_env=False).status_code == 401
        for path in ("/health", "/ready"):
            assert httpx.get(f"{address}{path}", trust_env=False).status_code == 200
        client.close()
        stranger.close()


class FailingMLLM(LocalMLLM):
    """A model that has been loaded and fails at its first requests."""

    failures_left = 2

    def route(self, request: MLLMRequest):
        if self.failures_left:
            self.failures_left -= 1
            raise RuntimeError("no C++ compiler")
        return super().route(request)


def test_a_server_is_ready_once_it_has_routed_a_request(local, caplog):
    port = free_port()
    with run_mllm_server(FailingMLLM(local.omni, local.store), port):
        address = f"http://127.0.0.1:{port}"
        statuses = [httpx.get(f"{address}/ready", trust_env=False).status_code for _ in range(4)]
        assert statuses == [503, 503, 200, 200]
        assert httpx.get(f"{address}/health", trust_env=False).status_code == 200
    assert caplog.text.count("the first request failed: RuntimeError") == 2


class BreakingMLLM(LocalMLLM):
    """A model that fails in the middle of its first answer."""

    broken = False

    def stream_text(self, request: MLLMRequest):
        for index, piece in enumerate(super().stream_text(request)):
            if index == 3 and not self.broken:
                self.broken = True
                raise RuntimeError("the server fails")
            yield piece


def test_an_interrupted_answer_is_continued_without_repetition(local, requests, caplog):
    port, breaking = free_port(), BreakingMLLM(local.omni, local.store)
    with run_mllm_server(breaking, port):
        client = RemoteMLLM(f"http://127.0.0.1:{port}", local.store)
        assert "".join(client.stream_text(requests[0])) == "".join(local.stream_text(requests[0]))
        client.close()
    assert breaking.broken


def test_an_unavailable_model_is_an_error(requests, monkeypatch):
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 2)
    client = RemoteMLLM(f"http://127.0.0.1:{free_port()}", MemoryObjectStore())
    with pytest.raises(ModelUnavailable, match="the language model is starting or unavailable"):
        client.route(requests[0])
    with pytest.raises(ModelUnavailable):
        list(client.stream_text(requests[0]))
    client.close()


def start_turn(http: httpx.Client, text: str) -> str:
    """Start a turn in a new thread and return its path."""
    thread = http.post("/v1/threads").json()["id"]
    return f"/v1/threads/{thread}/turns/" + http.post(f"/v1/threads/{thread}/turns", json={"text": text}).json()["id"]


def test_a_turn_waits_for_a_language_model_that_is_starting(omni, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 1)
    port = free_port()
    wiring = ServiceWiring(load_settings(home=tmp_path, mllm=f"http://127.0.0.1:{port}"), "cpu")
    wiring.renderer = Renderer(omni, wiring.store, "random")  # type: ignore[misc]
    with run_api_server(wiring) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as http:
        assert http.get("/ready").json() == {"status": "ready", "language_model": "starting"}
        assert "omnivideo_language_model_up 0.0" in http.get("/metrics").text
        turn = start_turn(http, "how are you?")
        with http.stream("GET", f"{turn}/events") as events:
            lines = (line for line in events.iter_lines() if line.startswith("event: "))
            assert "event: waiting" in lines, "it is told before the answer"
            with run_mllm_server(MLLMWithScriptedText(omni, LRUObjectStore()), port):
                assert "event: waiting" not in (events_after := list(lines)) and events_after[-1] == "event: done"
                assert http.get("/ready").json()["language_model"] == "ready"
                assert "omnivideo_language_model_up 1.0" in http.get("/metrics").text
        assert http.get(turn).json()["state"] == "done"


def test_an_api_process_loads_no_torch(tmp_path):
    """An API process whose MLLM and workers run elsewhere."""
    program = f"""
import os, sys
os.environ.update(OMNIVIDEO_HOME={str(tmp_path)!r}, OMNIVIDEO_MLLM="http://127.0.0.1:9", OMNIVIDEO_BROKER="redis://127.0.0.1:9/0")
from omnivideo.cli.service import build_wiring
from omnivideo.api.app import create_app
wiring = build_wiring()
create_app(wiring.build_service_context())
wiring.close()
print(sorted(name for name in ("torch", "transformers", "diffusers", "safetensors") if name in sys.modules))
"""
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    assert completed.stdout.strip() == "[]"


def test_a_sweep_loads_no_model(tmp_path):
    """It took 530 MB and several seconds, for an MLLM that it asks nothing."""
    program = f"""
import sys
from omnivideo.cli.service import sweep
sweep({str(tmp_path)!r})
print("torch" in sys.modules)
"""
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    assert completed.stdout.split() == ["0", "artifacts", "removed", "False"]

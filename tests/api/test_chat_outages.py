"""The MLLM's server is dead or hangs: the client hears of it, and the request continues or fails with a status."""

import json
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from omnivideo.api import event_feed
from omnivideo.api.answers import answer
from omnivideo.api.routes import chat, responses
from omnivideo.backends.decoder.renderer import Renderer
from omnivideo.backends.mllm import remote
from omnivideo.contracts import MLLMRequest
from omnivideo.settings import load_settings
from omnivideo.wiring import ServiceWiring
from tests.support.api_server import run_api_server, run_mllm_server
from tests.support.servers import free_port
from tests.support.twins import MLLMWithScriptedText

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "how are you?"}], "stream": True}


class HangingMLLM(MLLMWithScriptedText):
    """Answers with one piece and then says nothing more, until `resumes` is set."""

    def __init__(self, *args):
        super().__init__(*args)
        self.resumes = threading.Event()

    def stream_text(self, request: MLLMRequest):
        for index, piece in enumerate(super().stream_text(request)):
            if index == 1:
                self.resumes.wait(100)
            yield piece


@contextmanager
def run_service_with_remote_mllm(omni, folder, port: int, **settings):
    wiring = ServiceWiring(load_settings(home=folder, mllm=f"http://127.0.0.1:{port}", **settings), "cpu")
    wiring.renderer = Renderer(omni, wiring.store, "random")  # type: ignore[misc]
    with run_api_server(wiring) as address, httpx.Client(base_url=address, timeout=90, trust_env=False) as http:
        yield http, wiring.store


def follow(http, path: str = "/v1/chat/completions", body: dict = CHAT, on_news=lambda text: None):
    """Return the stream's events with the seconds after which each came."""
    events, started_at = [], time.monotonic()
    with http.stream("POST", path, json=body) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                events.append((time.monotonic() - started_at, json.loads(line[6:])))
                if news := read_delta(events[-1][1], "reasoning_content"):
                    on_news(news)
    return events


def read_delta(event: dict, name: str = "content") -> str:
    return "".join(choice["delta"].get(name) or "" for choice in event.get("choices", []))


def shorten_waits(monkeypatch, retry_timeout_seconds: float) -> dict:
    """Wait a tenth as long as the service does. Return the settings."""
    for module in (chat, responses):
        monkeypatch.setattr(module, "ATTENDED_RETRY_TIMEOUT_SECONDS", retry_timeout_seconds)
        monkeypatch.setattr(module, "IDLE_SECONDS", 0.6)
    monkeypatch.setattr(event_feed, "BEGINNING_TIMEOUT_SECONDS", 3.0)
    return {"mllm_timeout_seconds": 1.5}


def test_an_answer_continues_without_repetition_after_the_server_hung(omni, tmp_path, monkeypatch):
    settings, port = shorten_waits(monkeypatch, 20), free_port()
    with run_service_with_remote_mllm(omni, tmp_path, port, **settings) as (http, store):
        mllm = HangingMLLM(omni, store)
        with run_mllm_server(mllm, port):
            events = follow(http, on_news=lambda news: mllm.resumes.set() if "does not answer" in news else None)
    assert "".join(read_delta(event) for _, event in events) == "it is me"
    assert events[-1][1]["choices"][0]["finish_reason"] == "stop"
    news = "".join(read_delta(event, "reasoning_content") for _, event in events)
    assert "no news for" in news and remote.HANGING_MESSAGE in news


@pytest.mark.parametrize("is_dead", [False, True], ids=["hangs", "dead"])
def test_an_outage_ends_with_an_error(omni, tmp_path, monkeypatch, is_dead):
    settings, port = shorten_waits(monkeypatch, 5), free_port()
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 2)
    with run_service_with_remote_mllm(omni, tmp_path, port, **settings) as (http, store):
        heard_within = 6 if is_dead else 3  # with a status, or in the stream
        check_outage(http, HangingMLLM(omni, store), port, is_dead, heard_within, ended_within=8)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("is_dead", [False, True], ids=["hangs", "dead"])
def test_an_outage_ends_with_an_error_within_a_minute(omni, tmp_path, is_dead):
    """With the service's own waits: heard of within 15 s, and ended within 60 s."""
    port = free_port()
    with run_service_with_remote_mllm(omni, tmp_path, port) as (http, store):
        assert answer.IDLE_SECONDS < 15 and event_feed.BEGINNING_TIMEOUT_SECONDS < 15
        check_outage(http, HangingMLLM(omni, store), port, is_dead, heard_within=15, ended_within=60)


def check_outage(http, mllm, port: int, is_dead: bool, heard_within: float, ended_within: float) -> None:
    if is_dead:
        # Nothing has been said yet, so streams have the status of the error too.
        for path, body in (
            ("/v1/chat/completions", CHAT), ("/v1/chat/completions", CHAT | {"stream": False}),
            ("/v1/responses", {"model": "tiny", "input": "how are you?", "stream": True}),
        ):  # fmt: skip
            refused = http.post(path, json=body)
            assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
            assert (
                refused.json()["error"]["type"] == "server_error" and refused.json()["error"]["code"] == "unavailable"
            )
            assert refused.elapsed.total_seconds() < (heard_within if body.get("stream") else ended_within)
        return
    with run_mllm_server(mllm, port):
        events = follow(http)
        mllm.resumes.set()
    heard = next(seconds for seconds, event in events if read_delta(event, "reasoning_content"))
    ended, error = events[-1]
    assert heard < heard_within and ended < ended_within
    assert error["error"]["status"] == 503 and error["error"]["code"] == "unavailable"
    assert error["error"]["retry_after"] == 5

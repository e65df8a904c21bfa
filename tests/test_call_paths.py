"""Count the files on the call paths that must stay short; see architecture.md."""

import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from omnivideo.backends.decoder import pipeline
from omnivideo.backends.decoder.pipeline import DenoisingProgress
from omnivideo.backends.decoder.worker import Worker
from omnivideo.contracts import Claim, SamplingParams
from omnivideo.errors import InvalidInput
from omnivideo.models.omni import OmniVideoModel
from omnivideo.presets import get_preset
from omnivideo.settings import load_settings
from omnivideo.training.data.latent_cache import FrozenEncoders, encode_shards
from omnivideo.training.engine.trainer import Trainer
from omnivideo.training.recipes.flow import build_flow_recipe
from omnivideo.wiring import ServiceWiring
from tests.support.api_server import build_scripted_wiring, run_api_server
from tests.support.call_paths import Window, record_calls
from tests.support.shards import ASSIGNER, SAMPLES, make_flow_dataset, write_dataset
from tests.support.slow_polls import slow_polls

# Threads that look after jobs and turns; they run beside every call path.
UPKEEP_THREADS = (
    "heartbeat", "reaper", "turns", "turns-heartbeat", "batches", "batches-beat", "hooks", "worker-report"
)  # fmt: skip
CONNECTION_SETUP_FILE = "storage/database/engine.py"  # runs once for each connection of the pool
MAX_FILES_FROM_STEP_TO_BROWSER = 6
# 31 before the published models, 35 before chats of every client's form: eight files read messages and find the thread,
# two decide links and sampling, three are the planner's limits, media and edges, one is the wait for a client. Two more
# hold requests to trained shapes and to the models' tokens, seven read the words of the small world, and the others
# bound bodies and clients, place the model's parts and compact checkpoints. Three more say what the
# request's key may do and use.
MAX_FILES_FROM_PROMPT_TO_PIXELS = 67
# The goal is 18. The reader of clips in media/, which serving shares, takes five files; the model takes seven.
MAX_FILES_FROM_SAMPLE_TO_LOSS = 28


def test_the_recorder_counts_functions_of_threads_and_children(tmp_path: Path) -> None:
    script = "import sys; from omnivideo.errors import InvalidInput; sys.stdin.readline(); str(InvalidInput('a', 'b'))"
    with record_calls(tmp_path) as recorder:
        get_preset("tiny")
        child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
        with recorder.open_window() as first:
            thread = threading.Thread(target=get_preset, args=("tiny",), name="reader")
            thread.start()
            thread.join()
            child.communicate(b"\n")
        with recorder.open_window() as second:
            InvalidInput("name", "problem")
        get_preset("tiny")
    assert child.returncode == 0
    assert first.list_files() == ["errors.py", "presets/__init__.py"], first.describe()
    assert first.list_files(ignored_threads=["reader"]) == ["errors.py"]
    assert len({call.process_id for call in first.list_calls()}) == 2
    assert second.list_files() == ["errors.py"], second.describe()


def test_a_step_reaches_the_browser_through_few_files(
    omni: OmniVideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker waits in its second step, inside the window, until the browser has the step's bytes."""
    report_step, windows, received = Worker.report_step, list[Window](), threading.Event()

    def report_step_in_window(
        worker: Worker, claim: Claim, params: SamplingParams, progress: DenoisingProgress, save_due: bool
    ) -> None:
        if progress.step.step != 2:
            report_step(worker, claim, params, progress, save_due)
            return
        with recorder.open_window() as window:
            report_step(worker, claim, params, progress, save_due)
            assert received.wait(30)
        windows.append(window)

    monkeypatch.setattr(Worker, "report_step", report_step_in_window)
    with slow_polls(), record_calls(tmp_path / "calls") as recorder:
        wiring = build_scripted_wiring(tmp_path / "home", omni)
        with run_api_server(wiring) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as http:
            thread_id = http.post("/v1/threads").json()["id"]
            turn = http.post(f"/v1/threads/{thread_id}/turns", json={"text": "a red ball", "steps": 8}).json()
            with http.stream("GET", f"/v1/threads/{thread_id}/turns/{turn['id']}/events") as stream:
                for line in stream.iter_lines():
                    if line.startswith('data: {"kind": "step", "step": 2,'):
                        received.set()
    (window,) = windows
    files = window.list_files(UPKEEP_THREADS)
    assert "backends/decoder/worker.py" in files and "api/event_feed.py" in files
    assert len(files) <= MAX_FILES_FROM_STEP_TO_BROWSER, window.describe(UPKEEP_THREADS)


def test_a_sample_of_a_shard_reaches_the_loss_in_few_files(weights: Path, tmp_path: Path) -> None:
    """Count a step of stage 3 over a shard with its cache, from the sample's bytes to the loss and its gradients."""
    clip, edit = SAMPLES[5], SAMPLES[7]
    dataset = write_dataset(tmp_path / "shards", [clip, edit])
    encode_shards(dataset, FrozenEncoders.load(weights, "cpu"), ASSIGNER, lambda done, count: None)
    source = make_flow_dataset(dataset, weights)
    trainer = Trainer(
        build_flow_recipe("stage3", source.omni, source, 1, lr=1e-4, alignment_weight=0.1), tmp_path / "run"
    )
    with record_calls(tmp_path / "calls") as recorder, recorder.open_window() as window:
        losses = trainer.accumulate_gradients()
    assert {"clips", "clips edited", "vision"} <= losses.keys()
    assert len(window.list_files()) <= MAX_FILES_FROM_SAMPLE_TO_LOSS, window.describe()


def test_a_prompt_becomes_pixels_through_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count from the request of a chat to its decoded frames, in the embedded service with the shipped weights.

    The goal is 18; docs/architecture.md says why it is not reached. A first request opens the database's
    connections and is not counted. On a busy machine the second one may need one connection more.
    """
    decode_clip, decoded = pipeline.decode_clip, threading.Event()

    def decode_and_wait(*arguments: Any) -> Any:
        frames = decode_clip(*arguments)
        decoded.set()
        assert closed.wait(60)
        return frames

    closed = threading.Event()
    monkeypatch.setattr(pipeline, "decode_clip", decode_and_wait)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # another test may have left those of a service
    with record_calls(tmp_path / "calls") as recorder:
        wiring = ServiceWiring(load_settings(home=tmp_path / "home"), "cpu")
        with run_api_server(wiring) as address, httpx.Client(base_url=address, timeout=120, trust_env=False) as http:
            closed.set()
            ask_for_clip(http, "a blue square moving left")
            decoded.clear(), closed.clear()
            with ThreadPoolExecutor(1) as executor:
                with recorder.open_window() as window:
                    answer = executor.submit(ask_for_clip, http, "a red circle moving right")
                    assert decoded.wait(60)
                closed.set()
                answer.result()
    files = [path for path in window.list_files(UPKEEP_THREADS) if path != CONNECTION_SETUP_FILE]
    assert "api/routes/chat.py" in files and "models/sampling.py" in files
    assert len(files) <= MAX_FILES_FROM_PROMPT_TO_PIXELS, window.describe(UPKEEP_THREADS)


def ask_for_clip(http: httpx.Client, text: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "steps": 2}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert ".mp4" in response.text

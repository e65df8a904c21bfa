"""The published models as whole services of golden size: a chat with a generation, an edit and a question.

The MLLM's server, the API, the broker, the database, the store and the worker are real. The worker is killed in the
later steps of a clip, which are the second expert's where there are two, and another one resumes it to the same bytes.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.server import LRUObjectStore
from omnivideo.contracts import JobStatus
from omnivideo.manifests import Manifest
from omnivideo.models import qwen3_vl
from omnivideo.models.sampling import create_scheduler
from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.digests import compute_folder_digest
from omnivideo.presets import PRESETS
from omnivideo.settings import load_settings
from omnivideo.wiring import ServiceWiring
from tests.support.api_server import run_api_server, run_mllm_server
from tests.support.golden_service import SERVICE_PRESETS, build_service_preset, import_service_weights, run_command
from tests.support.servers import free_port, redis
from tests.support.vllm_server import Server

pytestmark = [pytest.mark.golden, pytest.mark.timeout(900)]
STEPS, LATE_STEP = 60, 40


class PublishedService:
    """The API in this process, with a worker in another one that can be killed."""

    def __init__(self, kind: str, home: Path, weights: Path, mllm: str, broker: str):
        self.home, self.weights, self.preset = home, weights, build_service_preset(kind)
        self.settings = {
            "OMNIVIDEO_HOME": str(home), "OMNIVIDEO_WEIGHTS": str(weights), "OMNIVIDEO_PRESET": self.preset.name,
            "OMNIVIDEO_MLLM": mllm, "OMNIVIDEO_BROKER": broker, "OMNIVIDEO_HEARTBEAT_TIMEOUT": "2",
            "OMNIVIDEO_SAVE_STATE_EVERY_STEPS": "2", "OMNIVIDEO_SAVE_STATE_EVERY_SECONDS": "0",
        }  # fmt: skip
        options = {name.removeprefix("OMNIVIDEO_").lower(): value for name, value in self.settings.items()}
        self.wiring = ServiceWiring(load_settings(**options), "cpu")
        self.workers: list[subprocess.Popen[bytes]] = []

    def start_worker(self) -> None:
        log = self.home / f"worker{len(self.workers)}.log"
        self.workers.append(run_command("worker", "--device", "cpu", log=log, **self.settings))

    def kill_worker(self) -> None:
        os.killpg(self.workers[-1].pid, signal.SIGKILL)
        self.workers[-1].wait()

    def read_logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.home.glob("worker*.log")))

    def find_running_job(self) -> JobStatus | None:
        statuses, _ = self.wiring.jobs.list_owned_jobs("local", "turn", None, 20, newest_first=True)
        return next((status for status in statuses if status.state in ("queued", "running")), None)

    def kill_worker_late(self) -> str:
        """Kill the worker in the late steps of the running job, start another one, and return the job's id."""
        deadline = time.monotonic() + 120
        while (status := self.find_running_job()) is None or status.step < LATE_STEP:
            assert time.monotonic() < deadline, self.read_logs()[-3000:]
            time.sleep(0.005)
        self.kill_worker()
        assert self.wiring.jobs.get_status(status.id).state == "running"  # it was killed before the end
        self.start_worker()
        return status.id

    def render_undisturbed(self, job_id: str) -> JobStatus:
        """Render a job again under another id, without a fault."""
        job = self.wiring.jobs.get_status(job_id).job.model_copy(update={"id": f"undisturbed {job_id}"})
        self.wiring.jobs.submit(job)
        self.wiring.notify_workers()
        deadline = time.monotonic() + 120
        while (status := self.wiring.jobs.get_status(job.id)).state in ("queued", "running"):
            assert time.monotonic() < deadline, self.read_logs()[-3000:]
            time.sleep(0.05)
        return status

    def read_manifest(self, status: JobStatus) -> Manifest:
        return Manifest.model_validate_json(self.wiring.store.get(status.result.manifest))


@contextmanager
def run_published_service(kind: str, folder: Path, weights: Path, mllm: str) -> Iterator[tuple[PublishedService, str]]:
    with pytest.MonkeyPatch.context() as patch, redis(folder / "broker") as broker:
        preset = build_service_preset(kind)
        patch.setitem(PRESETS, preset.name, preset)
        service = PublishedService(kind, folder / "home", weights, mllm, broker)
        try:
            with run_api_server(service.wiring) as address:
                service.start_worker()
                yield service, address
        finally:
            for worker in service.workers:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()


class Chat:
    """A thread of the service. A turn's questions are answered with the same reply, until it ends."""

    def __init__(self, http: httpx.Client):
        self.http = http
        self.path = f"/v1/threads/{http.post('/v1/threads').raise_for_status().json()['id']}/turns"

    def start_turn(self, text: str) -> str:
        body = {"text": text, "steps": STEPS, "seed": 7, "think": "off"}
        return self.http.post(self.path, json=body).raise_for_status().json()["id"]

    def wait_for_turn(self, turn_id: str) -> dict:
        deadline = time.monotonic() + 300
        while (turn := self.http.get(f"{self.path}/{turn_id}").json())["state"] in ("queued", "running"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return turn

    def send(self, text: str, reply: str, kill_worker=lambda: None) -> tuple[dict, str | None]:
        """Return the finished turn's only result, and what `kill_worker` returned."""
        turn = self.wait_for_turn(self.start_turn(text))
        assert turn["state"] == "asks", turn  # no route of these MLLMs is likely
        turn_id = self.start_turn(reply)
        job_id = kill_worker()
        turn = self.wait_for_turn(turn_id)
        assert turn["state"] == "done", turn
        (result,) = turn["turn"]["results"]
        return result, job_id


def check_chat(service: PublishedService, address: str, kills_in_edit: bool) -> None:
    """Generate a clip, edit it and ask about it, with kills, and compare with undisturbed clips."""
    with httpx.Client(base_url=address, timeout=120, trust_env=False) as http:
        chat = Chat(http)
        made, job_id = chat.send("a red ball rolls", "a clip", service.kill_worker_late)
        kill_worker = service.kill_worker_late if kills_in_edit else lambda: None
        edited, edit_id = chat.send("make it blue", "a clip", kill_worker)
        answered, _ = chat.send("what does it do?", "in words")
        places = [line for line in http.get("/metrics").text.splitlines() if line.startswith("omnivideo_part_bytes{")]
    # The worker reports its parts; the MLLM runs elsewhere.
    assert any('part="decoder"' in line for line in places) and not any('part="mllm"' in line for line in places)
    assert all(f'preset="{service.preset.name}"' in line and 'location="cpu"' in line for line in places)
    assert [result["goal"] for result in (made, edited, answered)] == ["generate", "edit", "understand"]
    assert edited["artifact"]["source"] == made["artifact"]["key"] and answered["answer"]
    for interrupted_id in filter(None, (job_id, edit_id)):
        interrupted, whole = service.wiring.jobs.get_status(interrupted_id), service.render_undisturbed(interrupted_id)
        assert (interrupted.state, interrupted.attempt, whole.state, whole.attempt) == ("done", 2, "done", 1)
        assert f"job {interrupted_id}: attempt 2 continues" in service.read_logs()
        assert (interrupted.result.key, interrupted.result.latents) == (whole.result.key, whole.result.latents)
        manifest = service.read_manifest(interrupted)
        digest = compute_folder_digest(service.weights).value
        assert (manifest.preset, manifest.weights) == (service.preset.name, digest)
        assert manifest.precision.startswith("preset")  # and where the CPU is slow in bf16, what it computes in


@contextmanager
def run_service_on_vllm(kind: str, folder: Path, vllm_python: str) -> Iterator[tuple[PublishedService, str]]:
    weights = import_service_weights(kind, folder)
    server = Server(vllm_python, weights, folder, free_port())
    server.environment |= {SERVICE_PRESETS: "1"}
    server.start()
    try:
        server.wait(900)
        with run_published_service(kind, folder, weights, server.address) as service:
            yield service
    finally:
        server.stop()


def test_a_chat_with_one_expert_survives_a_killed_worker(vllm_python, tmp_path):
    with run_service_on_vllm("single", tmp_path, vllm_python) as (service, address):
        check_chat(service, address, kills_in_edit=False)


@pytest.mark.parametrize("kind", ["v1", "single", "experts"])
def test_a_chat_with_the_mllm_on_vllm_survives_killed_workers(kind, vllm_python, tmp_path):
    with run_service_on_vllm(kind, tmp_path, vllm_python) as (service, address):
        check_chat(service, address, kills_in_edit=True)


def test_a_chat_with_two_experts_survives_a_killed_worker(tmp_path, monkeypatch):
    """The MLLM runs on our own server, which starts faster than vLLM."""
    kind, port = "experts", free_port()
    weights = import_service_weights(kind, tmp_path)
    preset = build_service_preset(kind)
    monkeypatch.setitem(PRESETS, preset.name, preset)
    monkeypatch.setattr(qwen3_vl, "MAX_CAPTION_TOKENS", 24)  # random weights never end a caption
    mllm = LocalMLLM(checkpoint.load(weights, precision="float32"), LRUObjectStore())
    with (
        run_mllm_server(mllm, port),
        run_published_service(kind, tmp_path, weights, f"http://127.0.0.1:{port}") as (service, address),
    ):
        check_chat(service, address, kills_in_edit=False)


def test_the_late_steps_are_the_second_experts():
    timesteps = create_scheduler(STEPS, 5.0).timesteps
    boundary = build_service_preset("experts").experts.boundary
    assert torch.all(timesteps[LATE_STEP:] < boundary) and timesteps[0] >= boundary

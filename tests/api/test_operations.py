"""What an operator sees of a request: its id, its trace down to the worker's steps, and its metrics."""

import logging
import re
import subprocess
import time
import uuid

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from omnivideo.api.routes.operations import MLLMCollector, MLLMServerCollector
from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.remote import RemoteMLLM
from omnivideo.backends.mllm.server import LRUObjectStore
from omnivideo.models.weights import checkpoint
from omnivideo.settings import load_settings
from omnivideo.storage.database.engine import create_database_engine
from omnivideo.storage.database.workers import WorkerRepository
from omnivideo.wiring import ServiceWiring
from tests.support.api_server import build_scripted_wiring, run_api_server, run_mllm_server
from tests.support.browser import chromium
from tests.support.openai_service import KEY, wait_until
from tests.support.servers import free_port
from tests.support.spans import collect_spans, find_spans

MODEL_LABELS = ("preset", "weights", "precision")
PART_LABELS = ("part", "location", "dtype", "compute_dtype")


@pytest.fixture(scope="module")
def spans():
    return collect_spans()


def generate_clip(http, steps: int = 3) -> str:
    body = {"prompt": "a red ball", "num_inference_steps": steps, "num_frames": 5, "size": "32x32"}
    response = http.post("/v1/videos", json=body)
    assert response.status_code == 200 and len(response.headers["x-request-id"]) == 32
    video_id = response.json()["id"]
    wait_until(lambda: http.get(f"/v1/videos/{video_id}").json()["status"] == "completed")
    return response.headers["x-request-id"]


def test_a_trace_covers_the_request_and_the_workers_steps(spans, http):
    request_id = generate_clip(http, steps=3)
    time.sleep(0.2)
    finished_spans = spans.get_finished_spans()
    (request,) = [span for span in finished_spans if span.attributes.get("request_id") == request_id]
    assert request.name == "POST /v1/videos"
    trace_spans = [span for span in finished_spans if span.context.trace_id == request.context.trace_id]
    (job,) = [span for span in trace_spans if span.name == "job"]
    assert job.parent.span_id in {span.context.span_id for span in trace_spans}
    steps = [span.attributes["step"] for span in trace_spans if span.name == "denoising step"]
    assert sorted(steps) == [1, 2, 3]


def test_a_callers_trace_is_continued(spans, service):
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    httpx.get(f"{service[2]}/health", headers={"traceparent": caller}, trust_env=False)
    assert any(f"{span.context.trace_id:032x}" == caller.split("-")[1] for span in spans.get_finished_spans())


def test_metrics_count_requests_by_route_and_jobs_by_state(http):
    generate_clip(http)
    text = http.get("/metrics").text
    assert 'omnivideo_request_seconds_count{method="GET",route="/v1/videos/{video_id}",status="200"}' in text
    assert 'omnivideo_jobs_ended_total{lane="interactive",state="done"}' in text
    assert "omnivideo_database_up 1.0" in text and KEY not in text


def test_metrics_measure_queue_and_generation_times_steps_and_the_language_model(http):
    generate_clip(http, steps=3)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }
    for name in ("omnivideo_job_queue_seconds", "omnivideo_job_generation_seconds"):
        counts = [value for (sample, *labels), value in samples.items() if sample == f"{name}_bucket"]
        assert counts == sorted(counts) and counts[-1] == samples[f"{name}_count", "interactive"] >= 1
        assert samples[f"{name}_sum", "interactive"] > 0
    done = samples["omnivideo_jobs_ended_total", "interactive", "done"]
    assert samples["omnivideo_job_generation_seconds_count", "interactive"] == done
    assert samples["omnivideo_denoising_steps_total", "interactive"] >= 3
    assert {"omnivideo_language_model_tokens_total", "omnivideo_language_model_cache_requests_total"} <= {
        name for name, *_ in samples
    }


def test_a_trace_of_a_turn_crosses_its_threads(spans, http):
    trace_id = uuid.uuid4().hex
    caller = f"00-{trace_id}-b7ad6b7169203331-01"
    thread_id = http.post("/v1/threads").json()["id"]
    body = {"text": "a red ball", "steps": 2}
    turn = http.post(f"/v1/threads/{thread_id}/turns", json=body, headers={"traceparent": caller}).json()
    wait_until(lambda: http.get(f"/v1/threads/{thread_id}/turns/{turn['id']}").json()["state"] == "done")
    time.sleep(0.2)
    expected = {"POST /v1/threads/{name}/turns", "turn", "job", "denoising step", "store result"}
    assert expected <= find_spans(int(trace_id, 16)).keys()


def test_the_documentation_loads_from_nowhere_else(http):
    page = http.get("/docs").text
    addresses = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", page)
    assert addresses and not [address for address in addresses if "//" in address]
    for address in addresses:
        assert http.get(f"/{address}").status_code == 200, address
    assert http.get("/docs/nothing.js").status_code == 404 and http.get("/redoc").status_code == 404


def test_an_unexpected_error_is_counted_and_logged_with_its_request(http, context, monkeypatch, caplog):
    def fail(*arguments: object) -> None:
        raise RuntimeError("a detail")

    monkeypatch.setattr(context.files, "list_files", fail)
    failed = http.get("/v1/files")
    assert failed.status_code == 500 and "a detail" not in failed.text
    assert 'omnivideo_request_seconds_count{method="GET",route="/v1/files",status="500"}' in http.get("/metrics").text
    (record,) = [record for record in caplog.records if failed.headers["x-request-id"] in record.getMessage()]
    assert record.exc_info and str(record.exc_info[1]) == "a detail"


def test_a_browser_shows_the_routes(omni, tmp_path):
    """The machine of the tests has no access to a CDN, nor has an operator's."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [chromium(), *options, "--virtual-time-budget=15000", "--dump-dom"]
    with run_api_server(build_scripted_wiring(tmp_path / "service", omni)) as address:  # without keys
        command += [f"{address}/docs"]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    paths = re.findall(r'data-path="([^"]+)"', dom)
    assert {"/v1/videos", "/v1/understand", "/v1/chat/completions"} <= set(paths)


def test_health_and_readiness(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready", "language_model": "ready"}


def read_gauge(text: str, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """Return the values of a metric by the values of its labels, which must be these."""
    (family,) = [family for family in text_string_to_metric_families(text) if family.name == name]
    assert all(sample.labels.keys() == set(labels) for sample in family.samples)
    return {tuple(sample.labels[label] for label in labels): sample.value for sample in family.samples}


def test_the_workers_report_where_their_parts_compute(weights, tmp_path, caplog):
    """The metrics, the log and the database of a running service agree with the placement of the loaded model."""
    caplog.set_level(logging.INFO, "omnivideo.wiring")
    home = tmp_path / "home"
    wiring = ServiceWiring(load_settings(home=home, weights=str(weights)), "cpu")
    with run_api_server(wiring) as address:
        (worker,) = wait_until(lambda: WorkerRepository(wiring.engine).list_workers(30))
        text = httpx.get(f"{address}/metrics", trust_env=False).text
    placement, model = wiring.renderer.omni.placement, wiring.renderer.model
    identity = (model.preset, model.weights, model.precision)
    assert read_gauge(text, "omnivideo_workers", *MODEL_LABELS, "placement") == {(*identity, "CPU"): 1}
    expected = {
        (*identity, part.size.name, "cpu", part.size.dtype, part.compute_dtype): part.size.weights_bytes
        for part in placement.parts
    }
    assert read_gauge(text, "omnivideo_part_bytes", *MODEL_LABELS, *PART_LABELS) == expected and len(expected) > 5
    assert f"placement of tiny: {placement.describe()}" in caplog.text
    assert worker.name not in text  # a host's name is for operators only
    assert WorkerRepository(create_database_engine(f"sqlite:///{home}/service.sqlite")).list_workers(30) == []


def test_the_server_of_the_mllm_reports_where_its_parts_compute(weights, tmp_path):
    """It has a metric of its own, which the API's metrics contain."""
    port = free_port()
    omni = checkpoint.load(weights, "cpu", contents="mllm")
    with run_mllm_server(LocalMLLM(omni, LRUObjectStore()), port):
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        server = RemoteMLLM(f"http://127.0.0.1:{port}", LRUObjectStore(), 10)
        (up,) = MLLMServerCollector(server).collect()
        families = {family.name: family for family in MLLMCollector(server.fetch_metrics).collect()}
        server.close()
    expected = {
        ("tiny", part.size.name, "cpu", part.size.dtype, part.compute_dtype): part.size.weights_bytes
        for part in omni.placement.parts
    }
    assert read_gauge(text, "omnivideo_mllm_part_bytes", "preset", *PART_LABELS) == expected
    assert len(families["omnivideo_mllm_part_bytes"].samples) == len(expected) == 2 and up.samples[0].value == 1
    assert "omnivideo_language_model_tokens" in families


def test_a_service_with_keys_shows_its_metrics_and_documentation_to_holders_of_one(service, http):
    for path in ("/metrics", "/docs", "/docs/swagger-ui.css", "/openapi.json"):
        assert http.get(path).status_code == 200
        assert httpx.get(f"{service[2]}{path}", auth=("anyone", KEY), trust_env=False).status_code == 200
        for wrong in ({}, {"Authorization": "Basic ???"}, {"Authorization": "Basic YTpi"}):
            refused = httpx.get(f"{service[2]}{path}", headers=wrong, trust_env=False)
            assert refused.status_code == 401 and refused.headers["WWW-Authenticate"].startswith("Basic ")
    refused = httpx.get(f"{service[2]}/v1/videos", auth=("anyone", KEY), trust_env=False)
    assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"

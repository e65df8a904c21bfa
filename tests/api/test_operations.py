"""What an operator sees of a request: its id, its trace down to the worker's steps, and its metrics."""

import time

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.support.openai_service import KEY, wait_until


@pytest.fixture(scope="module")
def spans():
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


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


def test_an_unexpected_error_is_counted_and_logged_with_its_request(http, context, monkeypatch, caplog):
    def fail(*arguments: object) -> None:
        raise RuntimeError("a detail")

    monkeypatch.setattr(context.files, "list_files", fail)
    failed = http.get("/v1/files")
    assert failed.status_code == 500 and "a detail" not in failed.text
    assert 'omnivideo_request_seconds_count{method="GET",route="/v1/files",status="500"}' in http.get("/metrics").text
    (record,) = [record for record in caplog.records if failed.headers["x-request-id"] in record.getMessage()]
    assert record.exc_info and str(record.exc_info[1]) == "a detail"


def test_health_and_readiness(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready", "language_model": "ready"}

"""Traces are exported over OTLP to a server that reads them with OpenTelemetry's own messages."""

import json
import os
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.servers import free_port, wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture
def receiver():
    """Run an OTLP server; yield its address and the (service, name, trace id, parent id) of each span it got."""
    pytest.importorskip(
        "opentelemetry.exporter.otlp.proto.http", reason="omnivideo[traces] is not installed: nothing was exported here"
    )
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {item.key: item.value.string_value for item in resource.resource.attributes}
                spans.extend(
                    (names["service.name"], span.name, span.trace_id, span.parent_span_id)
                    for scope in resource.scope_spans
                    for span in scope.spans
                )
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()

        def log_message(self, *arguments):
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()
    server.server_close()


def test_a_request_and_its_job_are_one_trace(receiver, weights, tmp_path):
    address, spans = receiver
    port = free_port()
    settings = {
        "OMNIVIDEO_TRACES": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": address, "OMNIVIDEO_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    service = subprocess.Popen(
        [sys.executable, "-m", "omnivideo", "serve", "--port", str(port), "--device", "cpu", "--weights", str(weights)],
        env=os.environ | settings,
    )
    try:
        wait_for(port, service, 120)
        body = json.dumps({"prompt": "a red circle", "num_inference_steps": 2}).encode()
        url = f"http://127.0.0.1:{port}/v1/videos/sync"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        assert urllib.request.urlopen(request, timeout=120).status == 200
    finally:
        service.terminate()
        service.wait(60)
    job = next(span for span in spans if span[1] == "job")
    trace = [span for span in spans if span[2] == job[2]]
    assert {service_name for service_name, *_ in trace} == {"omnivideo-api", "omnivideo-turns"}
    assert [name for _, name, _, parent in trace if not parent] == ["POST /v1/videos/sync"]
    assert sum(name == "denoising step" for _, name, *_ in trace) == 2
    assert {"condition", "store result"} <= {name for _, name, *_ in trace}

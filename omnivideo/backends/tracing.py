"""Traces to an OpenTelemetry server; off unless OMNIVIDEO_TRACES says otherwise."""

import os

from omnivideo.errors import MissingDependency
from omnivideo.network import find_authorities_file


def export_traces(component: str) -> None:
    """Send the spans of this process to the server that the variables OTEL_EXPORTER_OTLP_... name.

    `component` is part of the service's name there: api, worker or mllm.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise MissingDependency("traces need: pip install 'omnivideo[traces]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": f"omnivideo-{component}"}))
    has_own_trust = any(name.startswith("OTEL_EXPORTER_OTLP") and name.endswith("CERTIFICATE") for name in os.environ)
    exporter = OTLPSpanExporter(certificate_file=None if has_own_trust else find_authorities_file())
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)

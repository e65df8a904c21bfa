"""Traces to an OpenTelemetry server; off unless OMNIVIDEO_TRACES says otherwise."""

from omnivideo.errors import MissingDependency


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
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)

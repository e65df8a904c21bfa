"""What an operator sees: Prometheus metrics of the requests here, of the queue in the database, and of the language
model's server."""

import time
from collections.abc import Iterable

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from omnivideo.api.dependencies import ContextDep, MLLMServer, ServiceContext
from omnivideo.api.errors import ERROR_RESPONSES
from omnivideo.errors import OmniVideoError

router = APIRouter(tags=["operation"], responses=ERROR_RESPONSES)
LATENCY_BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class RequestMetrics:
    """Counts of one application: made with it, so that two in one process do not mix."""

    def __init__(self, context: ServiceContext):
        self.registry = CollectorRegistry()
        self.registry.register(QueueCollector(context))
        if context.mllm_server:
            self.registry.register(MLLMServerCollector(context.mllm_server))
        label_names = ("method", "route", "status")
        self.latency_seconds = Histogram(
            "omnivideo_request_seconds",
            "Time to the last byte",
            label_names,
            registry=self.registry,
            buckets=LATENCY_BUCKETS_SECONDS,
        )
        self.error_count = Counter("omnivideo_errors", "Answers of 500 and above", ("route",), registry=self.registry)

    def observe_request(self, method: str, route: str, status: int, started_at: float) -> None:
        """`route` is the pattern, never a user's own path."""
        self.latency_seconds.labels(method, route, str(status)).observe(time.perf_counter() - started_at)
        if status >= 500:
            self.error_count.labels(route).inc()


class QueueCollector(Collector):
    """Read from the database at each scrape, so that every API process tells the same."""

    def __init__(self, context: ServiceContext):
        self.context = context

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("omnivideo_database_up", "Whether the database answers")
        try:
            counts, oldest = self.context.jobs.count_by_lane_and_state(), self.context.jobs.get_oldest_wait_seconds()
        except OmniVideoError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        open_jobs = GaugeMetricFamily("omnivideo_jobs", "Jobs that are open", labels=("lane", "state"))
        ended_jobs = CounterMetricFamily("omnivideo_jobs_ended", "Jobs that have ended", labels=("lane", "state"))
        for lane, state, count in counts:
            (open_jobs if state in ("queued", "running") else ended_jobs).add_metric([lane, state], count)
        yield open_jobs
        yield ended_jobs
        oldest_wait = GaugeMetricFamily("omnivideo_oldest_job_seconds", "How long the longest waiting job has waited")
        oldest_wait.add_metric([], oldest)
        yield oldest_wait


class MLLMServerCollector(Collector):
    """Whether its server answers, and what a vLLM says of its load: asked at each scrape."""

    exported_metrics = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions",
             "prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits")  # fmt: skip

    def __init__(self, server: MLLMServer):
        self.server = server

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("omnivideo_language_model_up", "Whether the language model's server answers")
        up.add_metric([], self.server.is_ready())
        yield up
        for family in text_string_to_metric_families(self.server.fetch_metrics()):
            if family.name.removeprefix("vllm:") in self.exported_metrics:
                yield family


@router.get("/health")
def check_health() -> dict[str, str]:
    """Whether this process lives."""
    return {"status": "ok"}


@router.get("/ready")
def check_ready(context: ContextDep) -> dict[str, str]:
    """Whether the database answers, so that requests may come: 503 where it does not.

    They may come while the language model is starting, too: what needs it waits.
    """
    context.jobs.count_queued()
    model = "ready" if context.mllm_server is None or context.mllm_server.is_ready() else "starting"
    return {"status": "ready", "language_model": model}


@router.get("/metrics", response_class=Response)
def export_metrics(request: Request) -> Response:
    """For Prometheus."""
    metrics: RequestMetrics = request.app.state.request_metrics
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

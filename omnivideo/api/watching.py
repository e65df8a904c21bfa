"""What an operator sees: Prometheus metrics of the requests here, of the queue in the database, and of the language
model's server."""

import time
from collections.abc import Iterable

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from omnivideo.api.errors import REFUSALS
from omnivideo.api.rooms import Room, Rooms
from omnivideo.errors import OmniVideoError

router = APIRouter(tags=["operation"], responses=REFUSALS)
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Requests:
    """Counts of one application: made with it, so that two in one process do not mix."""

    def __init__(self, rooms: Rooms):
        self.registry = CollectorRegistry()
        self.registry.register(Queue(rooms))
        if rooms.model:
            self.registry.register(LanguageModel(rooms))
        names = ("method", "route", "status")
        self.seconds = Histogram(
            "omnivideo_request_seconds", "Time to the last byte", names, registry=self.registry, buckets=BUCKETS
        )
        self.errors = Counter("omnivideo_errors", "Answers of 500 and above", ("route",), registry=self.registry)

    def saw(self, method: str, route: str, status: int, began: float) -> None:
        """`route` is the pattern, never a user's own path."""
        self.seconds.labels(method, route, str(status)).observe(time.perf_counter() - began)
        if status >= 500:
            self.errors.labels(route).inc()


class Queue(Collector):
    """Read from the database at each scrape, so that every API process tells the same."""

    def __init__(self, rooms: Rooms):
        self.rooms = rooms

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("omnivideo_database_up", "Whether the database answers")
        try:
            counts, oldest = self.rooms.jobs.counts(), self.rooms.jobs.oldest()
        except OmniVideoError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        now = GaugeMetricFamily("omnivideo_jobs", "Jobs that are open", labels=("lane", "state"))
        ended = CounterMetricFamily("omnivideo_jobs_ended", "Jobs that have ended", labels=("lane", "state"))
        for lane, state, count in counts:
            (now if state in ("queued", "running") else ended).add_metric([lane, state], count)
        yield now
        yield ended
        wait = GaugeMetricFamily("omnivideo_oldest_job_seconds", "How long the longest waiting job has waited")
        wait.add_metric([], oldest)
        yield wait


class LanguageModel(Collector):
    """Whether its server answers, and what a vLLM says of its load: asked at each scrape."""

    shown = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions",
             "prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits")  # fmt: skip

    def __init__(self, rooms: Rooms):
        self.rooms = rooms

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("omnivideo_language_model_up", "Whether the language model's server answers")
        up.add_metric([], self.rooms.model.ready())
        yield up
        for family in text_string_to_metric_families(self.rooms.model.metrics()):
            if family.name.removeprefix("vllm:") in self.shown:
                yield family


@router.get("/health")
def health() -> dict[str, str]:
    """Whether this process lives."""
    return {"status": "ok"}


@router.get("/ready")
def ready(rooms: Room) -> dict[str, str]:
    """Whether the database answers, so that requests may come: 503 where it does not.

    They may come while the language model is starting, too: what needs it waits.
    """
    rooms.jobs.waiting()
    model = "ready" if rooms.model is None or rooms.model.ready() else "starting"
    return {"status": "ready", "language_model": model}


@router.get("/metrics", response_class=Response)
def metrics(rooms: Room) -> Response:
    """For Prometheus."""
    assert rooms.requests is not None
    return Response(generate_latest(rooms.requests.registry), media_type=CONTENT_TYPE_LATEST)

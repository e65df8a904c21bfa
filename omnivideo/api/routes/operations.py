"""Routes for operators: health, readiness, and Prometheus metrics of the requests, jobs, workers and the MLLM."""

import math
import threading
import time
from collections import Counter as Counted
from collections.abc import Callable, Iterable
from functools import partial

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from omnivideo.api.dependencies import ContextDep, MLLMServer, ServiceContext
from omnivideo.api.errors import ERROR_RESPONSES
from omnivideo.api.request_body import ServiceRoute
from omnivideo.api.stores import WorkerStore
from omnivideo.errors import OmniVideoError, StoreError
from omnivideo.ports import JobStore
from omnivideo.records import JOB_SECONDS, JobDurations

router = APIRouter(route_class=ServiceRoute, tags=["operation"], responses=ERROR_RESPONSES)
WORKER_LIFETIME_SECONDS = 30.0  # after its last report; workers report every 10 s
READY_SECONDS = 5.0  # how long the result of a check is used
LATENCY_BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class RequestMetrics:
    """The metrics of one application. Each has its own registry, so two in one process do not share metrics."""

    def __init__(self, context: ServiceContext):
        self.registry = CollectorRegistry()
        self.registry.register(QueueCollector(context.jobs))
        self.registry.register(WorkerCollector(context.workers))
        if context.mllm_server:
            self.registry.register(MLLMServerCollector(context.mllm_server))
        if context.fetch_mllm_metrics:
            self.registry.register(MLLMCollector(context.fetch_mllm_metrics))
        self.latency_seconds = Histogram(
            "omnivideo_request_seconds",
            "Time to the last byte",
            ("method", "route", "status"),
            registry=self.registry,
            buckets=LATENCY_BUCKETS_SECONDS,
        )
        self.error_count = Counter(
            "omnivideo_errors", "Responses with a status of 500 or above", ("route",), registry=self.registry
        )


class QueueCollector(Collector):
    """Reads the queue from the database at every scrape, so that all API processes report the same."""

    def __init__(self, jobs: JobStore):
        self.jobs = jobs

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("omnivideo_database_up", "1 if the database answers, otherwise 0")
        try:
            counts, oldest_wait_seconds = self.jobs.count_by_lane_and_state(), self.jobs.get_oldest_wait_seconds()
            durations = self.jobs.measure_durations()
        except OmniVideoError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        open_jobs = GaugeMetricFamily("omnivideo_jobs", "Queued and running jobs", labels=("lane", "state"))
        ended_jobs = CounterMetricFamily("omnivideo_jobs_ended", "Jobs that have ended", labels=("lane", "state"))
        for lane, state, count in counts:
            (open_jobs if state in ("queued", "running") else ended_jobs).add_metric([lane, state], count)
        yield open_jobs
        yield ended_jobs
        oldest_wait = GaugeMetricFamily("omnivideo_oldest_job_seconds", "Waiting time of the oldest queued job")
        oldest_wait.add_metric([], oldest_wait_seconds)
        yield oldest_wait
        yield from describe_durations(durations)


def describe_durations(durations: Iterable[JobDurations]) -> Iterable[Metric]:
    """Yield the histograms of the times of completed jobs, and the number of their denoising steps."""
    queued = HistogramMetricFamily(
        "omnivideo_job_queue_seconds", "Time from a job's request to its worker", labels=("lane",)
    )
    generated = HistogramMetricFamily(
        "omnivideo_job_generation_seconds", "Time from a job's worker to its stored result", labels=("lane",)
    )
    steps = CounterMetricFamily("omnivideo_denoising_steps", "Denoising steps of completed jobs", labels=("lane",))
    for lane in durations:
        for family, counts in ((queued, lane.queued), (generated, lane.generated)):
            buckets = [(str(float(bound)), count) for bound, count in zip(JOB_SECONDS, counts.counts, strict=True)]
            family.add_metric([lane.lane], [*buckets, ("+Inf", counts.total)], counts.sum_seconds)
        steps.add_metric([lane.lane], lane.steps)
    yield from (queued, generated, steps)


class WorkerCollector(Collector):
    """Reads from the database which weights the workers have and where the parts of their models compute.

    The hosts' names are left out, because anybody who reaches the port for metrics may read them.
    """

    def __init__(self, workers: WorkerStore):
        self.workers = workers

    def collect(self) -> Iterable[Metric]:
        try:
            workers = self.workers.list_workers(WORKER_LIFETIME_SECONDS)
        except OmniVideoError:
            return
        model_labels, part_labels = ("preset", "weights", "precision"), ("part", "location", "dtype", "compute_dtype")
        running = GaugeMetricFamily("omnivideo_workers", "Workers that run", labels=(*model_labels, "placement"))
        sizes = GaugeMetricFamily(
            "omnivideo_part_bytes", "Weights of the workers' parts, by where they compute",
            labels=(*model_labels, *part_labels),
        )  # fmt: skip
        worker_counts, part_bytes = Counted[tuple[str, ...]](), Counted[tuple[str, ...]]()
        for worker in workers:
            model = (worker.preset, worker.weights, worker.precision)
            worker_counts[*model, worker.placement] += 1
            for part in worker.parts:
                part_bytes[*model, part.name, part.location, part.dtype, part.compute_dtype] += part.size_bytes
        for family, values in ((running, worker_counts), (sizes, part_bytes)):
            for labels, value in values.items():
                family.add_metric(labels, value)
            yield family


class MLLMServerCollector(Collector):
    """Checks at every scrape whether the MLLM's server answers."""

    def __init__(self, server: MLLMServer):
        self.server = server

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("omnivideo_language_model_up", "1 if the MLLM's server answers, otherwise 0")
        up.add_metric([], self.server.is_ready())
        yield up


class MLLMCollector(Collector):
    """Reads the tokens, the cache hits and the placement of the MLLM at every scrape, or the load of vLLM."""

    exported_metrics = (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions",
        "prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits",
    )  # fmt: skip

    def __init__(self, fetch_metrics: Callable[[], str]):
        self.fetch_metrics = fetch_metrics

    def collect(self) -> Iterable[Metric]:
        for family in text_string_to_metric_families(self.fetch_metrics()):
            is_ours = family.name.startswith(("omnivideo_language_model_", "omnivideo_mllm_"))
            if is_ours or family.name.removeprefix("vllm:") in self.exported_metrics:
                yield family


@router.get("/health")
async def check_health() -> dict[str, str]:
    """Answer as long as this process is running; no thread is needed for it."""
    return {"status": "ok"}


class StorageCheck:
    """Finds out whether the database and the object store can be written.

    Anybody may ask, so it does so at most every READY_SECONDS, and in one thread at a time: while a store hangs, the
    others get the last result.
    """

    def __init__(self, context: ServiceContext):
        self.context = context
        self.lock = threading.Lock()
        self.checked_at = -math.inf
        self.error: OmniVideoError | None = StoreError("store: it has not been checked yet; try again in a moment")

    def run(self) -> None:
        """Raise the StoreError or ServiceBusy of the last check if the database or the store cannot be written."""
        if time.monotonic() - self.checked_at > READY_SECONDS and self.lock.acquire(blocking=False):
            try:
                self.error = self.find_error()
                self.checked_at = time.monotonic()
            finally:
                self.lock.release()
        if self.error is not None:
            raise self.error

    def find_error(self) -> OmniVideoError | None:
        # A row that is written again and again: on a full disk, reading would still succeed.
        probe = partial(self.context.idempotency_keys.claim_key, "ready", "ready", request_digest="", resource_id="")
        try:
            probe(lease_seconds=0.0)
            self.context.store.check_writable()
        except OmniVideoError as error:
            return error
        return None


@router.get("/ready")
def check_ready(context: ContextDep, request: Request) -> dict[str, str]:
    """Answer 200 if the database and the object store can be written and turns are run, otherwise 503.

    The service is also ready while the MLLM starts: requests that need it wait. `language_model` says if its server's
    certificate is not trusted.
    """
    check: StorageCheck = request.app.state.storage_check
    check.run()
    if context.turn_process is not None:
        context.turn_process.check_running()
    return {
        "status": "ready",
        "language_model": context.mllm_server.describe_state() if context.mllm_server else "ready",
    }


@router.get("/metrics", response_class=Response)
def export_metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' text format. If the service has keys, one is needed here.

    The port OMNIVIDEO_METRICS_PORT answers without one; it is meant for Prometheus alone.
    """
    metrics: RequestMetrics = request.app.state.request_metrics
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

"""Run tasks in worker processes, on this machine's cores or on a cluster; a file or a clip may crash its worker."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

from omnivideo.errors import InvalidInput, OmniVideoError, StoreError
from omnivideo.training.curation.bounds import UNREADABLE
from omnivideo.training.curation.reading import import_optional

TASKS_PER_WORKER = 4  # queued for each worker: enough to keep it busy, few enough to stop quickly


@contextmanager
def connect_workers(count: int, address: str | None) -> Iterator[Any]:
    """Yield a Dask client of a cluster, or of `count` local processes that end with this one."""
    distributed = import_optional("distributed", "dask[distributed]")
    with ignore_sigint():
        cluster = nullcontext(address) if address else distributed.LocalCluster(
            n_workers=count, threads_per_worker=1, dashboard_address="127.0.0.1:0", memory_limit=0, silence_logs=40
        )  # fmt: skip
    with cluster as scheduler, distributed.Client(scheduler) as client:
        yield client


@contextmanager
def ignore_sigint() -> Iterator[None]:
    """Make processes started in this context ignore Ctrl-C, which a terminal sends to all; this process ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def run_tasks(
    client: Any, task: Callable[..., Mapping[str, Any]], items: Iterable[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield items with their records as they complete; one that crashes its worker is unreadable."""
    distributed = import_optional("distributed", "dask[distributed]")
    remaining = iter(items)
    running: dict[Any, dict[str, Any]] = {}
    max_running = TASKS_PER_WORKER * max(1, len(client.scheduler_info()["workers"]))
    try:
        while True:
            for item in islice(remaining, max_running - len(running)):
                running[client.submit(run_safely, task, item, pure=False)] = item
            if not running:
                return
            done = distributed.wait(list(running), return_when="FIRST_COMPLETED").done
            for future in done:
                yield running.pop(future), get_result(future, distributed)
    finally:
        client.cancel(list(running))


def get_result(future: Any, distributed: Any) -> dict[str, Any]:
    try:
        result: dict[str, Any] = future.result()
        return result
    except distributed.KilledWorker:
        return make_unreadable_record("crashed the decoder; allowed: a complete file")


def run_safely(task: Callable[[dict[str, Any]], dict[str, Any]], item: dict[str, Any]) -> dict[str, Any]:
    """Return the task's record; a fault of one file or clip becomes its reason, a fault of the run is raised."""
    try:
        return task(item)
    except InvalidInput as error:
        return make_unreadable_record(format_reason(error))
    except (OmniVideoError, ImportError):
        raise
    except Exception as error:  # decoders and OpenCV may raise any exception on unusual pixels
        if isinstance(error, OSError) and error.strerror:  # errors of the source are already UnreadableMedia here
            raise StoreError(f"the output folder cannot be written: {error.strerror}") from None
        message = " ".join(word for word in str(error).split() if not set(word) & set("/\\"))  # no path
        return make_unreadable_record(
            f"cannot be used ({type(error).__name__}: {message[:200]}); allowed: a complete file"
        )


def make_unreadable_record(reason: str) -> dict[str, Any]:
    return {"scores": {}, "dropped": {"stage": UNREADABLE, "value": None, "why": reason}}


def format_reason(error: InvalidInput) -> str:
    return str(error).removeprefix(f"{error.field}: ")

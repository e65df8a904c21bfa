"""Notify workers of queued jobs through the broker, and run workers in Celery's child processes, one for each device.

A message says only that there is work. It is acknowledged on receipt, and idle workers also look into the database
themselves, so neither a lost message nor a broker that is down loses a job. This module does not import torch: API
processes notify too.
"""

import logging
import os
import queue
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from celery import Celery, signals
from kombu.exceptions import OperationalError

from omnivideo.backends.queue.reaper import Reaper
from omnivideo.errors import OmniVideoError
from omnivideo.network import CERTIFICATE_ADVICE, find_authorities_file, find_certificate_problem

if TYPE_CHECKING:
    from omnivideo.backends.decoder.worker import InProcessWorker, Worker

log = logging.getLogger("omnivideo.worker")
TASK_NAME = "omnivideo.work"
MAX_PENDING_MESSAGES = 100
RELOAD_AFTER_SECONDS = 5.0  # Celery replaces a child that has ended at once


def build_queue_name(database_id: str) -> str:
    """Return the name of the queue of one database's workers: several services may share a broker."""
    return f"omnivideo-{database_id}"


def build_tls_options(broker_url: str) -> dict[str, Any] | None:
    """Return the options with which the broker's certificate is checked, or None for an address without TLS.

    Options in a Redis address, such as `?ssl_certfile=...`, replace them.
    """
    url = urlsplit(broker_url)
    if url.scheme == "rediss":
        return {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": find_authorities_file()}
    if url.scheme == "amqps":
        return {
            "cert_reqs": ssl.CERT_REQUIRED,
            "ca_certs": find_authorities_file(),
            "server_hostname": url.hostname,
        }
    return None


def describe_broker_error(error: Exception) -> str:
    if problem := find_certificate_problem(error):
        return f"its certificate is not trusted ({problem}); {CERTIFICATE_ADVICE}"
    return type(error).__name__


def create_celery_app(broker_url: str, queue_name: str) -> Celery:
    """Return a Celery app whose messages only say that there is work; workers find the job in the database."""
    app = Celery("omnivideo", broker=broker_url)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=False,  # RabbitMQ closes the channel of a message that is not acknowledged within 30 minutes
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        broker_use_ssl=build_tls_options(broker_url),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # Celery would end the worker after 100
        broker_transport_options={"visibility_timeout": 3600, "socket_timeout": 5, "socket_connect_timeout": 5},
        task_default_queue=queue_name,
    )
    return app


def create_notifier(app: Celery) -> Callable[[], None]:
    """Return a function that sends a message. If the broker is unavailable, the reaper sends it later."""

    def notify_workers() -> None:
        try:
            app.send_task(TASK_NAME, retry=False)
        except (OperationalError, OSError) as error:
            log.warning("the broker is unavailable: %s", describe_broker_error(error))

    return notify_workers


class BackgroundNotifier:
    """Sends messages from a thread, so that no request waits for the broker.

    While the broker is unavailable, messages are dropped; the reaper repeats them.
    """

    def __init__(self, app: Celery):
        self.app = app
        self.pending: queue.Queue[None] = queue.Queue(MAX_PENDING_MESSAGES)
        self.thread = threading.Thread(target=self.run, daemon=True, name="notifier")

    def start(self) -> "BackgroundNotifier":
        self.thread.start()
        return self

    def notify_workers(self) -> None:
        with suppress(queue.Full):  # so many messages wake every worker
            self.pending.put_nowait(None)

    def run(self) -> None:
        while True:
            self.pending.get()
            try:
                self.app.send_task(TASK_NAME, retry=False)
            except Exception as error:
                log.warning("the broker is unavailable: %s", describe_broker_error(error))
                with suppress(queue.Empty):
                    while True:
                        self.pending.get_nowait()


class ChildProcess:
    """The worker of one of Celery's child processes, in a thread beside Celery's own.

    Celery kills a child that has not reported itself as started after 4 s, and loading a model takes longer.
    """

    def __init__(self, build_worker: Callable[[], tuple["Worker", float]], notify_workers: Callable[[], None]):
        self.build_worker, self.notify_workers = build_worker, notify_workers
        self.work_available = threading.Event()
        self.worker: InProcessWorker | None = None
        # Celery tells its children to stop only after it has stopped itself: the parent says it here, at once.
        self.stop_reader, self.stop_writer = os.pipe()

    def start(self) -> None:
        threading.Thread(target=self.run, daemon=True, name="loading").start()
        threading.Thread(target=self.await_stop, daemon=True, name="stopping").start()

    def announce_stop(self, processes: int) -> None:
        """Tell the child processes, from the parent, that the worker stops."""
        os.write(self.stop_writer, b"." * processes)

    def await_stop(self) -> None:
        """Wait until the parent says that the worker stops, then end the current denoising step."""
        os.read(self.stop_reader, 1)
        if self.worker is not None:
            self.worker.request_stop()

    def run(self) -> None:
        """Load the worker and start it. If it cannot be loaded, the process ends, and Celery starts another."""
        from omnivideo.backends.decoder.worker import InProcessWorker

        try:
            worker, heartbeat_timeout_seconds = self.build_worker()
        except Exception as error:
            log.error("the worker cannot start: %s", error, exc_info=not isinstance(error, OmniVideoError))
            time.sleep(RELOAD_AFTER_SECONDS)
            os._exit(1)
        Reaper(worker.jobs, heartbeat_timeout_seconds, self.notify_workers).start()
        self.worker = InProcessWorker(worker, self.work_available).start()

    def stop(self) -> None:
        """Stop after the current denoising step; the job continues from there on another worker."""
        if self.worker is not None:
            self.worker.stop()


def serve_celery_worker(
    broker_url: str, queue_name: str, build_worker: Callable[[], tuple["Worker", float]], concurrency: int = 1
) -> None:
    """Run a Celery worker of a queue until it is stopped.

    `build_worker` runs in each child process, so that the parent loads no model and does not initialize CUDA. It
    returns the worker and the heartbeat timeout in seconds.
    """
    app = create_celery_app(broker_url, queue_name)
    child = ChildProcess(build_worker, create_notifier(create_celery_app(broker_url, queue_name)))

    @signals.setup_logging.connect(weak=False)  # type: ignore[untyped-decorator]
    def leave_logging_alone(**_: Any) -> None:
        """Keep Celery from adding handlers, beside which `build_worker` could not configure the logging."""

    @signals.worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]
    def start_child(**_: Any) -> None:
        child.start()

    @signals.worker_process_shutdown.connect(weak=False)  # type: ignore[untyped-decorator]
    def stop_child(**_: Any) -> None:
        child.stop()

    @signals.worker_shutting_down.connect(weak=False)  # type: ignore[untyped-decorator]
    def announce_stop(**_: Any) -> None:
        child.announce_stop(concurrency)

    @app.task(name=TASK_NAME)  # type: ignore[untyped-decorator]
    def run_task() -> None:
        child.work_available.set()

    app.worker_main(["--quiet", "worker", "--pool=prefork", f"--concurrency={concurrency}", "--loglevel=WARNING",
                     "--without-gossip", "--without-mingle", "-Ofair"])  # fmt: skip

"""Notifications leave the request's thread at once, whatever the broker does."""

import socket
import time

import pytest

from omnivideo.backends.queue.celery import BackgroundNotifier, create_celery_app
from tests.support.openai_service import wait_until
from tests.support.servers import free_port


@pytest.mark.parametrize("broker", ["down", "silent"])
def test_a_broker_that_does_not_answer_delays_no_request(broker):
    """A submit took 6 s while the broker was down."""
    with socket.socket() as server:
        if broker == "silent":
            server.bind(("127.0.0.1", 0))
            server.listen()
        port = server.getsockname()[1] if broker == "silent" else free_port()
        notifier = BackgroundNotifier(create_celery_app(f"redis://127.0.0.1:{port}/0")).start()
        started_at = time.monotonic()
        for _ in range(1000):
            notifier.notify_workers()
        assert time.monotonic() - started_at < 0.5
        if broker == "down":
            wait_until(notifier.pending.empty, 30)  # messages are dropped; the reaper repeats them

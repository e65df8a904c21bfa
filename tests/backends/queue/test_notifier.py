"""Notifications leave the request's thread at once, whatever the broker does."""

import logging
import socket
import time
from pathlib import Path

import pytest
from kombu import Connection, pools

from omnivideo.backends.queue.celery import BackgroundNotifier, create_celery_app, create_notifier
from tests.support.openai_service import wait_until
from tests.support.proxy import make_certificate
from tests.support.servers import Redis, free_port, rabbitmq


@pytest.mark.parametrize("broker", ["down", "silent"])
def test_a_broker_that_does_not_answer_delays_no_request(broker):
    """A submit took 6 s while the broker was down."""
    with socket.socket() as server:
        if broker == "silent":
            server.bind(("127.0.0.1", 0))
            server.listen()
        port = server.getsockname()[1] if broker == "silent" else free_port()
        notifier = BackgroundNotifier(create_celery_app(f"redis://127.0.0.1:{port}/0", "omnivideo-test")).start()
        started_at = time.monotonic()
        for _ in range(1000):
            notifier.notify_workers()
        assert time.monotonic() - started_at < 0.5
        if broker == "down":
            wait_until(notifier.pending.empty, 30)  # messages are dropped; the reaper repeats them


def check_certificates(address: str, certificate: Path, monkeypatch, caplog) -> None:
    """Send to a broker whose authority is unknown, and then to the same one with its authority trusted."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with caplog.at_level(logging.WARNING, "omnivideo.worker"):
        create_notifier(create_celery_app(address, "omnivideo-refused"))()
    assert "its certificate is not trusted (self" in caplog.text
    assert "trust its authority with SSL_CERT_FILE" in caplog.text
    caplog.clear()
    pools.reset()  # the pool of an address keeps the options of its first connection
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    app = create_celery_app(address, "omnivideo-trusted")
    create_notifier(app)()
    assert not caplog.text
    with app.connection_for_read() as connection:
        assert connection.SimpleQueue("omnivideo-trusted").qsize() == 1
    with Connection(address, ssl=app.conf.broker_use_ssl) as connection:
        connection.connect()
    pools.reset()


def test_the_certificate_of_redis_is_checked(tmp_path, monkeypatch, caplog):
    make_certificate(tmp_path, "localhost")
    certificate = tmp_path / "localhost.crt"
    server = Redis(tmp_path / "redis", certificate=certificate)
    server.start()
    try:
        check_certificates(server.address, certificate, monkeypatch, caplog)
    finally:
        server.kill()


def test_the_certificate_of_rabbitmq_is_checked(tmp_path, monkeypatch, caplog):
    make_certificate(tmp_path, "localhost")
    certificate = tmp_path / "localhost.crt"
    with rabbitmq(tmp_path / "rabbitmq", certificate) as address:
        check_certificates(address, certificate, monkeypatch, caplog)

"""Half-sent requests occupy connections for a bounded time and keep nobody out; repeated log lines are left out."""

import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import anyio
import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from omnivideo.api import connections
from omnivideo.api.bulkheads import MAX_REQUESTS_PER_ADDRESS, ClientLimitMiddleware
from omnivideo.api.connections import ConnectionLimits, create_protocol, is_trusted_proxy
from omnivideo.cli.logs import MAX_REPETITIONS, RepetitionFilter
from tests.support.openai_service import wait_until
from tests.support.servers import accepts_connections, free_port


@contextmanager
def run_server(limits: ConnectionLimits) -> Iterator[int]:
    app = Starlette(routes=[Route("/health", lambda request: PlainTextResponse("ok"))])
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", http=create_protocol(limits)))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(10)


def send_half_a_request(stack: ExitStack, port: int) -> socket.socket:
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
    return connection


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.05)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def test_half_sent_requests_keep_nobody_out():
    limits = ConnectionLimits(max_connections=20)
    with run_server(limits) as port, ExitStack() as stack:
        half_open = [send_half_a_request(stack, port) for _ in range(60)]
        for _ in range(10):
            started_at = time.monotonic()
            assert httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).text == "ok"
            assert time.monotonic() - started_at < 1.0
        assert len(limits.open_connections) <= 20
        assert sum(map(is_closed, half_open)) >= 40


SERVER_OF_FEW_FILES = """
import resource, sys, time
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from omnivideo.cli.service import listen, run_server

async def block(request):
    time.sleep(1.0)
    return PlainTextResponse("ok")

resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
with listen("127.0.0.1", int(sys.argv[1])) as listener:
    run_server(lambda: Starlette(routes=[Route("/", block)]), listener)
"""


def test_connections_that_arrive_at_once_do_not_use_up_the_files(tmp_path):
    """They arrive while the event loop is busy, and more of them than the process may open files."""
    port, log = free_port(), tmp_path / "log"
    with log.open("wb") as output, ExitStack() as stack:
        server = subprocess.Popen([sys.executable, "-c", SERVER_OF_FEW_FILES, str(port)], stdout=output, stderr=output)
        stack.callback(server.wait)
        stack.callback(server.kill)
        wait_until(lambda: accepts_connections(port), 60)
        blocking = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        blocking.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.3)
        for _ in range(500):
            send_half_a_request(stack, port)
        assert httpx.get(f"http://127.0.0.1:{port}/", trust_env=False, timeout=20).text == "ok"
    assert "Too many open files" not in log.read_text() and "out of system resource" not in log.read_text()


def test_headers_must_arrive_in_time(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_SECONDS", 0.5)
    limits = ConnectionLimits(max_connections=20)
    with run_server(limits) as port, ExitStack() as stack:
        never, half = (
            stack.enter_context(socket.create_connection(("127.0.0.1", port))),
            send_half_a_request(stack, port),
        )
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            assert client.get("/health").text == "ok"
            wait_until(lambda: is_closed(never) and is_closed(half), 5)
            assert len(limits.open_connections) == 1  # an idle connection has the keep-alive timeout
            assert client.get("/health").text == "ok"
            half = send_half_a_request(stack, port)
            wait_until(lambda: is_closed(half), 5)
        wait_until(lambda: not limits.open_connections and not limits.waiting, 5)


def test_connections_of_one_address_are_limited_unless_it_is_a_proxy(monkeypatch):
    proxies, addresses = ("10.0.0.0/8", "192.168.1.1"), ("127.0.0.1", "::1", "10.1.2.3", "192.168.1.1", "192.168.1.2")
    trusted = [is_trusted_proxy(address, proxies) for address in addresses]
    assert trusted == [True, True, True, True, False]
    monkeypatch.setattr(connections, "is_trusted_proxy", lambda *arguments: False)
    with run_server(ConnectionLimits(max_connections=20, max_per_address=3)) as port, ExitStack() as stack:
        opened = [send_half_a_request(stack, port) for _ in range(5)]
        wait_until(lambda: sum(map(is_closed, opened)) == 2, 5)


@pytest.mark.parametrize(("level", "expected"), [(logging.ERROR, MAX_REPETITIONS), (logging.INFO, 1000)])
def test_repeated_warnings_are_left_out(level, expected):
    repetition_filter = RepetitionFilter()
    records = [logging.LogRecord("asyncio", level, "", 0, "accept failed %d", (index,), None) for index in range(1000)]
    assert sum(map(repetition_filter.filter, records)) == expected
    other = logging.LogRecord("asyncio", level, "", 0, "something else", (), None)
    assert repetition_filter.filter(other)


def test_requests_of_one_client_behind_a_proxy_are_limited():
    """The address is the client's, from the headers of a trusted proxy."""
    open_requests, proceed = [], anyio.Event()

    async def application(scope, receive, send) -> None:
        open_requests.append(scope["client"][0])
        await proceed.wait()

    app = ProxyHeadersMiddleware(ClientLimitMiddleware(application), trusted_hosts=["10.0.0.1"])

    async def request(client: str, statuses: list[int]) -> None:
        async def send(message) -> None:
            statuses.extend([message["status"]] if message["type"] == "http.response.start" else [])

        headers = [(b"x-forwarded-for", client.encode()), (b"x-forwarded-proto", b"http")]
        await app({"type": "http", "client": ("10.0.0.1", 1), "headers": headers, "method": "GET"}, None, send)

    async def run() -> list[int]:
        statuses: list[int] = []
        async with anyio.create_task_group() as group:
            for _ in range(MAX_REQUESTS_PER_ADDRESS + 5):
                group.start_soon(request, "192.0.2.1", statuses)
            group.start_soon(request, "192.0.2.2", statuses)
            await anyio.wait_all_tasks_blocked()
            proceed.set()
        return statuses

    assert anyio.run(run) == [503] * 5
    assert open_requests.count("192.0.2.1") == MAX_REQUESTS_PER_ADDRESS and open_requests.count("192.0.2.2") == 1

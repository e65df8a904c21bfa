"""Limit what clients occupy before their requests reach the application: connections, and time to send the headers.

A connection that has not sent the headers of a request after HEADER_TIMEOUT_SECONDS is closed. If all connections are
taken, the one that has waited longest for its headers gives way to a new one, so that half-sent requests do not keep
others out.
"""

import asyncio
import ipaddress
import resource
from collections import Counter
from collections.abc import Collection
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT_SECONDS = 10.0
RESERVED_FILES = 256  # descriptors that are left for the database, the store and the media
MAX_FILES = 65_536
MAX_CONNECTIONS_PER_ADDRESS = 256  # except from trusted proxies


def raise_file_limit() -> int:
    """Raise this process's limit of open files as far as it may, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return MAX_FILES if soft == resource.RLIM_INFINITY else soft


def is_trusted_proxy(address: str, trusted: Collection[str]) -> bool:
    """Return whether an address may send for many clients: this machine, or one of the trusted proxies."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return True  # a Unix socket
    if "*" in trusted or parsed.is_loopback:
        return True
    networks = (ipaddress.ip_network(entry, strict=False) for entry in trusted if "/" in entry or entry[:1].isdigit())
    return any(parsed in network for network in networks)


class ConnectionLimits:
    """The open connections of one server."""

    def __init__(
        self,
        max_connections: int,
        max_per_address: int = MAX_CONNECTIONS_PER_ADDRESS,
        trusted_proxies: Collection[str] = (),
    ):
        self.max_connections, self.max_per_address = max_connections, max_per_address
        self.trusted_proxies = trusted_proxies
        self.open_connections: set[LimitedProtocol] = set()
        self.waiting: dict[LimitedProtocol, None] = {}  # for headers, the longest-waiting first
        self.count_by_address: Counter[str] = Counter()

    def admit(self, connection: "LimitedProtocol") -> bool:
        """Count a new connection. Return False if it must be closed."""
        address = connection.address
        is_full = self.count_by_address[address] >= self.max_per_address
        if is_full and not is_trusted_proxy(address, self.trusted_proxies):
            return False
        if len(self.open_connections) >= self.max_connections:
            if not self.waiting:
                return False
            next(iter(self.waiting)).close_at_once()
        self.open_connections.add(connection)
        self.count_by_address[address] += 1
        return True

    def remove(self, connection: "LimitedProtocol") -> None:
        self.waiting.pop(connection, None)
        if connection in self.open_connections:
            self.open_connections.remove(connection)
            self.count_by_address[connection.address] -= 1
            if not self.count_by_address[connection.address]:
                del self.count_by_address[connection.address]


class LimitedProtocol(H11Protocol):
    """A connection that is closed if the headers of a request do not arrive in time."""

    limits: ConnectionLimits
    address = ""
    header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        if not self.limits.admit(self):
            transport.abort()
            return
        self.wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and self in self.limits.open_connections:
            self.wait_for_headers()
        else:
            self.stop_waiting()

    def on_response_complete(self) -> None:
        self.stop_waiting()
        super().on_response_complete()  # it may find the next request, or wait for one with the keep-alive timeout

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_waiting()
        self.limits.remove(self)
        super().connection_lost(exc)

    def wait_for_headers(self) -> None:
        if self.header_timer is None:
            self.header_timer = self.loop.call_later(HEADER_TIMEOUT_SECONDS, self.close_at_once)
            self.limits.waiting[self] = None

    def stop_waiting(self) -> None:
        self.limits.waiting.pop(self, None)
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def close_at_once(self) -> None:
        self.stop_waiting()
        self.limits.remove(self)
        self.transport.abort()


def create_protocol(limits: ConnectionLimits) -> type[LimitedProtocol]:
    """Return the protocol of a server with these limits, for uvicorn's option `http`."""
    return type("ServerProtocol", (LimitedProtocol,), {"limits": limits})

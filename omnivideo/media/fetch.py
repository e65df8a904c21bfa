"""Fetch media by URL, from allowed hosts at public addresses only.

Every step is checked first: the form of the URL, its host against the list, and every address of that host. The
connection then goes to an address that was checked. Errors reveal nothing about the network: a forbidden address gives
the same error as one that does not respond.
"""

import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore2

from omnivideo.errors import InvalidInput
from omnivideo.network import create_tls_context

# ---------------------------------------------------------------- addresses

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# All allocated IPv6 addresses; mapped, NAT64 and local ones lie outside.
PUBLIC_IPV6_NETWORK = ipaddress.ip_network("2000::/3")
# Global in the registries, but able to reach internal hosts: tunnels to IPv4, relays, services of cloud providers.
BLOCKED_NETWORKS = [ipaddress.ip_network(net) for net in (
    "2001::/23", "2002::/16", "3fff::/20", "192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32",
)]  # fmt: skip


def is_public_address(address: Address) -> bool:
    """Return whether the address is public: not private, local, shared, reserved, multicast or a tunnel."""
    if address.version == 6 and address not in PUBLIC_IPV6_NETWORK:
        return False
    special = address.is_multicast or address.is_reserved or address.is_unspecified or not address.is_global
    return not special and not any(address.version == net.version and address in net for net in BLOCKED_NETWORKS)


def resolve_addresses(host: str) -> list[str]:
    """Return all addresses that the system's resolver gives for a name."""
    return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)))


@dataclass(frozen=True)
class DeadlineStream(httpcore2.NetworkStream):
    """A connection on which no wait exceeds the deadline, even if data keeps arriving slowly."""

    stream: httpcore2.NetworkStream
    deadline: float

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.stream.read(max_bytes, remaining_seconds(self.deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, remaining_seconds(self.deadline))

    def close(self) -> None:
        self.stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return DeadlineStream(
            self.stream.start_tls(ssl_context, server_hostname, remaining_seconds(self.deadline)), self.deadline
        )


def remaining_seconds(deadline: float) -> float:
    """Return the seconds until the deadline; raise ReadTimeout after it."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise httpcore2.ReadTimeout
    return seconds


@dataclass(frozen=True)
class PublicOnlyBackend(httpcore2.SyncBackend):
    """Connects only to addresses that it has checked; resolving once prevents DNS rebinding."""

    deadline: float
    permitted_addresses: Collection[str]
    resolve: Callable[[str], list[str]]

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:  # fmt: skip
        candidates = self.vet_addresses(host)
        for remaining_count in range(len(candidates), 0, -1):  # each address gets an equal share of the time
            try:
                share_seconds = remaining_seconds(self.deadline) / remaining_count
                return DeadlineStream(
                    super().connect_tcp(candidates[-remaining_count], port, share_seconds, None, socket_options),
                    self.deadline,
                )
            except (httpcore2.NetworkError, httpcore2.TimeoutException):
                continue
        raise httpcore2.ConnectError

    def vet_addresses(self, host: str) -> list[str]:
        """Return the host's addresses, or none if any of them is forbidden."""
        try:
            candidates = self.resolve(host)
            is_allowed = all(
                text in self.permitted_addresses or is_public_address(ipaddress.ip_address(text)) for text in candidates
            )
        except (OSError, ValueError):  # an unknown or invalid name
            return []
        return candidates if is_allowed else []


# ---------------------------------------------------------------- media by URL

REDIRECT_STATUSES, MAX_REDIRECTS = (301, 302, 303, 307, 308), 3
MEDIA_TYPE_PATTERN = re.compile(r"(image|video)/[\w.+-]+|(application|binary)/octet-stream", re.IGNORECASE)
DEFAULT_PORTS = {"http": 80, "https": 443}
HOST_PATTERN = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*|[0-9a-f:.]+")


def fetch_media(
    url: str, allowed_hosts: Collection[str], max_bytes: int, timeout_seconds: float, *,
    extra_ports: Collection[int] = (), permitted_addresses: Collection[str] = (),
    resolve: Callable[[str], list[str]] = resolve_addresses,
    tls_context: ssl.SSLContext | None = None, field: str = "url",
) -> bytes:  # fmt: skip
    """Return the content of an http(s) URL: at most `max_bytes` within `timeout_seconds`, with at most 3 redirects.

    `allowed_hosts` are host names; ".example.org" allows that name and its subdomains, and an empty list turns fetching
    off. `extra_ports` are allowed besides 80 and 443. Name resolution is not covered by the timeout. Raise
    InvalidInput if the media cannot be fetched.

    For tests: `permitted_addresses` need not be public; `resolve` and `tls_context` replace the system's.
    """
    assert not isinstance(allowed_hosts, str)
    fetcher = MediaFetcher(
        field,
        tuple(allowed_hosts),
        max_bytes,
        timeout_seconds,
        time.monotonic() + timeout_seconds,
        tuple(extra_ports),
        tls_context,
    )
    backend = PublicOnlyBackend(fetcher.deadline, tuple(permitted_addresses), resolve)
    for _ in range(1 + MAX_REDIRECTS):
        result = fetcher.request_once(url, backend)
        if isinstance(result, bytes):
            return result
        url = result
    fetcher.refuse_url(f"is redirected more than {MAX_REDIRECTS} times; allowed: the address of the file itself")


@dataclass(frozen=True)
class MediaFetcher:
    """One fetch with its limits and its deadline."""

    field: str
    allowed_hosts: tuple[str, ...]
    max_bytes: int
    timeout_seconds: float
    deadline: float
    extra_ports: tuple[int, ...]
    tls_context: ssl.SSLContext | None

    def refuse_url(self, problem: str) -> NoReturn:
        """Raise InvalidInput."""
        raise InvalidInput(self.field, problem)

    def check_url(self, url: str) -> tuple[SplitResult, str, int]:
        """Return the URL's parts, its host and its port; raise InvalidInput if it is not allowed.

        Characters that parsers treat differently (blanks, backslashes, non-ASCII) are refused before parsing.
        """
        if not self.allowed_hosts:
            self.refuse_url("fetching by URL is disabled; allowed: an upload, or a data: URL")
        if not re.fullmatch(r"[!-\[\]-~]{1,4096}", url):
            self.refuse_url("is not a URL; allowed: up to 4096 ASCII characters without blanks and backslashes")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            self.refuse_url("is not a URL; allowed: http:// or https://, a host, a path")
        default_port = DEFAULT_PORTS.get(parts.scheme)
        if default_port is None:
            self.refuse_url("has another scheme; allowed: http, https")
        if "@" in parts.netloc:
            self.refuse_url("contains a user name or a password; allowed: none")
        if not HOST_PATTERN.fullmatch(host) or not any(
            is_host_match(host, pattern.lower()) for pattern in self.allowed_hosts
        ):
            self.refuse_url(
                "names a host that media may not be fetched from; allowed: the hosts that this service lists"
            )
        if port not in (None, default_port, *self.extra_ports):
            self.refuse_url(f"names another port; allowed: {', '.join(map(str, (default_port, *self.extra_ports)))}")
        return parts, host, port or default_port

    def request_once(self, url: str, backend: httpcore2.NetworkBackend) -> bytes | str:
        """Return the body, or the URL of a redirect."""
        parts, host, port = self.check_url(url)
        netloc = f"[{host}]" if ":" in host else host
        headers = [
            ("Host", netloc if port == DEFAULT_PORTS[parts.scheme] else f"{netloc}:{port}"),
            ("User-Agent", "omnivideo"), ("Accept", "image/*, video/*"),
            ("Accept-Encoding", "identity"), ("Connection", "close"),
        ]  # fmt: skip
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        request_url = httpcore2.URL(scheme=parts.scheme, host=host, port=port, target=target)
        tls_context = (self.tls_context or create_tls_context()) if parts.scheme == "https" else None
        try:
            with (
                httpcore2.ConnectionPool(ssl_context=tls_context, network_backend=backend) as pool,
                pool.stream("GET", request_url, headers=headers) as response,
            ):
                return self.read_response(url, response)
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
            self.refuse_url("the host cannot be reached; allowed: a public address that responds")
        except httpcore2.TimeoutException:
            self.refuse_url(
                f"takes more than {self.timeout_seconds:g} seconds; allowed: a smaller file or a faster host"
            )
        except (httpcore2.NetworkError, httpcore2.ProtocolError):
            self.refuse_url("the host's response is incomplete or is not HTTP; allowed: a complete response")

    def read_response(self, url: str, response: httpcore2.Response) -> bytes | str:
        """Return the body of a complete response, or the URL of a redirect."""
        header = {name.decode().lower(): value.decode("latin-1").strip() for name, value in response.headers}
        if response.status in REDIRECT_STATUSES and "location" in header:
            try:
                return urljoin(url, header["location"])
            except ValueError:
                self.refuse_url("redirects to an address that is not a URL; allowed: the address of the file itself")
        if response.status != 200:
            self.refuse_url(f"the host responds with status {response.status}; allowed: 200")
        if not MEDIA_TYPE_PATTERN.fullmatch(header.get("content-type", "").partition(";")[0].strip()):
            self.refuse_url("is not an image or video by its Content-Type; allowed: image/*, video/*, octet-stream")
        if header.get("content-encoding", "identity").lower() != "identity":  # it could be a decompression bomb
            self.refuse_url("is sent compressed; allowed: the file without compression")
        return self.read_body(response, header.get("content-length", ""))

    def read_body(self, response: httpcore2.Response, content_length: str) -> bytes:
        """Read the body up to the limit; the declared length only avoids reading a body that is too long."""
        data = bytearray()
        if content_length.isdecimal() and int(content_length) > self.max_bytes:
            self.refuse_url(f"has more than {self.max_bytes} bytes; allowed: 1 to {self.max_bytes}")
        for chunk in response.iter_stream():
            data += chunk
            if len(data) > self.max_bytes:
                self.refuse_url(f"has more than {self.max_bytes} bytes; allowed: 1 to {self.max_bytes}")
        return bytes(data)


def is_host_match(host: str, pattern: str) -> bool:
    """Return whether an allowed name matches the host."""
    return host == pattern.lstrip(".") or (pattern.startswith(".") and host.endswith(pattern))

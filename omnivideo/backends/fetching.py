"""Media by URL, from allowed hosts at public addresses only.

Each step of a fetch is looked at from the start: the URL's form, its host against the list, every address that the
name has.  The connection then goes to the very address that was looked at.  Errors tell no more than the user knew:
an address that may not be reached reads as one that cannot be.
"""

import functools
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

# ---------------------------------------------------------------- addresses

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is given out; mapped, NAT64 and local ones lie outside
# Global by their registries, and yet a way inside: tunnels that carry an IPv4 address, relays, clouds' own services.
INSIDE = [ipaddress.ip_network(net) for net in (
    "2001::/23", "2002::/16", "3fff::/20", "192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32",
)]  # fmt: skip


def is_public(address: Address) -> bool:
    """Whether it is some machine of the open internet: not private, local, shared, reserved, multicast or a tunnel."""
    if address.version == 6 and address not in UNICAST:
        return False
    special = address.is_multicast or address.is_reserved or address.is_unspecified or not address.is_global
    return not special and not any(address.version == net.version and address in net for net in INSIDE)


def addresses(host: str) -> list[str]:
    """All the addresses that the system's resolver gives for a name."""
    return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)))


@dataclass(frozen=True)
class Timed(httpcore2.NetworkStream):
    """A connection of which every wait ends at the deadline, however little comes at a time."""

    stream: httpcore2.NetworkStream
    deadline: float

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.stream.read(max_bytes, left(self.deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, left(self.deadline))

    def close(self) -> None:
        self.stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return Timed(self.stream.start_tls(ssl_context, server_hostname, left(self.deadline)), self.deadline)


def left(deadline: float) -> float:
    """Seconds to the deadline; raises ReadTimeout after it."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise httpcore2.ReadTimeout
    return seconds


@dataclass(frozen=True)
class PublicOnly(httpcore2.SyncBackend):
    """Connects to the very addresses that it has looked at: a name that is asked once cannot answer twice."""

    deadline: float
    permitted: Collection[str]
    resolve: Callable[[str], list[str]]

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:  # fmt: skip
        found = self.vetted(host)
        for waiting in range(len(found), 0, -1):  # each address gets its share of the time
            try:
                share = left(self.deadline) / waiting
                return Timed(super().connect_tcp(found[-waiting], port, share, None, socket_options), self.deadline)
            except (httpcore2.NetworkError, httpcore2.TimeoutException):
                continue
        raise httpcore2.ConnectError

    def vetted(self, host: str) -> list[str]:
        """The host's addresses; none where one of them may not be reached."""
        try:
            found = self.resolve(host)
            open_to_us = all(text in self.permitted or is_public(ipaddress.ip_address(text)) for text in found)
        except (OSError, ValueError):  # no such name, or what is no name
            return []
        return found if open_to_us else []


# ---------------------------------------------------------------- media by URL

REDIRECTS, MOST_REDIRECTS = (301, 302, 303, 307, 308), 3
MEDIA_TYPE = re.compile(r"(image|video)/[\w.+-]+|(application|binary)/octet-stream", re.IGNORECASE)
PORTS = {"http": 80, "https": 443}
HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*|[0-9a-f:.]+")


def fetch(
    url: str, allowed: Collection[str], most: int, seconds: float, *, ports: Collection[int] = (),
    permitted: Collection[str] = (), resolve: Callable[[str], list[str]] = addresses,
    tls: ssl.SSLContext | None = None, field: str = "url",
) -> bytes:  # fmt: skip
    """What an http(s) URL gives: at most `most` bytes within `seconds` in all, through at most 3 redirects.

    `allowed` are host names; ".example.org" stands for that name and all below it; none at all turns fetching off.
    `ports` are allowed besides the usual ones.  The resolver alone keeps its own time.  Raises InvalidInput.

    For tests: `permitted` are addresses that need not be public, `resolve` gives a name's addresses, `tls` trusts.
    """
    assert not isinstance(allowed, str)
    fetching = Fetching(field, tuple(allowed), most, seconds, time.monotonic() + seconds, tuple(ports), tls)
    backend = PublicOnly(fetching.deadline, tuple(permitted), resolve)
    for _ in range(1 + MOST_REDIRECTS):
        found = fetching.got(url, backend)
        if isinstance(found, bytes):
            return found
        url = found
    fetching.refuse(f"is sent on more than {MOST_REDIRECTS} times; allowed: the address of the file itself")


@functools.cache
def trust() -> ssl.SSLContext:
    """The system's certificates, read once: that takes longer than many a fetch."""
    return httpcore2.default_ssl_context()


@dataclass(frozen=True)
class Fetching:
    """One fetch: what it may do, and until when."""

    field: str
    allowed: tuple[str, ...]
    most: int
    seconds: float
    deadline: float
    ports: tuple[int, ...]
    tls: ssl.SSLContext | None

    def refuse(self, what: str) -> NoReturn:
        raise InvalidInput(self.field, what)

    def checked(self, url: str) -> tuple[SplitResult, str, int]:
        """The URL's parts, its host and its port.

        What parsers read differently (blanks, backslashes, letters beyond ASCII) is refused before one has read it.
        """
        if not self.allowed:
            self.refuse("fetching by URL is off here; allowed: an upload, or a data: URL")
        if not re.fullmatch(r"[!-\[\]-~]{1,4096}", url):
            self.refuse("is no URL; allowed: up to 4096 ASCII characters without blanks and backslashes")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            self.refuse("is no URL; allowed: http:// or https://, a host, a path")
        usual = PORTS.get(parts.scheme)
        if usual is None:
            self.refuse("has another scheme; allowed: http, https")
        if "@" in parts.netloc:
            self.refuse("holds a user name or a password; allowed: none")
        if not HOST.fullmatch(host) or not any(matches(host, name.lower()) for name in self.allowed):
            self.refuse("names a host that media may not be fetched from; allowed: the hosts that this service lists")
        if port not in (None, usual, *self.ports):
            self.refuse(f"names another port; allowed: {', '.join(map(str, (usual, *self.ports)))}")
        return parts, host, port or usual

    def got(self, url: str, backend: httpcore2.NetworkBackend) -> bytes | str:
        """The body, or the URL that it is sent on to."""
        parts, host, port = self.checked(url)
        netloc = f"[{host}]" if ":" in host else host
        headers = [
            ("Host", netloc if port == PORTS[parts.scheme] else f"{netloc}:{port}"), ("User-Agent", "omnivideo"),
            ("Accept", "image/*, video/*"), ("Accept-Encoding", "identity"), ("Connection", "close"),
        ]  # fmt: skip
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        where = httpcore2.URL(scheme=parts.scheme, host=host, port=port, target=target)
        tls = (self.tls or trust()) if parts.scheme == "https" else None
        try:
            with (
                httpcore2.ConnectionPool(ssl_context=tls, network_backend=backend) as pool,
                pool.stream("GET", where, headers=headers) as response,
            ):
                return self.read(url, response)
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
            self.refuse("the host cannot be reached; allowed: a public address that answers")
        except httpcore2.TimeoutException:
            self.refuse(f"takes more than {self.seconds:g} seconds; allowed: a smaller file or a faster host")
        except (httpcore2.NetworkError, httpcore2.ProtocolError):
            self.refuse("the host's answer breaks off or is no HTTP; allowed: a whole answer")

    def read(self, url: str, response: httpcore2.Response) -> bytes | str:
        header = {name.decode().lower(): value.decode("latin-1").strip() for name, value in response.headers}
        if response.status in REDIRECTS and "location" in header:
            try:
                return urljoin(url, header["location"])
            except ValueError:
                self.refuse("is sent on to what is no URL; allowed: the address of the file itself")
        if response.status != 200:
            self.refuse(f"the host answers with status {response.status}; allowed: 200")
        if not MEDIA_TYPE.fullmatch(header.get("content-type", "").partition(";")[0].strip()):
            self.refuse("is neither image nor video by its Content-Type; allowed: image/*, video/*, octet-stream")
        if header.get("content-encoding", "identity").lower() != "identity":  # a bomb, when it is unpacked
            self.refuse("is sent compressed; allowed: the file as it is")
        return self.body(response, header.get("content-length", ""))

    def body(self, response: httpcore2.Response, said: str) -> bytes:
        """The bytes as they come: the stated length is a hint that spares the reading, no more."""
        data = bytearray()
        if said.isdecimal() and int(said) > self.most:
            self.refuse(f"has more than {self.most} bytes; allowed: 1 to {self.most}")
        for piece in response.iter_stream():
            data += piece
            if len(data) > self.most:
                self.refuse(f"has more than {self.most} bytes; allowed: 1 to {self.most}")
        return bytes(data)


def matches(host: str, name: str) -> bool:
    """Whether an allowed name lets the host in."""
    return host == name.lstrip(".") or (name.startswith(".") and host.endswith(name))

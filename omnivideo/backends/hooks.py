"""What webhooks are told: each end of a video once, signed, and again until the other side has taken it.

An event is in the database before its job counts as announced, under an id that follows from job and hook: whoever
comes twice, or dies in between, adds nothing.  A delivery is tried by one process at a time; one that dies with it
leaves it to the next after LEASE seconds, so that a hook may hear the same id twice, and never none.
"""

import base64
import hashlib
import hmac
import json
import logging
import re
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn
from urllib.parse import SplitResult, urlsplit

import httpcore2

from omnivideo.backends.fetching import HOST, PORTS, PublicOnly, addresses, matches, trust
from omnivideo.errors import InvalidInput, OmniVideoError
from omnivideo.storage.records import Records

log = logging.getLogger("omnivideo.hooks")
SECONDS = 10.0  # that one try may take
LEASE = 60.0  # more than a try can take
AT_ONCE = 8  # tries
DAY = 86_400.0  # after which nothing is tried again
EVENTS = {"done": "video.completed", "failed": "video.failed"}


# ---------------------------------------------------------------- where to


def target(url: str, inside: Collection[str]) -> tuple[SplitResult, str, int]:
    """The URL's parts, host and port; raises InvalidInput for what may not be called.

    As with media, what parsers read differently is refused before one has read it.  Hosts in `inside` are the
    operator's own: any address and port will do for them.
    """
    if not re.fullmatch(r"[!-\[\]-~]{1,2000}", url):
        refuse("is no URL; allowed: up to 2000 ASCII characters without blanks and backslashes")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        refuse("is no URL; allowed: https:// or http://, a host, a path")
    if parts.scheme not in PORTS or "@" in parts.netloc or not HOST.fullmatch(host):
        refuse("is not what can be called; allowed: https:// or http://, a host, no user name")
    usual = PORTS[parts.scheme]
    if port not in (None, usual) and not listed(host, inside):
        refuse(f"names another port; allowed: {usual}")
    return parts, host, port or usual


def refuse(what: str) -> NoReturn:
    raise InvalidInput("url", what)


def listed(host: str, inside: Collection[str]) -> bool:
    return any(matches(host, name.lower()) for name in inside)


def route(host: str, inside: Collection[str], deadline: float) -> PublicOnly:
    """Connects to public addresses only, or to wherever a listed host is."""
    if not listed(host, inside):
        return PublicOnly(deadline, (), addresses)
    try:
        found = addresses(host)
    except OSError:
        found = []
    return PublicOnly(deadline, found, lambda name: found)


def reachable(url: str, inside: Collection[str] = ()) -> None:
    """Raises InvalidInput for a URL that will not be called: said at once, though each call looks again."""
    _, host, _ = target(url, inside)
    if not route(host, inside, time.monotonic() + SECONDS).vetted(host):
        refuse("the host cannot be reached; allowed: a public address")


# ---------------------------------------------------------------- what is sent


def signature(secret: str, name: str, moment: int, body: bytes) -> str:
    """`v1,<base64>`: HMAC-SHA256 over id, time and body, as standardwebhooks.com has it."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    made = hmac.new(key, f"{name}.{moment}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(made).decode()}"


def send(url: str, secret: str, name: str, event: dict[str, Any], inside: Collection[str]) -> int:
    """One try; the answer's status.  Redirects are not followed, and the answer's body is not read."""
    parts, host, port = target(url, inside)
    body, moment = json.dumps(event).encode(), int(time.time())
    netloc = f"[{host}]" if ":" in host else host
    headers = [
        ("Host", netloc if port == PORTS[parts.scheme] else f"{netloc}:{port}"), ("User-Agent", "omnivideo"),
        ("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close"),
        ("webhook-id", name), ("webhook-timestamp", str(moment)),
        ("webhook-signature", signature(secret, name, moment, body)),
    ]  # fmt: skip
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    where = httpcore2.URL(scheme=parts.scheme, host=host, port=port, target=path)
    backend = route(host, inside, time.monotonic() + SECONDS)
    tls = trust() if parts.scheme == "https" else None
    with (
        httpcore2.ConnectionPool(ssl_context=tls, network_backend=backend) as pool,
        pool.stream("POST", where, headers=headers, content=body) as response,
    ):
        return response.status


class HookSender:
    """Announces and delivers in threads of this process.  Any number of processes may.

    `first` is the pause after the first failure, in seconds; it doubles with each.
    """

    def __init__(self, records: Records, inside: Collection[str] = (), pause: float = 0.5, first: float = 5.0):
        self.records = records
        self.inside = tuple(inside)
        self.pause = pause
        self.first = first
        self.over = threading.Event()
        self.pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="hook")
        self.under_way: set[Future[None]] = set()
        self.thread = threading.Thread(target=self.run, daemon=True, name="hooks")

    def start(self) -> "HookSender":
        self.thread.start()
        return self

    def stop(self) -> None:
        self.over.set()
        self.thread.join()
        self.pool.shutdown()

    def run(self) -> None:
        tidied = 0.0
        while not self.over.wait(self.pause):
            try:
                self.announce()
                self.deliver()
                if time.monotonic() - tidied > 3600:
                    self.records.tidy()
                    tidied = time.monotonic()
            except OmniVideoError as error:
                log.warning("%s", error)
            except Exception:
                log.exception("webhooks")

    def announce(self) -> None:
        """Puts what has ended before the hooks that wanted to know then."""
        while jobs := self.records.unannounced("video", 100):
            hooks = self.records.hooks_of({job.owner for job in jobs})
            there = [
                (job, hook) for job in jobs for hook in hooks if hook.owner == job.owner and hook.made <= job.ended
            ]
            events = [made(job, hook) for job, hook in there]
            wanted = [(name, hook.id, body) for name, hook, body in events if body["type"] in hook.events]
            if wanted:
                self.records.deliver(wanted)
            self.records.announced([job.id for job in jobs])

    def deliver(self) -> None:
        """Tries what is due, as far as there is a free thread; a host that is slow to answer holds up no announcing."""
        self.under_way = {one for one in self.under_way if not one.done()}
        if free := AT_ONCE - len(self.under_way):
            self.under_way |= {self.pool.submit(self.tried, *pair) for pair in self.records.due(free, LEASE)}

    def tried(self, delivery: Any, hook: Any) -> None:
        if hook is None:
            self.records.delivered(delivery.id)
            return
        try:
            status = send(hook.url, hook.secret, delivery.id, delivery.body, self.inside)
        except Exception as error:  # whatever the other side does is one failed try
            log.info("webhook %s: %s: %s", hook.id, delivery.id, type(error).__name__)
            status = 0
        if 200 <= status < 300:
            self.records.delivered(delivery.id)
            return
        wait = min(self.first * 2.0 ** (delivery.tries - 1), DAY)
        if time.time() + wait > delivery.body["created_at"] + DAY:
            log.warning("webhook %s: %s was not taken within a day", hook.id, delivery.id)
            self.records.delivered(delivery.id)
        else:
            self.records.put_off(delivery.id, wait)


def made(job: Any, hook: Any) -> tuple[str, Any, dict[str, Any]]:
    """An event's id, its hook and its body."""
    name = f"evt_{hashlib.sha256(f'{job.id} {hook.id}'.encode()).hexdigest()[:32]}"
    body = {
        "id": name, "object": "event", "created_at": int(job.ended), "type": EVENTS[job.state],
        "data": {"id": job.id},
    }  # fmt: skip
    return name, hook, body

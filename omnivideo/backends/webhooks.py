"""What webhooks are told: each end of a video once, signed, and again until the other side has taken it.

An event is in the database before its job counts as announced, under an id that follows from job and hook: whoever
comes twice, or dies in between, adds nothing.  A delivery is tried by one process at a time; one that dies with it
leaves it to the next after DELIVERY_LEASE_SECONDS, so that a hook may hear the same id twice, and never none.
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

from omnivideo.errors import InvalidInput, OmniVideoError
from omnivideo.media.fetch import (
    DEFAULT_PORTS,
    HOST_PATTERN,
    PublicOnlyBackend,
    is_host_match,
    load_tls_context,
    resolve_addresses,
)
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.webhooks import WebhookRepository

log = logging.getLogger("omnivideo.hooks")
DELIVERY_TIMEOUT_SECONDS = 10.0  # that one try may take
DELIVERY_LEASE_SECONDS = 60.0  # more than a try can take
MAX_CONCURRENT_DELIVERIES = 8  # tries
RETRY_WINDOW_SECONDS = 86_400.0  # after which nothing is tried again
EVENT_TYPE_BY_STATE = {"done": "video.completed", "failed": "video.failed"}


# ---------------------------------------------------------------- where to


def parse_webhook_url(url: str, internal_hosts: Collection[str]) -> tuple[SplitResult, str, int]:
    """The URL's parts, host and port; raises InvalidInput for what may not be called.

    As with media, what parsers read differently is refused before one has read it.  Hosts in `internal_hosts` are the
    operator's own: any address and port will do for them.
    """
    if not re.fullmatch(r"[!-\[\]-~]{1,2000}", url):
        refuse_url("is no URL; allowed: up to 2000 ASCII characters without blanks and backslashes")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        refuse_url("is no URL; allowed: https:// or http://, a host, a path")
    if parts.scheme not in DEFAULT_PORTS or "@" in parts.netloc or not HOST_PATTERN.fullmatch(host):
        refuse_url("is not what can be called; allowed: https:// or http://, a host, no user name")
    default_port = DEFAULT_PORTS[parts.scheme]
    if port not in (None, default_port) and not is_internal_host(host, internal_hosts):
        refuse_url(f"names another port; allowed: {default_port}")
    return parts, host, port or default_port


def refuse_url(problem: str) -> NoReturn:
    raise InvalidInput("url", problem)


def is_internal_host(host: str, internal_hosts: Collection[str]) -> bool:
    return any(is_host_match(host, pattern.lower()) for pattern in internal_hosts)


def build_backend(host: str, internal_hosts: Collection[str], deadline: float) -> PublicOnlyBackend:
    """Connects to public addresses only, or to wherever a listed host is."""
    if not is_internal_host(host, internal_hosts):
        return PublicOnlyBackend(deadline, (), resolve_addresses)
    try:
        resolved_addresses = resolve_addresses(host)
    except OSError:
        resolved_addresses = []
    return PublicOnlyBackend(deadline, resolved_addresses, lambda name: resolved_addresses)


def check_reachable(url: str, internal_hosts: Collection[str] = ()) -> None:
    """Raises InvalidInput for a URL that will not be called: said at once, though each call looks again."""
    _, host, _ = parse_webhook_url(url, internal_hosts)
    if not build_backend(host, internal_hosts, time.monotonic() + DELIVERY_TIMEOUT_SECONDS).vet_addresses(host):
        refuse_url("the host cannot be reached; allowed: a public address")


# ---------------------------------------------------------------- what is sent


def sign_event(secret: str, event_id: str, timestamp: int, body: bytes) -> str:
    """`v1,<base64>`: HMAC-SHA256 over id, time and body, as standardwebhooks.com has it."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def send_event(url: str, secret: str, event_id: str, event: dict[str, Any], internal_hosts: Collection[str]) -> int:
    """One try; the answer's status.  Redirects are not followed, and the answer's body is not read."""
    parts, host, port = parse_webhook_url(url, internal_hosts)
    body, timestamp = json.dumps(event).encode(), int(time.time())
    netloc = f"[{host}]" if ":" in host else host
    headers = [
        ("Host", netloc if port == DEFAULT_PORTS[parts.scheme] else f"{netloc}:{port}"), ("User-Agent", "omnivideo"),
        ("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close"),
        ("webhook-id", event_id), ("webhook-timestamp", str(timestamp)),
        ("webhook-signature", sign_event(secret, event_id, timestamp, body)),
    ]  # fmt: skip
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    request_url = httpcore2.URL(scheme=parts.scheme, host=host, port=port, target=path)
    backend = build_backend(host, internal_hosts, time.monotonic() + DELIVERY_TIMEOUT_SECONDS)
    tls_context = load_tls_context() if parts.scheme == "https" else None
    with (
        httpcore2.ConnectionPool(ssl_context=tls_context, network_backend=backend) as pool,
        pool.stream("POST", request_url, headers=headers, content=body) as response,
    ):
        return response.status


class WebhookSender:
    """Announces and delivers in threads of this process.  Any number of processes may.

    `first_retry_seconds` is the pause after the first failure, in seconds; it doubles with each.
    """

    def __init__(
        self,
        webhooks: WebhookRepository,
        jobs: JobRepository,
        internal_hosts: Collection[str] = (),
        poll_seconds: float = 0.5,
        first_retry_seconds: float = 5.0,
    ):
        self.webhooks = webhooks
        self.jobs = jobs
        self.internal_hosts = tuple(internal_hosts)
        self.poll_seconds = poll_seconds
        self.first_retry_seconds = first_retry_seconds
        self.stop_event = threading.Event()
        self.executor = ThreadPoolExecutor(MAX_CONCURRENT_DELIVERIES, thread_name_prefix="hook")
        self.in_flight: set[Future[None]] = set()
        self.thread = threading.Thread(target=self.run, daemon=True, name="hooks")

    def start(self) -> "WebhookSender":
        self.thread.start()
        return self

    def stop(self) -> None:
        self.stop_event.set()
        self.thread.join()
        self.executor.shutdown()

    def run(self) -> None:
        last_tidied_at = 0.0
        while not self.stop_event.wait(self.poll_seconds):
            try:
                self.announce_ended_jobs()
                self.send_due_deliveries()
                if time.monotonic() - last_tidied_at > 3600:
                    self.webhooks.delete_old_deliveries()
                    last_tidied_at = time.monotonic()
            except OmniVideoError as error:
                log.warning("%s", error)
            except Exception:
                log.exception("webhooks")

    def announce_ended_jobs(self) -> None:
        """Puts what has ended before the hooks that wanted to know then."""
        while jobs := self.jobs.list_unannounced_jobs("video", 100):
            hooks = self.webhooks.list_webhooks_of_owners({job.owner for job in jobs})
            matching_pairs = [
                (job, hook)
                for job in jobs
                for hook in hooks
                if hook.owner == job.owner and hook.created_at <= job.ended_at
            ]
            events = [build_event(job, hook) for job, hook in matching_pairs]
            deliveries = [
                (event_id, hook.id, body) for event_id, hook, body in events if body["type"] in hook.event_types
            ]
            if deliveries:
                self.webhooks.enqueue_deliveries(deliveries)
            self.jobs.mark_announced([job.id for job in jobs])

    def send_due_deliveries(self) -> None:
        """Tries what is due, as far as there is a free thread; a host that is slow to answer holds up no announcing."""
        self.in_flight = {future for future in self.in_flight if not future.done()}
        if free_slots := MAX_CONCURRENT_DELIVERIES - len(self.in_flight):
            self.in_flight |= {
                self.executor.submit(self.attempt_delivery, *pair)
                for pair in self.webhooks.claim_due_deliveries(free_slots, DELIVERY_LEASE_SECONDS)
            }

    def attempt_delivery(self, delivery: Any, hook: Any) -> None:
        if hook is None:
            self.webhooks.complete_delivery(delivery.id)
            return
        try:
            status = send_event(hook.url, hook.secret, delivery.id, delivery.body, self.internal_hosts)
        except Exception as error:  # whatever the other side does is one failed try
            log.info("webhook %s: %s: %s", hook.id, delivery.id, type(error).__name__)
            status = 0
        if 200 <= status < 300:
            self.webhooks.complete_delivery(delivery.id)
            return
        retry_seconds = min(self.first_retry_seconds * 2.0 ** (delivery.attempts - 1), RETRY_WINDOW_SECONDS)
        if time.time() + retry_seconds > delivery.body["created_at"] + RETRY_WINDOW_SECONDS:
            log.warning("webhook %s: %s was not taken within a day", hook.id, delivery.id)
            self.webhooks.complete_delivery(delivery.id)
        else:
            self.webhooks.postpone_delivery(delivery.id, retry_seconds)


def build_event(job: Any, hook: Any) -> tuple[str, Any, dict[str, Any]]:
    """An event's id, its hook and its body."""
    event_id = f"evt_{hashlib.sha256(f'{job.id} {hook.id}'.encode()).hexdigest()[:32]}"
    body = {
        "id": event_id, "object": "event", "created_at": int(job.ended_at), "type": EVENT_TYPE_BY_STATE[job.state],
        "data": {"id": job.id},
    }  # fmt: skip
    return event_id, hook, body

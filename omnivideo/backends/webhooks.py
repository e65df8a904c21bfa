"""Webhooks: send a signed event when a video ends, and retry until the receiver accepts it.

Events are written to the database before their job is marked as announced, with ids derived from job and webhook, so a
process that dies in between causes neither lost nor duplicate events in the database. One process at a time attempts a
delivery. If it dies, another one takes over after DELIVERY_LEASE_SECONDS. A receiver may therefore get an event twice,
with the same id, but never misses one.

A sender is woken by the ends of jobs and by new deliveries, and it wakes itself when a retry falls due.
"""

import base64
import hashlib
import hmac
import json
import logging
import math
import re
import threading
import time
from collections import Counter
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
    resolve_addresses,
)
from omnivideo.network import create_tls_context
from omnivideo.records import WebhookRecord
from omnivideo.storage.database.jobs import EndedJob, JobRepository
from omnivideo.storage.database.notifications import Watch
from omnivideo.storage.database.webhooks import DeliveryRecord, WebhookRepository

log = logging.getLogger("omnivideo.hooks")
DELIVERY_TIMEOUT_SECONDS = 10.0  # of one attempt
DELIVERY_LEASE_SECONDS = 60.0  # longer than an attempt can take
MAX_CONCURRENT_DELIVERIES = 8
MAX_DELIVERIES_PER_OWNER = 5  # of one owner at a time; slow receivers leave threads to others
POLL_SECONDS = 5.0  # in case a notification was lost
MIN_ROUND_SECONDS = 0.02  # so that jobs that end together are announced in one round
RETRY_WINDOW_SECONDS = 86_400.0  # after the job's end; later failures are not retried
EVENT_TYPE_BY_STATE = {"done": "video.completed", "failed": "video.failed", "cancelled": "video.cancelled"}


# ---------------------------------------------------------------- addresses


def parse_webhook_url(url: str, internal_hosts: Collection[str]) -> tuple[SplitResult, str, int]:
    """Return the URL's parts, host and port. Raises InvalidInput for a URL that must not be called.

    Characters that parsers interpret differently are refused before any parser runs, as for media. Hosts in
    `internal_hosts` belong to the operator and may have any address and port.
    """
    if not re.fullmatch(r"[!-\[\]-~]{1,2000}", url):
        refuse_url("is not a URL; allowed: up to 2000 ASCII characters without spaces or backslashes")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        refuse_url("is not a URL; allowed: https:// or http://, a host, a path")
    if parts.scheme not in DEFAULT_PORTS or "@" in parts.netloc or not HOST_PATTERN.fullmatch(host):
        refuse_url("cannot be called; allowed: https:// or http://, a host, no user name")
    default_port = DEFAULT_PORTS[parts.scheme]
    if port not in (None, default_port) and not is_internal_host(host, internal_hosts):
        refuse_url(f"has port {port}; allowed: {default_port}")
    return parts, host, port or default_port


def refuse_url(problem: str) -> NoReturn:
    raise InvalidInput("url", problem)


def is_internal_host(host: str, internal_hosts: Collection[str]) -> bool:
    return any(is_host_match(host, pattern.lower()) for pattern in internal_hosts)


def build_backend(host: str, internal_hosts: Collection[str], deadline: float) -> PublicOnlyBackend:
    """Return a network backend that connects to public addresses only, or to any address of an internal host."""
    if not is_internal_host(host, internal_hosts):
        return PublicOnlyBackend(deadline, (), resolve_addresses)
    try:
        resolved_addresses = resolve_addresses(host)
    except OSError:
        resolved_addresses = []
    return PublicOnlyBackend(deadline, resolved_addresses, lambda name: resolved_addresses)


def check_reachable(url: str, internal_hosts: Collection[str] = ()) -> None:
    """Raise InvalidInput for a URL that cannot be called. Every later delivery checks the address again."""
    _, host, _ = parse_webhook_url(url, internal_hosts)
    if not build_backend(host, internal_hosts, time.monotonic() + DELIVERY_TIMEOUT_SECONDS).vet_addresses(host):
        refuse_url("the host cannot be reached; allowed: a public address")


# ---------------------------------------------------------------- events


def sign_event(secret: str, event_id: str, timestamp: int, body: bytes) -> str:
    """Return the signature `v1,<base64>`: HMAC-SHA256 of id, time and body, as defined by standardwebhooks.com."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def send_event(url: str, secret: str, event_id: str, event: dict[str, Any], internal_hosts: Collection[str]) -> int:
    """Send an event once and return the response's status. Redirects are not followed; the body is not read."""
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
    tls_context = create_tls_context() if parts.scheme == "https" else None
    with (
        httpcore2.ConnectionPool(ssl_context=tls_context, network_backend=backend) as pool,
        pool.stream("POST", request_url, headers=headers, content=body) as response,
    ):
        return response.status


class WebhookSender:
    """Announces ended jobs and delivers events, in threads of this process. Several processes may do so at once.

    The database is read at each notification and every `poll_seconds`. `first_retry_seconds` is the pause after the
    first failed attempt. It doubles with each further one.
    """

    def __init__(
        self,
        webhooks: WebhookRepository,
        jobs: JobRepository,
        internal_hosts: Collection[str] = (),
        poll_seconds: float = POLL_SECONDS,
        first_retry_seconds: float = 5.0,
    ):
        self.webhooks = webhooks
        self.jobs = jobs
        self.internal_hosts = tuple(internal_hosts)
        self.poll_seconds = poll_seconds
        self.first_retry_seconds = first_retry_seconds
        self.watch: Watch | None = None
        self.last_cleanup_at = -math.inf
        self.stop_event = threading.Event()
        self.executor = ThreadPoolExecutor(MAX_CONCURRENT_DELIVERIES, thread_name_prefix="hook")
        self.in_flight: dict[Future[None], str | None] = {}  # the owner of each delivery that is being sent
        self.thread = threading.Thread(target=self.run, daemon=True, name="hooks")

    def start(self) -> "WebhookSender":
        self.thread.start()
        return self

    def stop(self) -> None:
        self.stop_event.set()
        self.wake()
        self.thread.join()
        self.executor.shutdown()

    def wake(self) -> None:
        """Let the sender read the database now."""
        if self.watch is not None:
            self.watch.deliver()

    def run(self) -> None:
        with self.webhooks.watch_deliveries(self.poll_seconds) as self.watch:
            while not self.stop_event.wait(MIN_ROUND_SECONDS):
                self.watch.wait(self.run_once())

    def run_once(self) -> float:
        """Announce ended jobs and start due deliveries. Return the seconds until this must be done again."""
        try:
            self.announce_ended_jobs()
            self.send_due_deliveries()
            if time.monotonic() - self.last_cleanup_at > 3600:
                self.webhooks.delete_old_deliveries()
                self.last_cleanup_at = time.monotonic()
            if len(self.in_flight) == MAX_CONCURRENT_DELIVERIES:  # the end of an attempt wakes the sender
                return self.poll_seconds
            if self.list_full_owners():
                return self.poll_seconds
            seconds_until_due = self.webhooks.get_seconds_until_due()
            return self.poll_seconds if seconds_until_due is None else max(0.0, seconds_until_due)
        except OmniVideoError as error:
            log.warning("%s", error)
        except Exception:
            log.exception("webhooks")
        return self.poll_seconds

    def announce_ended_jobs(self) -> None:
        """Queue an event of each ended job for the webhooks that its owner had when it ended."""
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
        """Start the due deliveries for which a thread is free, without waiting for slow receivers."""
        self.in_flight = {future: owner for future, owner in self.in_flight.items() if not future.done()}
        while free_slots := MAX_CONCURRENT_DELIVERIES - len(self.in_flight):
            # Two at a time, so that an owner exceeds its limit by one at most.
            full_owners = self.list_full_owners()
            pairs = self.webhooks.claim_due_deliveries(min(free_slots, 2), DELIVERY_LEASE_SECONDS, full_owners)
            if not pairs:
                return
            for delivery, hook in pairs:
                attempt = self.executor.submit(self.attempt_delivery, delivery, hook)
                self.in_flight[attempt] = hook.owner if hook else None
                attempt.add_done_callback(lambda _: self.wake())  # a thread is free, and a retry may be scheduled

    def list_full_owners(self) -> list[str]:
        """Return the owners whose deliveries occupy all threads that one owner may have."""
        counts = Counter(owner for owner in self.in_flight.values() if owner)
        return [owner for owner, count in counts.items() if count >= MAX_DELIVERIES_PER_OWNER]

    def attempt_delivery(self, delivery: DeliveryRecord, hook: WebhookRecord | None) -> None:
        """Send an event, and schedule a retry if it fails. `hook` is None if the webhook was deleted."""
        if hook is None:
            self.webhooks.complete_delivery(delivery.id)
            return
        try:
            status = send_event(hook.url, hook.secret, delivery.id, delivery.body, self.internal_hosts)
        except Exception as error:  # any error counts as one failed attempt
            log.info("webhook %s: %s: %s", hook.id, delivery.id, type(error).__name__)
            status = 0
        if 200 <= status < 300:
            self.webhooks.complete_delivery(delivery.id)
            return
        retry_seconds = min(self.first_retry_seconds * 2.0 ** (delivery.attempts - 1), RETRY_WINDOW_SECONDS)
        if time.time() + retry_seconds > delivery.body["created_at"] + RETRY_WINDOW_SECONDS:
            log.warning("webhook %s: %s was not accepted within a day", hook.id, delivery.id)
            self.webhooks.complete_delivery(delivery.id)
        else:
            self.webhooks.postpone_delivery(delivery.id, retry_seconds)


def build_event(job: EndedJob, hook: WebhookRecord) -> tuple[str, WebhookRecord, dict[str, Any]]:
    """Return an event's id, its webhook and its body."""
    event_id = f"evt_{hashlib.sha256(f'{job.id} {hook.id}'.encode()).hexdigest()[:32]}"
    body = {
        "id": event_id, "object": "event", "created_at": int(job.ended_at), "type": EVENT_TYPE_BY_STATE[job.state],
        "data": {"id": job.id},
    }  # fmt: skip
    return event_id, hook, body

"""Notify the followers of turns and jobs of a change, in this process and in the others on the same database.

The database is the only record: a follower that misses a notification loses no event but reads it later.

- In one process, a change is delivered as soon as the statement that wrote it has been committed.
- Across processes, PostgreSQL delivers it: the statement itself calls `pg_notify`, in its own transaction. One
  connection of each process listens as long as there are followers, and reconnects when it is lost.
- SQLite cannot notify other processes. Their followers read the database every SQLITE_POLL_SECONDS. The two processes
  of one service pass each other their changes instead, with `forward_to` and `deliver`.

On PostgreSQL, followers read the database every POSTGRESQL_POLL_SECONDS as well, in case a notification was lost. A
pooler in transaction mode passes no notifications on. The listener finds this out by a notification to itself, and
followers then read the database every SQLITE_POLL_SECONDS.
"""

import asyncio
import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import URL, ColumnElement, Engine, String, cast, func, literal, null

from omnivideo.contracts import Change
from omnivideo.storage.database.postgres import DRIVER_OPTIONS, read_parameters

log = logging.getLogger("omnivideo.storage")
CHANNEL = "omnivideo_changes"  # of PostgreSQL's LISTEN and NOTIFY
SQLITE_POLL_SECONDS = 0.5
POSTGRESQL_POLL_SECONDS = 5.0
MAX_PAYLOAD_BYTES = 7000  # PostgreSQL allows 8000; a longer event is read from the database
LISTENER_IDLE_SECONDS = 10.0  # how long the connection keeps listening after the last follower has left
LISTEN_CHECK_SECONDS = 5.0  # how long a notification of this process to itself may take
RECHECK_SECONDS = 60.0  # until it is sent again, if none arrived
RECONNECT_SECONDS = (0.1, 5.0)  # the first and the longest pause between two attempts to connect
ANY_JOB_END = "end"
NEW_DELIVERY = "delivery"  # the topic of new deliveries to webhooks
NEW_TURN = "new-turn"  # the topic of turns that can be claimed
NEW_JOB = "new-job"  # the topic of jobs that a worker of this service can claim; brokers notify all other workers
JOB_STEP = "step"
UNRECORDED_TOPICS = (NEW_JOB, JOB_STEP)  # PostgreSQL does not deliver them


Deliver = Callable[[Change | None], None]  # None: changes may have been missed, so read the database


def turn_topic(turn_id: str) -> str:
    """Return the topic of a turn's events and of its end."""
    return f"turn {turn_id}"


def job_step_topic(job_id: str) -> str:
    """Return the topic of the steps of a job that belongs to no turn; it is published in this service only."""
    return f"{JOB_STEP} {job_id}"


def job_end_topic(job_id: str) -> str:
    """Return the topic of a job's end. Followers of ANY_JOB_END are notified as well."""
    return f"{ANY_JOB_END} {job_id}"


class Watch:
    """The notifications of a follower that runs in a thread. `get_poll_seconds` returns the poll interval."""

    def __init__(self, get_poll_seconds: Callable[[], float]):
        self.get_poll_seconds = get_poll_seconds
        self.changed = threading.Event()

    def deliver(self, change: Change | None = None) -> None:
        self.changed.set()

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait for a change, but no longer than the poll interval or `timeout_seconds`."""
        poll_seconds = self.get_poll_seconds()
        self.changed.wait(poll_seconds if timeout_seconds is None else min(timeout_seconds, poll_seconds))
        self.changed.clear()


class AsyncWatch:
    """The notifications of a follower that runs in an event loop. `get_poll_seconds` returns the poll interval."""

    def __init__(self, get_poll_seconds: Callable[[], float]):
        self.get_poll_seconds = get_poll_seconds
        self.loop = asyncio.get_running_loop()
        self.changes: asyncio.Queue[Change | None] = asyncio.Queue()

    def deliver(self, change: Change | None) -> None:
        with suppress(RuntimeError):  # the loop has been closed
            self.loop.call_soon_threadsafe(self.changes.put_nowait, change)

    async def receive(self, timeout_seconds: float | None = None) -> Change | None:
        """Return the next change, or None if the database must be read: on a timeout, or if changes were missed."""
        poll_seconds = self.get_poll_seconds()
        timeout = poll_seconds if timeout_seconds is None else min(timeout_seconds, poll_seconds)
        try:
            return await asyncio.wait_for(self.changes.get(), timeout)
        except TimeoutError:
            return None


class ChangeNotifier:
    """Deliver the changes in one database to the followers in this process."""

    def __init__(self, url: URL):
        self.url = url
        self.is_postgresql = url.get_backend_name() == "postgresql"
        self.poll_seconds = POSTGRESQL_POLL_SECONDS if self.is_postgresql else SQLITE_POLL_SECONDS
        self.process_token = secrets.token_hex(8)  # marks the notifications that this process has already delivered
        self.followers: dict[str, set[Deliver]] = {}
        self.lock = threading.Lock()
        self.listener: threading.Thread | None = None
        self.forward: Callable[[Change], None] | None = None  # to the other process of this service

    @contextmanager
    def watch(self, *topics: str, poll_seconds: float | None = None) -> Iterator[Watch]:
        """Follow topics in a thread. Read the database after entering, and again after every wait.

        `poll_seconds` replaces the database's poll interval.
        """
        watch = Watch(lambda: self.poll_seconds if poll_seconds is None else poll_seconds)
        with self.subscribe(topics, watch.deliver):
            yield watch

    @contextmanager
    def watch_async(self, *topics: str) -> Iterator[AsyncWatch]:
        """Follow topics in the running event loop. Read the database after entering."""
        watch = AsyncWatch(lambda: self.poll_seconds)
        with self.subscribe(topics, watch.deliver):
            yield watch

    @contextmanager
    def subscribe(self, topics: tuple[str, ...], deliver: Deliver) -> Iterator[None]:
        with self.lock:
            for topic in topics:
                self.followers.setdefault(topic, set()).add(deliver)
            if self.is_postgresql and self.listener is None:
                self.listener = threading.Thread(target=self.listen, daemon=True, name="listener")
                self.listener.start()
        try:
            yield
        finally:
            with self.lock:
                for topic in topics:
                    self.followers[topic].discard(deliver)
                    if not self.followers[topic]:
                        del self.followers[topic]

    @contextmanager
    def forward_to(self, send: Callable[[Change], None]) -> Iterator[None]:
        """Send the changes of this process that the database does not deliver to others to the service's other one."""
        self.forward = send
        try:
            yield
        finally:
            self.forward = None

    def publish(self, change: Change) -> None:
        """Deliver a change of this process to the followers in it, and to the service's other process."""
        self.deliver(change)
        forward, kind = self.forward, change.topic.partition(" ")[0]
        if forward is not None and not (self.is_postgresql and kind not in UNRECORDED_TOPICS):
            forward(change)

    def deliver(self, change: Change) -> None:
        """Deliver a change to the followers in this process."""
        with self.lock:
            kind = change.topic.partition(" ")[0]
            followers = {*self.followers.get(change.topic, ()), *self.followers.get(kind, ())}
        for deliver in followers:
            deliver(change)

    def build_notification(
        self, topic: ColumnElement[str], number: ColumnElement[int] | None = None, body: dict[str, Any] | None = None
    ) -> ColumnElement[Any]:
        """Return a column for RETURNING that notifies the other processes when the statement is committed."""
        if not self.is_postgresql:
            return null().label("notification")
        payload: ColumnElement[str] = literal(f"{self.process_token}\t") + topic
        if number is not None:
            text = json.dumps(body)
            is_small = len(text.encode()) <= MAX_PAYLOAD_BYTES
            payload = payload + literal("\t") + cast(number, String) + literal(f"\t{text if is_small else ''}")
        return func.pg_notify(CHANNEL, payload).label("notification")

    # ------------------------------------------------------------ PostgreSQL's notifications

    def listen(self) -> None:
        """Deliver the notifications of other processes until nobody has followed for LISTENER_IDLE_SECONDS."""
        import psycopg

        parameters = {**read_parameters(self.url), **DRIVER_OPTIONS}
        pause_seconds, idle_since = RECONNECT_SECONDS[0], time.monotonic()
        while True:
            try:
                with psycopg.connect(**parameters) as connection:
                    connection.execute(f"LISTEN {CHANNEL}")
                    self.deliver_missed()  # what was written before LISTEN took effect
                    is_notified = self.check_notifications(connection, parameters)
                    pause_seconds = RECONNECT_SECONDS[0]
                    listens_until = math.inf if is_notified else time.monotonic() + RECHECK_SECONDS
                    while time.monotonic() < listens_until:
                        for notification in connection.notifies(timeout=1.0):
                            self.deliver_payload(notification.payload)
                        idle_since = time.monotonic() if self.followers else idle_since
                        if self.stop_if_idle(idle_since):
                            return
            except psycopg.Error as error:
                if self.stop_if_idle(idle_since=-math.inf):  # without a follower there is no reason to reconnect
                    return
                log.warning("notifications: the database is not available: %s", type(error).__name__)
                time.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, RECONNECT_SECONDS[1])

    def check_notifications(self, listening: Any, parameters: dict[str, Any]) -> bool:
        """Return whether a notification from another connection arrives, and set the poll interval accordingly."""
        import psycopg

        check, is_notified = f"{self.process_token}\tcheck", False
        with psycopg.connect(**parameters) as connection:
            connection.execute("SELECT pg_notify(%s, %s)", (CHANNEL, check))
        for notification in listening.notifies(timeout=LISTEN_CHECK_SECONDS):
            if notification.payload == check:
                is_notified = True
                break
            self.deliver_payload(notification.payload)
        poll_seconds = POSTGRESQL_POLL_SECONDS if is_notified else SQLITE_POLL_SECONDS
        if poll_seconds != self.poll_seconds:
            self.poll_seconds = poll_seconds
            if not is_notified:
                log.warning(
                    "notifications: none arrive, as behind a pooler in transaction mode; the database is polled"
                )
        self.deliver_missed()  # those that came with the check, and those who wait for the longer interval
        return is_notified

    def deliver_payload(self, payload: str) -> None:
        token, topic, *rest = payload.split("\t")
        if token == self.process_token:
            return
        number, body = rest or (None, "")
        self.deliver(
            Change(topic=topic, number=int(number) if number else None, body=json.loads(body) if body else None)
        )

    def deliver_missed(self) -> None:
        """Make every follower read the database."""
        with self.lock:
            followers = {deliver for group in self.followers.values() for deliver in group}
        for deliver in followers:
            deliver(None)

    def stop_if_idle(self, idle_since: float) -> bool:
        with self.lock:
            if self.followers or time.monotonic() - idle_since < LISTENER_IDLE_SECONDS:
                return False
            self.listener = None
            return True


NOTIFIERS: dict[str, ChangeNotifier] = {}  # of this process, by the address of their database
os.register_at_fork(after_in_child=NOTIFIERS.clear)


def get_notifier(engine: Engine) -> ChangeNotifier:
    """Return the notifier of an engine's database; all engines of this process on one database share it."""
    address = engine.url.render_as_string(hide_password=False)
    return NOTIFIERS.setdefault(address, ChangeNotifier(engine.url))

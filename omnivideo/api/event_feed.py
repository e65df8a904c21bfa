"""Stream the events of a turn to any number of followers, from the database and from its notifications."""

import base64
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any, NamedTuple, cast

from anyio import CancelScope, current_time, move_on_after
from anyio.to_thread import run_sync
from fastapi import Request

from omnivideo.contracts import Change
from omnivideo.errors import ArtifactNotFound, ServiceStopping, StoreError
from omnivideo.ports import ChangeWatch, ObjectStore, TurnStore

NumberedEvent = tuple[int, dict[str, Any]]
# How long a stream waits for the turn to begin, so that a turn that fails before has the status of its error.
BEGINNING_TIMEOUT_SECONDS = 10.0
SUBMISSION_TIMEOUT_SECONDS = 2.0  # the part of it after a generation has been announced


class Beginning(NamedTuple):
    """Whether a turn has done something, or has ended; `waits_for` says which server it waits for instead."""

    has_begun: bool
    waits_for: str = ""


class EventFeed:
    """The only source of a turn's events for its followers: chat streams and thread streams both read from it."""

    def __init__(self, turns: TurnStore, store: ObjectStore):
        self.turns = turns
        self.store = store
        self.is_stopping = False
        self.waits: set[CancelScope] = set()  # of the followers that wait for a change

    def stop(self) -> None:
        """Raise ServiceStopping in every follower, now and later; call it in the followers' event loop."""
        self.is_stopping = True
        for wait in self.waits:
            wait.cancel()

    async def receive_change(self, watch: ChangeWatch) -> Change | None:
        """Return what the watch receives. Raises ServiceStopping once the service stops."""
        with CancelScope() as wait:
            if self.is_stopping:
                raise ServiceStopping
            self.waits.add(wait)
            try:
                return await watch.receive()
            finally:
                self.waits.discard(wait)
        raise ServiceStopping

    async def follow_turn(
        self, turn_id: str, last_number: int = 0, idle_seconds: float = math.inf
    ) -> AsyncGenerator[NumberedEvent]:
        """Yield the turn's events with a number above `last_number` until the turn ends.

        After each `idle_seconds` without an event, an "idle" event is yielded, which is not stored.

        The next event is yielded directly from its notification. In all other cases (a gap in the numbers, the end of
        the turn, a timeout, a lost connection), the database is read. While the database is unavailable, the follower
        waits. Raises ServiceStopping.
        """
        with self.turns.watch_events(turn_id) as watch:
            change, last_event_at = None, time.monotonic()
            while True:
                followed_number = last_number
                if change is not None and change.body is not None and change.number == last_number + 1:
                    last_number += 1
                    yield last_number, change.body
                elif change is None or change.number is None or change.number > last_number:
                    with suppress(StoreError):
                        later = await run_sync(self.turns.read_events, turn_id, last_number)
                        for last_number, body in later.events:
                            yield last_number, body
                        if not later.is_open:
                            return
                if last_number > followed_number:
                    last_event_at = time.monotonic()
                elif time.monotonic() - last_event_at > idle_seconds:
                    last_event_at = time.monotonic()
                    yield last_number, {"kind": "idle", "seconds": round(idle_seconds)}
                change = await self.receive_change(watch)

    async def wait_for_beginning(self, turn_id: str) -> Beginning:
        """Wait until the turn answers, asks, reasons or renders, until it ends, or for a while.

        Plans and announcements do not count: a full queue or a missing MLLM is found right after them.
        """
        waits_for = ""
        with move_on_after(BEGINNING_TIMEOUT_SECONDS) as scope:
            async with aclosing(self.follow_turn(turn_id)) as events:
                async for _, event in events:
                    if event["kind"] == "waiting":
                        waits_for = event["text"]
                    elif event["kind"] == "action" and event["goal"] in ("generate", "edit"):
                        scope.deadline = min(scope.deadline, current_time() + SUBMISSION_TIMEOUT_SECONDS)
                    elif event["kind"] not in ("plan", "action"):
                        return Beginning(has_begun=True)
        return Beginning(has_begun=False, waits_for=waits_for)

    async def follow_to_end(self, turn_id: str) -> None:
        """Wait until the turn ends."""
        async for _ in self.follow_turn(turn_id):
            pass

    async def stream_turn(self, turn_id: str, last_number: int = 0) -> AsyncIterator[dict[str, str]]:
        """Yield the turn's events as sse-starlette expects them, with their number as the id.

        The stream of a service that stops ends early; its client continues it after the last number.
        """
        with suppress(ServiceStopping):
            async for number, event in self.follow_turn(turn_id, last_number):
                if event["kind"] == "preview" and "key" in event:
                    try:
                        png = await run_sync(self.store.get, event["key"])
                    except ArtifactNotFound:
                        continue  # the turn has ended, and its previews have been swept
                    event = {"kind": "preview", "png": base64.b64encode(png).decode()}
                yield {"id": str(number), "event": str(event["kind"]), "data": json.dumps(event)}


def get_event_feed(request: Request) -> EventFeed:
    """Return the application's feed."""
    return cast(EventFeed, request.app.state.event_feed)

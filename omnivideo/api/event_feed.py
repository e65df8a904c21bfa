"""A turn's events as they come, for any number of followers: one look at the database for all of them."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import anyio

from omnivideo.api.dependencies import ServiceContext

POLL_SECONDS = 0.1  # seconds between two looks
OVERLAP_SECONDS = 3.0  # seconds of events that a look sees again, for a statement that was slow to be seen
NumberedEvent = tuple[int, dict[str, Any]]


class EventFeed:
    """Followers wait here; the feed looks while there are any."""

    def __init__(self, context: ServiceContext):
        self.context = context
        self.subscribers: dict[str, set[asyncio.Queue[NumberedEvent | None]]] = {}
        self.poll_task: asyncio.Task[None] | None = None

    async def follow_turn(self, turn_id: str, last_number: int = 0) -> AsyncIterator[NumberedEvent]:
        """The turn's events with a number above `last_number`, to its end."""
        queue: asyncio.Queue[NumberedEvent | None] = asyncio.Queue()
        self.subscribers.setdefault(turn_id, set()).add(queue)
        if self.poll_task is None or self.poll_task.done():
            self.poll_task = asyncio.create_task(self.poll_events())
        try:
            # What was told before this follower came; the look tells what is told from here on.
            for number, body in await anyio.to_thread.run_sync(self.context.turns.list_events, turn_id, last_number):
                last_number = number
                yield number, body
            while (numbered_event := await queue.get()) is not None:
                if numbered_event[0] > last_number:
                    last_number = numbered_event[0]
                    yield numbered_event
            for numbered_event in await anyio.to_thread.run_sync(self.context.turns.list_events, turn_id, last_number):
                yield numbered_event
        finally:
            self.unsubscribe(turn_id, queue)

    def unsubscribe(self, turn_id: str, queue: "asyncio.Queue[NumberedEvent | None]") -> None:
        queues = self.subscribers.get(turn_id, set())
        queues.discard(queue)
        if not queues:
            self.subscribers.pop(turn_id, None)

    async def poll_events(self) -> None:
        last_numbers: dict[str, int] = {}
        while self.subscribers:
            turn_ids = list(self.subscribers)
            last_numbers = {turn: last_numbers.get(turn, 0) for turn in turn_ids}
            try:
                new_events, closed_turn_ids = await anyio.to_thread.run_sync(
                    self.context.turns.list_recent_events, turn_ids, OVERLAP_SECONDS
                )
            except Exception:  # the database is away: the followers wait with us
                await asyncio.sleep(1.0)
                continue
            for turn, number, body in new_events:
                if number > last_numbers[turn]:
                    last_numbers[turn] = number
                    self.publish(turn, (number, body))
            for turn in closed_turn_ids:
                self.publish(turn, None)
            await asyncio.sleep(POLL_SECONDS)

    def publish(self, turn_id: str, numbered_event: NumberedEvent | None) -> None:
        for queue in self.subscribers.get(turn_id, ()):
            queue.put_nowait(numbered_event)


def to_sse(number: int, event: dict[str, Any]) -> dict[str, str]:
    """An event in sse-starlette's words."""
    return {"id": str(number), "event": str(event["kind"]), "data": json.dumps(event)}

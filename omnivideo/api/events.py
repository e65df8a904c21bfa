"""A turn's events as they come, for any number of followers: one look at the database for all of them."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import anyio

from omnivideo.api.rooms import Rooms

LOOK = 0.1  # seconds between two looks
OVERLAP = 3.0  # seconds of events that a look sees again, for a statement that was slow to be seen
Numbered = tuple[int, dict[str, Any]]


class Feed:
    """Followers wait here; the feed looks while there are any."""

    def __init__(self, rooms: Rooms):
        self.rooms = rooms
        self.queues: dict[str, set[asyncio.Queue[Numbered | None]]] = {}
        self.looking: asyncio.Task[None] | None = None

    async def follow(self, turn: str, after: int = 0) -> AsyncIterator[Numbered]:
        """The turn's events with a number above `after`, to its end."""
        queue: asyncio.Queue[Numbered | None] = asyncio.Queue()
        self.queues.setdefault(turn, set()).add(queue)
        if self.looking is None or self.looking.done():
            self.looking = asyncio.create_task(self.look())
        try:
            # What was told before this follower came; the look tells what is told from here on.
            for number, body in await anyio.to_thread.run_sync(self.rooms.turns.events_of, turn, after):
                after = number
                yield number, body
            while (numbered := await queue.get()) is not None:
                if numbered[0] > after:
                    after = numbered[0]
                    yield numbered
            for numbered in await anyio.to_thread.run_sync(self.rooms.turns.events_of, turn, after):
                yield numbered
        finally:
            self.leave(turn, queue)

    def leave(self, turn: str, queue: "asyncio.Queue[Numbered | None]") -> None:
        followers = self.queues.get(turn, set())
        followers.discard(queue)
        if not followers:
            self.queues.pop(turn, None)

    async def look(self) -> None:
        told: dict[str, int] = {}
        while self.queues:
            watched = list(self.queues)
            told = {turn: told.get(turn, 0) for turn in watched}
            try:
                fresh, closed = await anyio.to_thread.run_sync(self.rooms.turns.fresh, watched, OVERLAP)
            except Exception:  # the database is away: the followers wait with us
                await asyncio.sleep(1.0)
                continue
            for turn, number, body in fresh:
                if number > told[turn]:
                    told[turn] = number
                    self.tell(turn, (number, body))
            for turn in closed:
                self.tell(turn, None)
            await asyncio.sleep(LOOK)

    def tell(self, turn: str, numbered: Numbered | None) -> None:
        for queue in self.queues.get(turn, ()):
            queue.put_nowait(numbered)


def sse(number: int, body: dict[str, Any]) -> dict[str, str]:
    """An event in sse-starlette's words."""
    return {"id": str(number), "event": str(body["kind"]), "data": json.dumps(body)}

"""Admit large request bodies against a budget, so that simultaneous uploads exhaust neither the memory nor /tmp."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import Condition, move_on_after

from omnivideo.api.request_body import is_form
from omnivideo.errors import PoolBusy

FREE_BYTES = 2**20  # of a body that needs no admission; forms keep that much in memory too
JSON_COPIES = 4  # of a JSON body in memory: its bytes, its text, its fields and the decoded media
MAX_WAIT_SECONDS = 20.0
RETRY_SECONDS = 5.0


class UploadBudget:
    """The bytes of the large bodies that this process holds at the same time; further ones wait unread.

    One that is larger than the whole budget is admitted alone.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.used_bytes = max_bytes, 0
        self.changed = Condition()

    @asynccontextmanager
    async def admit(self, body_bytes: int, content_type: bytes) -> AsyncIterator[None]:
        """Hold a body's bytes until its request has been answered. Raises PoolBusy if they are not free in time."""
        needed_bytes = body_bytes if is_form(content_type) else body_bytes * JSON_COPIES
        if body_bytes <= FREE_BYTES:
            yield
            return
        await self.reserve(needed_bytes)
        try:
            yield
        finally:
            self.used_bytes -= needed_bytes
            async with self.changed:
                self.changed.notify_all()

    async def reserve(self, needed_bytes: int) -> None:
        with move_on_after(MAX_WAIT_SECONDS):
            async with self.changed:
                while self.used_bytes and self.used_bytes + needed_bytes > self.max_bytes:
                    await self.changed.wait()
                self.used_bytes += needed_bytes
                return
        raise PoolBusy("body: too many large uploads at once; try again in a moment", RETRY_SECONDS)

"""Requests that wait for their result: work that nobody waits for any more is cancelled after a while."""

import asyncio
import logging
from collections.abc import Callable

from anyio import CancelScope
from anyio.to_thread import run_sync
from fastapi import Request

log = logging.getLogger("omnivideo.api")
PENDING_LEAVES: set[asyncio.Task[None]] = set()  # the event loop itself only keeps weak references


async def leave_work(leave: Callable[[bool], None], has_disconnected: bool, grace_seconds: float) -> None:
    """Stop waiting for work: at once after its result, or `grace_seconds` after the client has disconnected.

    Until then the client counts as waiting, so another one that comes meanwhile keeps the work going.
    """
    if has_disconnected:
        task = asyncio.get_running_loop().create_task(leave_later(leave, grace_seconds))
        PENDING_LEAVES.add(task)
        task.add_done_callback(PENDING_LEAVES.discard)
        return
    with CancelScope(shield=True):
        await run_sync(leave, False)


async def leave_later(leave: Callable[[bool], None], grace_seconds: float) -> None:
    await asyncio.sleep(grace_seconds)
    try:
        await run_sync(leave, True)
    except Exception:
        log.exception("work that nobody waits for could not be cancelled")


async def wait_for_disconnect(request: Request) -> None:
    """Return once the client has disconnected. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

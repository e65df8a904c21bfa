"""Requests that wait for their result: work that nobody waits for any more is cancelled after a while."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import anyio
from anyio import CancelScope
from anyio.to_thread import run_sync
from fastapi import Request

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that has disconnected; it is only logged
Event = TypeVar("Event")
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


async def leave_if_refused(begin: Callable[[], Awaitable[None]], leave: Callable[[bool], None]) -> None:
    """Wait for the beginning of a stream. If it raises, the client gets an error: leave the work at once."""
    try:
        await begin()
    except BaseException:
        with CancelScope(shield=True):
            await run_sync(leave, True)
        raise


async def leave_after_stream(
    events: AsyncIterator[Event], leave: Callable[[bool], None], grace_seconds: float
) -> AsyncIterator[Event]:
    """Yield the events of a stream; leave the work when the stream ends, or when its client has disconnected."""
    has_ended = False
    try:
        async for event in events:
            yield event
        has_ended = True
    finally:
        await leave_work(leave, not has_ended, grace_seconds)


async def wait_for_work(
    request: Request, work: Callable[[], Awaitable[None]], leave: Callable[[bool], None], grace_seconds: float
) -> bool:
    """Wait for work and leave it. Return False if the client has disconnected before its end."""
    has_ended = False
    try:
        has_ended = await run_unless_disconnected(request, work)
    finally:
        await leave_work(leave, not has_ended, grace_seconds)
    return has_ended


async def run_unless_disconnected(request: Request, work: Callable[[], Awaitable[None]]) -> bool:
    """Wait for some work. Return False if the client has disconnected before its end; its body must have been read.

    Raises what the work raises, which a task group would wrap.
    """
    has_ended, error = False, None
    async with anyio.create_task_group() as group:

        async def watch_client() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch_client)
        try:
            await work()
            has_ended = True
        except Exception as raised:
            error = raised
        group.cancel_scope.cancel()
    if error is not None:
        raise error
    return has_ended

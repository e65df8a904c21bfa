"""The HTTP service: routes, and what every request passes on its way in."""

import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omnivideo import __version__
from omnivideo.api import errors
from omnivideo.api.events import Feed
from omnivideo.api.rooms import Rooms
from omnivideo.api.running import Runner

log = logging.getLogger("omnivideo.api")


class Gate:
    """Gives each request an id, bounds its body while it is read, and logs one line."""

    def __init__(self, app: ASGIApp, most: int):
        self.app = app
        self.most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name, began, status = uuid.uuid4().hex, time.perf_counter(), 0
        scope.setdefault("state", {})["request_id"] = name
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise errors.WireError(413, f"the body is above {self.most} bytes", "body", "too_large")
            return message

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", name.encode())]}
            await send(message)

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.most:
            wrong = errors.WireError(413, f"the body is above {self.most} bytes", "body", "too_large")
            await errors.answer(wrong)(scope, receive, named)
        else:
            await self.app(scope, bounded, named)
        spent = 1000 * (time.perf_counter() - began)
        log.info("%s %s %s %d %.1f ms", name, scope["method"], scope["path"], status, spent)


def create_app(rooms: Rooms) -> FastAPI:
    from omnivideo.api import batches, chat, files, hooks, images, threads, videos

    runner = Runner(rooms)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runner.start()
        yield
        await anyio.to_thread.run_sync(runner.stop)

    about = "Understand, create and edit video by talking."
    app = FastAPI(title="omnivideo", version=__version__, description=about, lifespan=lifespan)
    app.state.rooms, app.state.runner, app.state.feed = rooms, runner, Feed(rooms)
    app.add_middleware(Gate, most=rooms.settings.upload_most)
    errors.handle_all(app)
    for part in (chat, videos, images, files, batches, hooks, threads):
        app.include_router(part.router)

    @app.get("/health", tags=["operation"])
    def health() -> dict[str, str]:
        """Whether this process lives."""
        return {"status": "ok"}

    @app.get("/ready", tags=["operation"], response_class=PlainTextResponse)
    def ready() -> str:
        """Whether the database answers, so that requests may come."""
        rooms.jobs.waiting()
        return "ready"

    return app

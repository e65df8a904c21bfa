"""The HTTP service: routes, and what every request passes on its way in."""

import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.propagate import extract
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omnivideo import __version__
from omnivideo.api import errors
from omnivideo.api.events import Feed
from omnivideo.api.rooms import Rooms
from omnivideo.api.running import Runner

log = logging.getLogger("omnivideo.api")
TRACER = trace.get_tracer("omnivideo.api")


class Gate:
    """Gives each request an id and a span, bounds its body while it is read, counts it, and logs one line."""

    def __init__(self, app: ASGIApp, rooms: Rooms):
        self.app = app
        self.rooms = rooms
        self.most = rooms.settings.upload_most

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

        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        with TRACER.start_as_current_span("request", extract(headers), attributes={"request_id": name}) as span:
            if (length := headers.get("content-length", "0")).isdigit() and int(length) > self.most:
                wrong = errors.WireError(413, f"the body is above {self.most} bytes", "body", "too_large")
                await errors.answer(wrong)(scope, receive, named)
            else:
                await self.app(scope, bounded, named)
            route = getattr(scope.get("route"), "path", "none")
            span.update_name(f"{scope['method']} {route}")
        self.rooms.requests.saw(scope["method"], route, status, began)
        spent = 1000 * (time.perf_counter() - began)
        seen = {"request": name, "method": scope["method"], "route": route, "status": status, "ms": round(spent, 1)}
        log.info("%s %s %d", scope["method"], scope["path"], status, extra=seen)


def create_app(rooms: Rooms) -> FastAPI:
    from omnivideo.api import batches, chat, files, hooks, images, threads, videos, watching

    rooms.runner = runner = rooms.runner or Runner(rooms)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runner.start()
        yield
        await anyio.to_thread.run_sync(runner.stop)

    about = "Understand, create and edit video by talking."
    app = FastAPI(title="omnivideo", version=__version__, description=about, lifespan=lifespan)
    app.state.rooms, app.state.runner, app.state.feed = rooms, runner, Feed(rooms)
    rooms.requests = watching.Requests(rooms)
    app.add_middleware(Gate, rooms=rooms)
    errors.handle_all(app)
    for part in (chat, videos, images, files, batches, hooks, threads, watching):
        app.include_router(part.router)

    return app

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
from omnivideo.api.dependencies import ServiceContext
from omnivideo.api.event_feed import EventFeed
from omnivideo.api.routes import batches, chat, files, images, operations, threads, videos, webhooks

log = logging.getLogger("omnivideo.api")
TRACER = trace.get_tracer("omnivideo.api")


class RequestMiddleware:
    """Gives each request an id and a span, bounds its body while it is read, counts it, and logs one line."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, metrics: operations.RequestMetrics):
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started_at, status = uuid.uuid4().hex, time.perf_counter(), 0
        scope.setdefault("state", {})["request_id"] = request_id
        received_bytes = 0

        async def receive_within_limit() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > self.max_body_bytes:
                raise errors.APIError(413, f"the body is above {self.max_body_bytes} bytes", "body", "too_large")
            return message

        async def send_with_request_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        with TRACER.start_as_current_span("request", extract(headers), attributes={"request_id": request_id}) as span:
            if (length := headers.get("content-length", "0")).isdigit() and int(length) > self.max_body_bytes:
                too_large = errors.APIError(413, f"the body is above {self.max_body_bytes} bytes", "body", "too_large")
                await errors.to_json_response(too_large)(scope, receive, send_with_request_id)
            else:
                await self.app(scope, receive_within_limit, send_with_request_id)
            route = getattr(scope.get("route"), "path", "none")
            span.update_name(f"{scope['method']} {route}")
        self.metrics.observe_request(scope["method"], route, status, started_at)
        elapsed_ms = 1000 * (time.perf_counter() - started_at)
        log_fields = {
            "request": request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(elapsed_ms, 1),
        }
        log.info("%s %s %d", scope["method"], scope["path"], status, extra=log_fields)


def create_app(context: ServiceContext) -> FastAPI:

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        context.turn_runner.start()
        yield
        await anyio.to_thread.run_sync(context.turn_runner.stop)

    description = "Understand, create and edit video by talking."
    app = FastAPI(title="omnivideo", version=__version__, description=description, lifespan=lifespan)
    metrics = operations.RequestMetrics(context)
    app.state.context, app.state.event_feed, app.state.request_metrics = (
        context,
        EventFeed(context.turns, context.store),
        metrics,
    )
    app.add_middleware(RequestMiddleware, max_body_bytes=context.settings.max_upload_bytes, metrics=metrics)
    errors.register_error_handlers(app)
    for routes in (chat, videos, images, files, batches, webhooks, threads, operations):
        app.include_router(routes.router)

    return app

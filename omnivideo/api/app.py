"""The HTTP service's application: its routes, and the middleware that every request passes."""

import logging
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime

import anyio
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.propagate import extract
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from omnivideo import __version__
from omnivideo.api.access import PASSWORD_CHALLENGE, READING_METHODS, accept_password, check_site
from omnivideo.api.bulkheads import MAX_THREADS, ClientLimitMiddleware, UploadBudget
from omnivideo.api.dependencies import ServiceContext, admit_request
from omnivideo.api.documentation import add_documentation
from omnivideo.api.errors import (
    APIError,
    BodyError,
    build_body_too_large_error,
    log_if_internal,
    register_error_handlers,
    to_api_error,
    to_json_response,
)
from omnivideo.api.event_feed import EventFeed
from omnivideo.api.request_body import get_content_type, get_max_body_bytes
from omnivideo.api.routes import (
    batches,
    chat,
    files,
    images,
    operations,
    responses,
    threads,
    understanding,
    usage,
    videos,
    webhooks,
)
from omnivideo.errors import OmniVideoError

log = logging.getLogger("omnivideo.api")
NO_PUBLIC_URL_WARNING = (
    "OMNIVIDEO_PUBLIC_URL is empty: links lead where each request was sent, which browsers behind a proxy or outside of"
    " the containers' network may not reach"
)
TRACER = trace.get_tracer("omnivideo.api")
# What a page may read besides the headers that every page may.
EXPOSED_HEADERS = (
    "accept-ranges", "allow", "content-disposition", "content-range", "etag", "openai-poll-after-ms", "ratelimit",
    "ratelimit-policy", "retry-after", "x-ratelimit-limit-requests", "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests", "x-request-id", "x-video-id",
)  # fmt: skip
METHODS = (*READING_METHODS, "OPTIONS", "POST", "PUT", "PATCH", "DELETE")  # others are "other" to the log and metrics
ACCESS_CHECK_SECONDS = 5.0  # between two checks of the key during a response
PAGES_WITH_KEY = re.compile(r"/docs(/.*)?|/openapi\.json|/metrics")
METHODS_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")


class RequestMiddleware:
    """Gives each request an id and a span, checks its key, limits its body, measures it, and logs one line.

    A response that takes long ends once its key has been revoked.
    """

    def __init__(self, app: ASGIApp, context: ServiceContext, metrics: operations.RequestMetrics):
        self.app = app
        self.context = context
        self.metrics = metrics
        self.uploads = UploadBudget(context.settings.upload_budget_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started_at, status, received_bytes = uuid.uuid4().hex, time.perf_counter(), 0, 0
        checked_at, access_scope = started_at, anyio.CancelScope()
        scope.setdefault("state", {})["request_id"] = request_id

        # Every route that answers GET answers HEAD.
        app_scope = {**scope, "method": "GET", "is_head": True} if scope["method"] == "HEAD" else scope
        max_body_bytes, advice = get_max_body_bytes(scope, self.context.settings.max_upload_bytes)

        async def receive_within_limit() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > max_body_bytes:
                raise BodyError(build_body_too_large_error(max_body_bytes, advice))
            return message

        async def send_with_request_id(message: Message) -> None:
            nonlocal status, checked_at
            if message["type"] == "http.response.start":
                status = message["status"]
                access = scope["state"].get("access")
                headers = MutableHeaders(raw=[*message["headers"], (b"x-request-id", request_id.encode())])
                for name, value in (access.headers if access else {}).items():
                    headers.setdefault(name, value)
                message = {**message, "headers": headers.raw}
            elif message.get("more_body") and time.perf_counter() - checked_at > ACCESS_CHECK_SECONDS:
                checked_at = time.perf_counter()
                if not await self.has_access(scope):
                    await send({"type": "http.response.body", "body": b""})  # it ends the response
                    access_scope.cancel()
                    return
            await send(message)

        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        with TRACER.start_as_current_span("request", extract(headers), attributes={"request_id": request_id}) as span:
            refusal = await self.find_refusal(scope, headers)
            try:
                if refusal is not None:
                    await to_json_response(refusal)(scope, receive, send_with_request_id)
                else:
                    body_bytes = get_body_bytes(scope, headers.get("content-length", "0"), max_body_bytes)
                    with access_scope:
                        async with self.uploads.admit(body_bytes, get_content_type(scope)):
                            await self.serve(app_scope, receive_within_limit, send_with_request_id)
            except Exception as error:
                log_if_internal(error, f"request {request_id}")
                if status:
                    status = 500  # in the metrics and in the log
                    raise  # the response has begun, so all that can be done is to close the connection
                await to_json_response(to_api_error(error))(scope, receive, send_with_request_id)
            finally:
                # The route's pattern, never the path that the user sent: the set of metric labels must stay small.
                route = getattr(app_scope.get("route"), "path", "none")
                method = scope["method"] if scope["method"] in METHODS else "other"
                span.update_name(f"{method} {route}")
                self.record_request(method, request_id, route, status, time.perf_counter() - started_at)

    async def find_refusal(self, scope: Scope, headers: Mapping[str, str]) -> APIError | None:
        """Return the error of a request whose body need not be read."""
        refusal = check_site(self.context.settings, scope["method"], headers)
        refusal = refusal or await self.check_key(scope, headers.get("authorization"))
        max_body_bytes, advice = get_max_body_bytes(scope, self.context.settings.max_upload_bytes)
        content_length = headers.get("content-length", "0")
        if refusal is None and content_length.isdigit() and int(content_length[:20]) > max_body_bytes:
            refusal = build_body_too_large_error(max_body_bytes, advice)
        return refusal

    async def check_key(self, scope: Scope, authorization: str | None) -> APIError | None:
        """Store the access and the owner of a request; return the error if its key may not send it.

        This precedes reading the body. The route itself checks a link that has a signature in place of a key. The pages
        for operators and developers also take the key as a password, which browsers ask for.
        """
        is_page = PAGES_WITH_KEY.fullmatch(scope["path"]) is not None
        may_be_signed = scope["method"] in READING_METHODS and authorization is None
        is_link = may_be_signed and b"signature=" in scope.get("query_string", b"")
        is_open = not scope["path"].startswith("/v1/") or is_link
        if scope["method"] == "OPTIONS" or (is_open and not is_page):
            return None
        try:
            authorization = accept_password(authorization) if is_page else authorization
            access = await admit_request(self.context, authorization, scope["method"])
            scope["state"]["access"], scope["state"]["owner"] = access, access.key.id
        except (APIError, OmniVideoError) as error:
            refusal = to_api_error(error)
            if is_page and refusal.status_code == 401:
                refusal.headers["WWW-Authenticate"] = PASSWORD_CHALLENGE
            return refusal
        return None

    async def has_access(self, scope: Scope) -> bool:
        """Return whether the owner of a request still has a valid key; a check that fails is repeated later."""
        owner = scope["state"].get("owner")
        if owner is None or not self.context.settings.admin_key:
            return True
        try:
            return await anyio.to_thread.run_sync(self.context.api_keys.is_active, owner)
        except OmniVideoError:
            return True

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application; of the response to a HEAD request, send the headers only, and stop the route."""
        if "is_head" not in scope:
            await self.app(scope, receive, send)
            return
        with anyio.CancelScope() as cancel_scope:

            async def send_headers(message: Message) -> None:
                if message["type"] == "http.response.start":
                    await send(message)
                    await send({"type": "http.response.body", "body": b""})
                    cancel_scope.cancel()

            await self.app(scope, receive, send_headers)

    def record_request(self, method: str, request_id: str, route: str, status: int, elapsed_seconds: float) -> None:
        self.metrics.latency_seconds.labels(method, route, str(status)).observe(elapsed_seconds)
        if status >= 500:
            self.metrics.error_count.labels(route).inc()
        elapsed_ms = round(1000 * elapsed_seconds, 1)
        began_at = datetime.fromtimestamp(time.time() - elapsed_seconds).astimezone()
        log_fields = {
            "request": request_id, "method": method, "route": route, "status": status, "ms": elapsed_ms,
            "began_at": began_at.isoformat(timespec="milliseconds"),
        }  # fmt: skip
        log.info("%s %s %d in %.0f ms", method, route, status, elapsed_ms, extra=log_fields)


def get_body_bytes(scope: Scope, content_length: str, max_body_bytes: int) -> int:
    """Return how large a request's body may become: as its header says, or the limit if it does not say."""
    if scope["method"] in METHODS_WITHOUT_BODY:
        return 0
    is_chunked = any(name == b"transfer-encoding" for name, _ in scope["headers"])
    return max_body_bytes if is_chunked or not content_length.isdigit() else int(content_length[:20])


def create_app(context: ServiceContext) -> FastAPI:
    @asynccontextmanager
    async def run_turns_while_serving(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = MAX_THREADS
        if context.turn_process is None:
            context.turn_runner.start()
        yield
        await anyio.to_thread.run_sync(context.stop_turns)

    app = FastAPI(
        title="omnivideo",
        version=__version__,
        description="Understand, generate and edit video in one conversation.",
        lifespan=run_turns_while_serving,
        docs_url=None,  # FastAPI's pages load from a CDN
        redoc_url=None,
    )
    add_documentation(app)
    metrics = operations.RequestMetrics(context)
    feed = EventFeed(context.turns, context.store)
    app.state.context, app.state.event_feed, app.state.request_metrics = context, feed, metrics
    app.state.storage_check = operations.StorageCheck(context)

    def begin_stop() -> None:
        """Give the turns of this process back, and answer the requests that wait for them; the server calls it."""
        feed.stop()
        threading.Thread(target=context.stop_turns, name="stop-turns").start()

    app.state.begin_stop = begin_stop
    # The last one added is the first that a request passes.
    app.add_middleware(ClientLimitMiddleware)
    app.add_middleware(RequestMiddleware, context=context, metrics=metrics)
    add_settings_middleware(app, context)
    register_error_handlers(app)
    model_routes, record_routes = (chat, responses, videos, images, understanding), (files, batches, webhooks, threads)
    for routes in (*model_routes, *record_routes, usage, operations):
        # These have their complete paths; `include_router` would build each once more at the first request.
        app.router.routes.extend(routes.router.routes)
    app.state.api_routes = [route for route in app.routes if isinstance(route, Route)]
    return app


def add_settings_middleware(app: FastAPI, context: ServiceContext) -> None:
    """Add what the settings say about the pages of browsers and about proxies.

    It sees every response, so that a page can read refusals too.
    """
    settings = context.settings
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(settings.trusted_proxies))
    if settings.admin_key and not settings.public_url:
        log.warning(NO_PUBLIC_URL_WARNING)

"""A language model server: the routes of `protocol`, and a service behind them that runs on transformers.

`omnivideo mllm serve` starts it where vLLM is not used. `vllm_plugin` adds the same routes to vLLM's own server.
"""

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from opentelemetry import trace
from opentelemetry.propagate import extract
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.concurrency import iterate_in_threadpool

from omnivideo.backends.mllm.access import MLLMKeyMiddleware
from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.protocol import (
    AgreementResponse,
    MediaPayload,
    MLLMPayload,
    RefusalResponse,
    TokensRequest,
    TokensResponse,
    VisualTokensRequest,
    WriteRequest,
)
from omnivideo.contracts import Artifact, Medium, MLLMRequest, Route, TextSampling
from omnivideo.errors import ArtifactNotFound, InvalidInput
from omnivideo.models.features import encode_features
from omnivideo.models.omni import OmniVideoModel
from omnivideo.storage.objects.local import compute_object_key

log = logging.getLogger("omnivideo.mllm")
TRACER = trace.get_tracer("omnivideo.mllm")
WARM_UP_TEXT = "a red circle"


class MLLMService(Protocol):
    """Answers the routes. Every method raises InvalidInput for a request that cannot be answered."""

    async def route(self, payload: MLLMPayload) -> Route: ...

    async def score_agreement(self, payload: MLLMPayload) -> float: ...

    async def count_tokens(self, text: str) -> int: ...

    async def write_answer(self, payload: MLLMPayload, sampling: TextSampling) -> AsyncIterator[str]:
        """Return the answer's pieces. An invalid request raises before the first piece."""
        ...

    async def compute_visual_tokens(self, payload: MLLMPayload, medium: Medium) -> bytes:
        """Return the safetensors file of the decoder's features, by default the visual tokens [1, Q, E]."""
        ...


async def trace_request(request: Request) -> AsyncIterator[None]:
    """Open a span that continues the trace of the request's sender, and log the request when it has been answered."""
    path, started_at = request.url.path, time.perf_counter()
    with TRACER.start_as_current_span(f"language model {path}", extract(request.headers)):
        yield
    elapsed_ms = round(1000 * (time.perf_counter() - started_at), 1)
    log.info("%s %s in %.0f ms", request.method, path, elapsed_ms, extra={"route": path, "ms": elapsed_ms})


class ReadinessCheck:
    """Routes one request before the server counts as ready.

    A server that loads its model and then fails at its first request would otherwise look healthy.
    """

    def __init__(self, get_service: Callable[[], MLLMService]):
        self.get_service = get_service
        self.lock, self.has_answered = asyncio.Lock(), False

    async def answer(self) -> JSONResponse:
        async with self.lock:
            if not self.has_answered:
                try:
                    await self.get_service().route(MLLMPayload(text=WARM_UP_TEXT))
                except InvalidInput:
                    pass  # the model's own refusal is an answer too
                except Exception as error:
                    log.error("the first request failed: %s", type(error).__name__)
                    return JSONResponse({"status": "failing"}, 503)
                self.has_answered = True
        return JSONResponse({"status": "ready"})


def add_mllm_routes(app: FastAPI, get_service: Callable[[], MLLMService], key: str = "") -> None:
    """Add the routes of `protocol`. `get_service` is called for each request, so the service may be created later.

    With a `key`, every route of the app but those for probes requires it.
    """
    traced, readiness = [Depends(trace_request)], ReadinessCheck(get_service)
    if key:
        app.add_middleware(MLLMKeyMiddleware, key=key)

    @app.get("/ready")
    async def check_ready() -> JSONResponse:
        return await readiness.answer()

    @app.exception_handler(InvalidInput)
    async def handle_invalid_input(request: Request, error: InvalidInput) -> JSONResponse:
        refusal = RefusalResponse(field=error.field, message=str(error).removeprefix(f"{error.field}: "))
        return JSONResponse(refusal.model_dump(), 400)

    @app.post("/v1/route", dependencies=traced)
    async def route_request(payload: MLLMPayload) -> Route:
        return await get_service().route(payload)

    @app.post("/v1/agreement", dependencies=traced)
    async def score_agreement(payload: MLLMPayload) -> AgreementResponse:
        return AgreementResponse(agreement=await get_service().score_agreement(payload))

    @app.post("/v1/write", dependencies=traced)
    async def write_answer(body: WriteRequest) -> StreamingResponse:
        pieces = await get_service().write_answer(body.payload, body.sampling)
        return StreamingResponse(encode_ndjson(pieces), media_type="application/x-ndjson")

    @app.post("/v1/tokens", dependencies=traced)
    async def count_tokens(body: TokensRequest) -> TokensResponse:
        return TokensResponse(count=await get_service().count_tokens(body.text))

    @app.post("/v1/visual_tokens", dependencies=traced)
    async def compute_visual_tokens(body: VisualTokensRequest) -> Response:
        tokens = await get_service().compute_visual_tokens(body.payload, body.medium)
        return Response(tokens, media_type="application/octet-stream")


async def encode_ndjson(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield a JSON line for each piece, then null to mark the end of a complete answer."""
    async for piece in pieces:
        yield json.dumps(piece) + "\n"
    yield "null\n"


class LRUObjectStore:
    """An object store in memory that keeps the most recent objects, up to `max_bytes` in total."""

    def __init__(self, max_bytes: int = 2**30):
        self.entries: OrderedDict[str, bytes] = OrderedDict()
        self.max_bytes = max_bytes

    def put(self, data: bytes, suffix: str) -> str:
        key = compute_object_key(data, suffix)
        self.entries[key] = data
        self.entries.move_to_end(key)
        while len(self.entries) > 1 and sum(map(len, self.entries.values())) > self.max_bytes:
            self.entries.popitem(last=False)
        return key

    def get(self, key: str) -> bytes:
        if key not in self.entries:
            raise ArtifactNotFound(f"store: there is no artifact {key}")
        return self.entries[key]

    def has(self, key: str) -> bool:
        """Return whether the object is here, and keep it as if it had been put again."""
        if key not in self.entries:
            return False
        self.entries.move_to_end(key)
        return True

    def delete(self, key: str) -> None:
        self.entries.pop(key, None)


class SerializedMLLM:
    """A LocalMLLM for many clients. It computes one answer at a time, since each uses all cores or the GPU."""

    def __init__(self, mllm: LocalMLLM):
        self.mllm = mllm
        self.lock = asyncio.Lock()

    def request_from_payload(self, payload: MLLMPayload) -> MLLMRequest:
        """Return the payload as a request, with its media in the MLLM's store."""
        artifacts = tuple(
            Artifact(key=self.store_media(media), medium=media.medium, width=0, height=0,
                     frames=0, fps=media.fps, caption="", created_by="")
            for media in payload.media
        )  # fmt: skip
        return MLLMRequest(
            text=payload.text, artifacts=artifacts, system=payload.system, json_schema=payload.json_schema
        )

    def store_media(self, media: MediaPayload) -> str:
        """Return the key of a request's medium. A store that the client shares has it already."""
        key = compute_object_key(media.data, media.suffix)
        return key if self.mllm.store.has(key) else self.mllm.store.put(media.data, media.suffix)

    async def route(self, payload: MLLMPayload) -> Route:
        async with self.lock:
            return await asyncio.to_thread(lambda: self.mllm.route(self.request_from_payload(payload)))

    async def score_agreement(self, payload: MLLMPayload) -> float:
        async with self.lock:
            return await asyncio.to_thread(lambda: self.mllm.score_agreement(self.request_from_payload(payload)))

    async def compute_visual_tokens(self, payload: MLLMPayload, medium: Medium) -> bytes:
        def compute() -> bytes:
            return encode_features(self.mllm.compute_features(self.request_from_payload(payload), medium))

        async with self.lock:
            return await asyncio.to_thread(compute)

    async def count_tokens(self, text: str) -> int:
        return self.mllm.count_tokens(text)

    async def write_answer(self, payload: MLLMPayload, sampling: TextSampling) -> AsyncIterator[str]:
        async with self.lock:
            request = await asyncio.to_thread(self.request_from_payload, payload)
            request = request.model_copy(update={"sampling": sampling})
            # Media that cannot be read are refused here. Decoded media are cached for the answer.
            await asyncio.to_thread(self.mllm.build_message, request)
        return self.stream_pieces(request)

    async def stream_pieces(self, request: MLLMRequest) -> AsyncIterator[str]:
        async with self.lock:
            async for piece in iterate_in_threadpool(self.mllm.stream_text(request)):
                yield piece


def create_mllm_app(mllm: LocalMLLM, key: str = "") -> FastAPI:
    """Return the server's app. The store of `mllm` receives the media of requests; an LRUObjectStore is enough.

    Clients must send the `key`, unless it is empty.
    """
    app = FastAPI(title="omnivideo mllm", docs_url=None, redoc_url=None)
    service = SerializedMLLM(mllm)
    add_mllm_routes(app, lambda: service, key)

    registry = CollectorRegistry()
    describe_placement(mllm.omni, registry)

    @app.get("/health")
    def check_health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    def export_metrics() -> Response:
        return Response(generate_latest(registry) + mllm.fetch_metrics().encode(), media_type=CONTENT_TYPE_LATEST)

    return app


def describe_placement(omni: OmniVideoModel, registry: CollectorRegistry) -> None:
    """Add a metric of where the parts of a loaded model compute."""
    labels = ("preset", "part", "location", "dtype", "compute_dtype")
    sizes = Gauge("omnivideo_mllm_part_bytes", "Weights of the MLLM's parts, by where they compute", labels,
                  registry=registry)  # fmt: skip
    for part in omni.placement.parts if omni.placement else ():
        place = (part.location, part.size.dtype, part.compute_dtype)
        sizes.labels(omni.preset.name, part.size.name, *place).set(part.size.weights_bytes)

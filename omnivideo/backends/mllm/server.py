"""A language model server: the routes, and what stands behind them where vLLM does not (transformers, in turn).

`omnivideo mllm serve` runs it.  vLLM's own server gets the same routes by `vllm_plugin`.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import iterate_in_threadpool

from omnivideo.backends.mllm.local import LocalMLLM, encode_visual_tokens
from omnivideo.backends.mllm.protocol import (
    AgreementResponse,
    MLLMPayload,
    RefusalResponse,
    VisualTokensRequest,
    WriteRequest,
)
from omnivideo.contracts import Artifact, Medium, MLLMRequest, Route
from omnivideo.errors import ArtifactNotFound, InvalidInput
from omnivideo.storage.objects.local import compute_object_key


class MLLMService(Protocol):
    """What stands behind the routes.  Raises InvalidInput for what cannot be answered."""

    async def route(self, payload: MLLMPayload) -> Route: ...

    async def score_agreement(self, payload: MLLMPayload) -> float: ...

    async def write_answer(self, payload: MLLMPayload, max_tokens: int) -> AsyncIterator[str]:
        """Returns once it is sure that there will be an answer."""
        ...

    async def compute_visual_tokens(self, payload: MLLMPayload, medium: Medium) -> bytes: ...


def add_mllm_routes(app: FastAPI, get_service: Callable[[], MLLMService]) -> None:
    """Adds the routes of `protocol`; `get_service` is asked for at each request, so it may be made later."""

    @app.exception_handler(InvalidInput)
    async def handle_invalid_input(request: Request, error: InvalidInput) -> JSONResponse:
        refusal = RefusalResponse(field=error.field, message=str(error).removeprefix(f"{error.field}: "))
        return JSONResponse(refusal.model_dump(), 400)

    @app.post("/v1/route")
    async def route_request(payload: MLLMPayload) -> Route:
        return await get_service().route(payload)

    @app.post("/v1/agreement")
    async def score_agreement(payload: MLLMPayload) -> AgreementResponse:
        return AgreementResponse(agreement=await get_service().score_agreement(payload))

    @app.post("/v1/write")
    async def write_answer(body: WriteRequest) -> StreamingResponse:
        pieces = await get_service().write_answer(body.payload, body.max_tokens)
        return StreamingResponse(encode_ndjson(pieces), media_type="application/x-ndjson")

    @app.post("/v1/visual_tokens")
    async def compute_visual_tokens(body: VisualTokensRequest) -> Response:
        tokens = await get_service().compute_visual_tokens(body.payload, body.medium)
        return Response(tokens, media_type="application/octet-stream")


async def encode_ndjson(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    async for piece in pieces:
        yield json.dumps(piece) + "\n"
    yield "null\n"


class LRUObjectStore:
    """An object store for what passes through: of the newest things, as many as have room."""

    def __init__(self, max_bytes: int = 2**30):
        self.entries: OrderedDict[str, bytes] = OrderedDict()
        self.max_bytes = max_bytes  # bytes

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
        return key in self.entries


class SerializedMLLM:
    """A LocalMLLM for many: one answer at a time, since it uses all cores (or the GPU) for each."""

    def __init__(self, mllm: LocalMLLM):
        self.mllm = mllm
        self.lock = asyncio.Lock()

    def request_from_payload(self, payload: MLLMPayload) -> MLLMRequest:
        artifacts = tuple(
            Artifact(key=self.mllm.store.put(one.data, one.suffix), medium=one.medium, width=0, height=0, frames=0,
                     fps=one.fps, caption="", created_by="")
            for one in payload.media
        )  # fmt: skip
        return MLLMRequest(text=payload.text, artifacts=artifacts, system=payload.system)

    async def route(self, payload: MLLMPayload) -> Route:
        async with self.lock:
            return await asyncio.to_thread(lambda: self.mllm.route(self.request_from_payload(payload)))

    async def score_agreement(self, payload: MLLMPayload) -> float:
        async with self.lock:
            return await asyncio.to_thread(lambda: self.mllm.score_agreement(self.request_from_payload(payload)))

    async def compute_visual_tokens(self, payload: MLLMPayload, medium: Medium) -> bytes:
        async with self.lock:
            return await asyncio.to_thread(
                lambda: encode_visual_tokens(
                    self.mllm.compute_visual_tokens(self.request_from_payload(payload), medium)
                )
            )

    async def write_answer(self, payload: MLLMPayload, max_tokens: int) -> AsyncIterator[str]:
        async with self.lock:
            ask = await asyncio.to_thread(self.request_from_payload, payload)
            await asyncio.to_thread(
                self.mllm.build_message, ask
            )  # what cannot be read is refused here; it stays decoded
        return self.stream_pieces(ask, max_tokens)

    async def stream_pieces(self, ask: MLLMRequest, max_tokens: int) -> AsyncIterator[str]:
        async with self.lock:
            async for piece in iterate_in_threadpool(self.mllm.stream_text(ask, max_tokens)):
                yield piece


def create_mllm_app(mllm: LocalMLLM) -> FastAPI:
    """`mllm`'s store takes what is shown and the tokens that are sent back; `LRUObjectStore` is enough."""
    app = FastAPI(title="omnivideo mllm", docs_url=None, redoc_url=None)
    service = SerializedMLLM(mllm)
    add_mllm_routes(app, lambda: service)

    @app.get("/health")
    def check_health() -> dict[str, str]:
        return {"status": "ok"}

    return app

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

from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.wire import Agreement, Asked, AskedForTokens, AskedToWrite, Refused
from omnivideo.contracts import Artifact, Ask, Medium, Routed
from omnivideo.errors import InvalidInput, NotStored
from omnivideo.storage.local import key_of


class Answers(Protocol):
    """What stands behind the routes.  Raises InvalidInput for what cannot be answered."""

    async def route(self, asked: Asked) -> Routed: ...

    async def agreement(self, asked: Asked) -> float: ...

    async def write(self, asked: Asked, most: int) -> AsyncIterator[str]:
        """Returns once it is sure that there will be an answer."""
        ...

    async def visual_tokens(self, asked: Asked, medium: Medium) -> bytes: ...


def attach(app: FastAPI, answers: Callable[[], Answers]) -> None:
    """Adds the routes of `wire`; `answers` is asked for at each request, so it may be made later."""

    @app.exception_handler(InvalidInput)
    async def refused(request: Request, error: InvalidInput) -> JSONResponse:
        told = Refused(field=error.field, message=str(error).removeprefix(f"{error.field}: "))
        return JSONResponse(told.model_dump(), 400)

    @app.post("/v1/route")
    async def route(asked: Asked) -> Routed:
        return await answers().route(asked)

    @app.post("/v1/agreement")
    async def agreement(asked: Asked) -> Agreement:
        return Agreement(agreement=await answers().agreement(asked))

    @app.post("/v1/write")
    async def write(body: AskedToWrite) -> StreamingResponse:
        pieces = await answers().write(body.asked, body.most)
        return StreamingResponse(lines(pieces), media_type="application/x-ndjson")

    @app.post("/v1/visual_tokens")
    async def visual_tokens(body: AskedForTokens) -> Response:
        tokens = await answers().visual_tokens(body.asked, body.medium)
        return Response(tokens, media_type="application/octet-stream")


async def lines(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    async for piece in pieces:
        yield json.dumps(piece) + "\n"
    yield "null\n"


class Lately:
    """An object store for what passes through: of the newest things, as many as have room."""

    def __init__(self, most: int = 2**30):
        self.held: OrderedDict[str, bytes] = OrderedDict()
        self.most = most  # bytes

    def put(self, data: bytes, suffix: str) -> str:
        key = key_of(data, suffix)
        self.held[key] = data
        self.held.move_to_end(key)
        while len(self.held) > 1 and sum(map(len, self.held.values())) > self.most:
            self.held.popitem(last=False)
        return key

    def get(self, key: str) -> bytes:
        if key not in self.held:
            raise NotStored(f"store: there is no artifact {key}")
        return self.held[key]

    def has(self, key: str) -> bool:
        return key in self.held


class InTurn:
    """A LocalMLLM for many: one answer at a time, since it uses all cores (or the GPU) for each."""

    def __init__(self, mllm: LocalMLLM):
        self.mllm = mllm
        self.turn = asyncio.Lock()

    def ask(self, asked: Asked) -> Ask:
        shown = tuple(
            Artifact(key=self.mllm.store.put(one.data, one.suffix), medium=one.medium, width=0, height=0, frames=0,
                     fps=one.fps, about="", made_by="")
            for one in asked.shown
        )  # fmt: skip
        return Ask(text=asked.text, shown=shown, system=asked.system)

    async def route(self, asked: Asked) -> Routed:
        async with self.turn:
            return await asyncio.to_thread(lambda: self.mllm.route(self.ask(asked)))

    async def agreement(self, asked: Asked) -> float:
        async with self.turn:
            return await asyncio.to_thread(lambda: self.mllm.agreement(self.ask(asked)))

    async def visual_tokens(self, asked: Asked, medium: Medium) -> bytes:
        async with self.turn:
            return await asyncio.to_thread(
                lambda: self.mllm.store.get(self.mllm.visual_tokens(self.ask(asked), medium))
            )

    async def write(self, asked: Asked, most: int) -> AsyncIterator[str]:
        async with self.turn:
            ask = await asyncio.to_thread(self.ask, asked)
            await asyncio.to_thread(self.mllm.message, ask)  # what cannot be read is refused here; it stays decoded
        return self.pieces(ask, most)

    async def pieces(self, ask: Ask, most: int) -> AsyncIterator[str]:
        async with self.turn:
            async for piece in iterate_in_threadpool(self.mllm.write(ask, most)):
                yield piece


def mllm_app(mllm: LocalMLLM) -> FastAPI:
    """`mllm`'s store takes what is shown and the tokens that are sent back; `Lately` is enough."""
    app = FastAPI(title="omnivideo mllm", docs_url=None, redoc_url=None)
    answers = InTurn(mllm)
    attach(app, lambda: answers)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app

"""The MLLM of one process for many: the planner's port over HTTP.  `omnivideo mllm serve` runs it."""

import json
import threading
from collections.abc import Iterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from omnivideo.contracts import Ask, Medium, Message, Routed
from omnivideo.ports import MLLM


class Agreement(Message):
    agreement: float


class Tokens(Message):
    key: str


class Wanted(Message):
    ask: Ask
    medium: Medium


def mllm_app(mllm: MLLM) -> FastAPI:
    """One answer at a time: the model uses all cores (or the GPU) for each."""
    app, turn = FastAPI(title="omnivideo mllm", docs_url=None, redoc_url=None), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/route")
    def route(ask: Ask) -> Routed:
        with turn:
            return mllm.route(ask)

    @app.post("/write")
    def write(ask: Ask) -> StreamingResponse:
        def pieces() -> Iterator[str]:
            with turn:
                for piece in mllm.write(ask):
                    yield json.dumps(piece) + "\n"
                yield "null\n"

        return StreamingResponse(pieces(), media_type="application/x-ndjson")

    @app.post("/agreement")
    def agreement(ask: Ask) -> Agreement:
        with turn:
            return Agreement(agreement=mllm.agreement(ask))

    @app.post("/visual_tokens")
    def visual_tokens(wanted: Wanted) -> Tokens:
        with turn:
            return Tokens(key=mllm.visual_tokens(wanted.ask, wanted.medium))

    return app

"""The language model without a conversation: answer a question about an image or a clip, and route a request."""

import json
from collections.abc import Iterator
from itertools import chain

from anyio.to_thread import run_sync
from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from omnivideo.api.dependencies import ContextDep, OwnerDep, ServiceContext
from omnivideo.api.errors import ERROR_RESPONSES
from omnivideo.api.media import MediaReference, resolve_source
from omnivideo.api.request_body import BodyFields, CleanText, ServiceRoute, document_request_body, validate_fields
from omnivideo.contracts import MLLMRequest, RequestModel, Route, TextSampling

router = APIRouter(route_class=ServiceRoute, prefix="/v1", tags=["understanding"], responses=ERROR_RESPONSES)


class RouteRequest(RequestModel):
    """A request, and the image or clip that it is about, if there is one."""

    model_config = ConfigDict(extra="forbid")

    prompt: CleanText = Field(min_length=1, max_length=4000)
    source: MediaReference | None = None


class UnderstandRequest(RequestModel):
    """A question about an image or a clip. With `stream`, the answer comes in pieces."""

    model_config = ConfigDict(extra="forbid")

    question: CleanText = Field(min_length=1, max_length=4000)
    source: MediaReference
    temperature: float = Field(default=0.2, ge=0, le=2)
    top_p: float = Field(default=0.6, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    stream: bool = False


class MediaAnswer(BaseModel):
    answer: str


def build_request(
    context: ServiceContext, owner: str, field: str, text: str, source: MediaReference | None
) -> MLLMRequest:
    text = context.text_limits.check_message(field, text)
    artifacts = () if source is None else (resolve_source(context, owner, source, "source"),)
    return MLLMRequest(text=text, artifacts=artifacts)


def count_tokens(context: ServiceContext, owner: str, request: MLLMRequest, answer: str) -> None:
    """Count the tokens of a request and of its answer for the owner."""
    prompt_tokens, answer_tokens = map(context.conversations.mllm.count_tokens, (request.text, answer))
    context.usage.add_usage(owner, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)


def count_answer(context: ServiceContext, owner: str, request: MLLMRequest, pieces: Iterator[str]) -> Iterator[str]:
    """Yield the pieces of an answer, and count their tokens when it ends or its client leaves."""
    answer = ""
    try:
        for piece in pieces:
            answer += piece
            yield piece
    finally:
        count_tokens(context, owner, request, answer)


@router.post("/route", openapi_extra=document_request_body(RouteRequest, "source"))
def route_request(context: ContextDep, owner: OwnerDep, fields: BodyFields) -> Route:
    """Return what the model would answer a request with: text, an image or a video, with its probability."""
    payload = validate_fields(RouteRequest, fields)
    request = build_request(context, owner, "prompt", payload.prompt, payload.source)
    count_tokens(context, owner, request, "")
    return context.conversations.mllm.route(request)


@router.post(
    "/understand",
    response_model=MediaAnswer,
    responses={200: {"content": {"application/x-ndjson": {}}, "description": "The answer, or its pieces"}},
    openapi_extra=document_request_body(UnderstandRequest, "source"),
)
async def understand_media(context: ContextDep, owner: OwnerDep, fields: BodyFields) -> Response:
    """Answer a question. A stream is one JSON string for each piece, then null if the answer is complete."""
    payload = validate_fields(UnderstandRequest, fields)

    def start_answer() -> Iterator[str]:
        """Return the pieces, whose tokens are counted; what is wrong with the request is raised before the first."""
        request = build_request(context, owner, "question", payload.question, payload.source)
        sampling = TextSampling(temperature=payload.temperature, top_p=payload.top_p, seed=payload.seed)
        pieces = context.conversations.mllm.stream_text(request.model_copy(update={"sampling": sampling}))
        return count_answer(context, owner, request, chain([next(pieces, "")], pieces))

    pieces = await run_sync(start_answer)
    if payload.stream:
        return StreamingResponse(encode_pieces(pieces), media_type="application/x-ndjson")
    answer = MediaAnswer(answer=(await run_sync(lambda: "".join(pieces))).strip())
    return Response(answer.model_dump_json(), media_type="application/json")


def encode_pieces(pieces: Iterator[str]) -> Iterator[str]:
    for piece in pieces:
        yield json.dumps(piece) + "\n"
    yield "null\n"

"""Chat as OpenAI's clients speak it.

Such a client sends all messages every time and knows nothing of threads, so the messages themselves say which thread
they belong to: after each answer the digest of all messages so far is kept with the thread and its number of turns.
Messages that lead back to an earlier answer go on from there, in a fork if the thread has grown since; messages that
were never seen here begin a new thread with the last one.
"""

import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sse_starlette import EventSourceResponse

from omnivideo.api.dependencies import ContextDep, OwnerDep, ServiceContext
from omnivideo.api.errors import ERROR_RESPONSES, INTERNAL_ERROR, APIError, build_error_body
from omnivideo.api.event_feed import EventFeed
from omnivideo.api.media import MediaPart, artifact_from_part
from omnivideo.api.request_body import make_id, validate_fields
from omnivideo.api.routes.threads import get_event_feed
from omnivideo.contracts import MAX_SEED, Artifact, Think

router = APIRouter(prefix="/v1", tags=["chat"], responses=ERROR_RESPONSES)


class MediaUrl(BaseModel):
    url: str


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: MediaUrl


class VideoPart(BaseModel):
    type: Literal["video_url"]
    video_url: MediaUrl


ContentPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None

    @property
    def text(self) -> str:
        if not isinstance(self.content, list):
            return self.content or ""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def media_urls(self) -> list[str]:
        media_parts = [part for part in self.content or [] if isinstance(part, ImagePart | VideoPart)]
        return [(part.image_url if isinstance(part, ImagePart) else part.video_url).url for part in media_parts]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatCompletionRequest(BaseModel):
    """`think`, `check`, `seed`, `steps` and `guidance_scale` are for this turn, as in a thread."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=1)
    think: Think = "auto"
    check: int = Field(default=1, ge=1, le=16)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    steps: int | None = Field(default=None, ge=1, le=200)
    guidance_scale: float | None = Field(default=None, ge=0, le=30)


@router.get("/models")
def list_models(context: ContextDep, owner: OwnerDep) -> dict[str, Any]:
    """What may stand in `model`."""
    return {"object": "list", "data": [to_model_object(context.settings.preset)]}


@router.get("/models/{name}")
def get_model(name: str, context: ContextDep, owner: OwnerDep) -> dict[str, Any]:
    check_model_name(context, name)
    return to_model_object(name)


def to_model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "omnivideo"}


def check_model_name(context: ServiceContext, name: str) -> None:
    if name != context.settings.preset:
        text = f"model: there is no {name[:100]!r} here, but {context.settings.preset!r}"
        raise APIError(404, text, "model", "model_not_found")


def digest_messages(messages: list[ChatMessage]) -> str:
    """Of the words and media of all messages; what they carry besides does not matter."""
    content = [[message.role, message.text, message.media_urls] for message in messages]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class ChatCompletion:
    """One answer: the thread it is said in, and the turn that is its making."""

    def __init__(self, context: ServiceContext, owner: str, payload: ChatCompletionRequest, base_url: str = "/"):
        self.context, self.owner, self.payload, self.base_url = context, owner, payload, base_url
        self.runner = context.turn_runner
        self.id, self.created_at = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.thread_id, self.turn_id, self.answer_text = "", "", ""

    def start_turn(self) -> None:
        check_model_name(self.context, self.payload.model)
        last_message = self.payload.messages[-1]
        if last_message.role != "user" or not last_message.text.strip():
            raise APIError(400, "messages: the last one must be the user's, with some text", "messages")
        self.thread_id = self.find_or_create_thread()
        media_parts = [MediaPart(url=url) for url in last_message.media_urls]
        attachments = [
            artifact_from_part(self.context, self.owner, part, f"{self.thread_id}/attached") for part in media_parts
        ]
        options = self.payload.model_dump(include={"think", "check", "seed", "steps", "guidance_scale"})
        turn_id = make_id("turn", self.owner, None)
        self.turn_id = self.runner.start_turn(
            turn_id, self.owner, self.thread_id, last_message.text, attachments, **options
        ).id

    def find_or_create_thread(self) -> str:
        """The thread of the messages before the last one."""
        known_thread = self.context.turns.find_chat_thread(self.owner, digest_messages(self.payload.messages[:-1]))
        thread_id = uuid.uuid4().hex[:16]
        if known_thread is not None:
            thread = self.runner.get_thread(self.owner, known_thread[0])
            if len(thread.get_turns()) == known_thread[1]:
                return str(known_thread[0])
            self.context.turns.create_thread(thread_id, self.owner)
            thread.fork(known_thread[1], thread_id)
            return thread_id
        self.context.turns.create_thread(thread_id, self.owner)
        self.context.conversations.open_thread(thread_id, create=True, owner=self.owner)
        return thread_id

    def text_from_event(self, event: dict[str, Any]) -> str:
        """What an event adds to the answer's text."""
        match event["kind"]:
            case "text":
                return str(event["delta"])
            case "question":
                return str(event["text"])
            case "artifact" if event["final"]:
                return self.to_markdown_link(Artifact(**event["artifact"]))
        return ""

    def to_markdown_link(self, artifact: Artifact) -> str:
        """A clip or a picture as Markdown shows it."""
        url = f"{self.base_url}v1/threads/{self.thread_id}/artifacts/{artifact.key}"
        return f"\n![{artifact.medium}]({url})\n"

    def record_completion(self) -> None:
        """Remembers where these messages lead to; raises what ended the turn before its end."""
        row = self.context.turns.get_turn(self.turn_id, self.owner)
        if row.state in ("failed", "cancelled"):
            error = row.error or {"message": "the turn was cancelled", "param": None, "code": "cancelled"}
            status = 500 if error.get("type") == "server_error" else 409 if row.error is None else 400
            raise APIError(status, error["message"], error["param"], error["code"])
        answer = ChatMessage(role="assistant", content=self.answer_text)
        num_turns = len(self.runner.get_thread(self.owner, self.thread_id).get_turns())
        digest = digest_messages([*self.payload.messages, answer])
        self.context.turns.save_chat_thread(self.owner, digest, self.thread_id, num_turns)

    # ------------------------------------------------------------ on the wire

    def build_completion(self) -> dict[str, Any]:
        """The whole answer of a turn that is over."""
        events = [event for _, event in self.context.turns.list_events(self.turn_id)]
        self.answer_text = "".join(map(self.text_from_event, events))
        reasoning = "".join(event["delta"] for event in events if event["kind"] == "thinking")
        self.record_completion()
        message = {"role": "assistant", "content": self.answer_text}
        if reasoning:
            message["reasoning_content"] = reasoning
        return self.build_envelope("chat.completion", {"message": message, "finish_reason": "stop"})

    async def stream_chunks(self, feed: EventFeed) -> AsyncIterator[dict[str, str]]:
        yield self.build_chunk({"role": "assistant", "content": ""})
        async for _, event in feed.follow_turn(self.turn_id):
            if text := self.text_from_event(event):
                self.answer_text += text
                yield self.build_chunk({"content": text})
            elif event["kind"] == "thinking":
                yield self.build_chunk({"reasoning_content": event["delta"]})
            elif event["kind"] == "waiting":  # where a person sees it
                yield self.build_chunk({"reasoning_content": f"\n{event['text']}\n"})
            elif event["kind"] == "step":
                yield {"comment": f"step {event['step']} of {event['steps']}"}
        try:
            await anyio.to_thread.run_sync(self.record_completion)
        except APIError as error:
            yield {"data": json.dumps(build_error_body(error.status_code, error.message, error.param, error.code))}
        except Exception:
            yield {"data": json.dumps(build_error_body(500, INTERNAL_ERROR, None, "internal"))}
        else:
            yield self.build_chunk({}, finish_reason="stop")
        yield {"data": "[DONE]"}

    def build_chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, str]:
        chunk = self.build_envelope("chat.completion.chunk", {"delta": delta, "finish_reason": finish_reason})
        return {"data": json.dumps(chunk)}

    def build_envelope(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created_at, "model": self.payload.model,
            "choices": [{"index": 0, "logprobs": None, **choice}],
            "omnivideo": {"thread": self.thread_id, "turn": self.turn_id},
        }  # fmt: skip


@router.post("/chat/completions", response_class=JSONResponse)
async def create_chat_completion(
    payload: ChatCompletionRequest, request: Request, context: ContextDep, owner: OwnerDep
) -> Response:
    """Says the last message in the conversation that the earlier ones are."""
    completion = ChatCompletion(context, owner, payload, str(request.base_url))
    await anyio.to_thread.run_sync(completion.start_turn)
    if payload.stream:
        return EventSourceResponse(completion.stream_chunks(get_event_feed(request)), ping=15)
    async for _ in get_event_feed(request).follow_turn(completion.turn_id):
        pass
    return JSONResponse(await anyio.to_thread.run_sync(completion.build_completion))


def run_chat_request(context: ServiceContext, owner: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A batch's line: the answer as the route would give it, waited for here.  Raises OmniVideoError or APIError."""
    completion = ChatCompletion(context, owner, validate_fields(ChatCompletionRequest, fields))
    completion.start_turn()
    context.turns.wait_for_end(completion.turn_id, owner)
    return completion.build_completion()

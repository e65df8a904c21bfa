"""Chat completions, in the format of OpenAI's clients.

Such a client sends the whole conversation with every request and does not know about threads, so the service finds the
thread from the messages. After each answer, it stores a digest of all messages so far, with the thread and its number
of turns. Messages that continue a known answer continue its thread, or a fork of it if the thread has grown since.
Unknown messages start a new thread, to which only the last message is sent.
"""

import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sse_starlette import EventSourceResponse

from omnivideo.api.answers.answer import IDLE_SECONDS, AnswerPart, ChatAnswer, Usage
from omnivideo.api.answers.chat_format import ChatFormat, FinishReason, ServerSentEvent
from omnivideo.api.answers.links import create_link_builder
from omnivideo.api.answers.sampling_fields import ChatSamplingFields
from omnivideo.api.dependencies import (
    ContextDep,
    IdempotencyDep,
    IdempotentRequest,
    OwnerDep,
    ServiceContext,
    make_id,
)
from omnivideo.api.errors import ERROR_RESPONSES, APIError, log_if_internal, to_api_error
from omnivideo.api.event_feed import EventFeed, get_event_feed
from omnivideo.api.media import MediaPart, artifact_from_part
from omnivideo.api.request_body import validate_fields
from omnivideo.api.turn_runner import ATTENDED_RETRY_TIMEOUT_SECONDS
from omnivideo.contracts import RequestModel
from omnivideo.errors import UnusableContent
from omnivideo.turns import TurnRecord

router = APIRouter(prefix="/v1", tags=["chat"], responses=ERROR_RESPONSES)


class MediaUrl(RequestModel):
    url: str


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class ImagePart(RequestModel):
    type: Literal["image_url"]
    image_url: MediaUrl


class VideoPart(RequestModel):
    type: Literal["video_url"]
    video_url: MediaUrl


ContentPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class ChatMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None

    @property
    def text(self) -> str:
        if not isinstance(self.content, list):
            return self.content or ""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def media_urls(self) -> list[str]:
        return [url for _, url in self.list_media()]

    def list_media(self) -> list[tuple[str, str]]:
        """Return the message's images and clips: the name of the field, such as `content.1.image_url`, and the URL."""
        media = []
        for index, part in enumerate(self.content if isinstance(self.content, list) else []):
            if isinstance(part, ImagePart):
                media.append((f"content.{index}.image_url", part.image_url.url))
            elif isinstance(part, VideoPart):
                media.append((f"content.{index}.video_url", part.video_url.url))
        return media


class StreamOptions(RequestModel):
    include_usage: bool = False


class ChatCompletionRequest(ChatSamplingFields):
    """`progress` says whether a stream tells how the work on a clip goes on."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    progress: bool = True


@router.get("/models")
def list_models(context: ContextDep, owner: OwnerDep) -> dict[str, Any]:
    """Return the names that `model` accepts."""
    return {"object": "list", "data": [to_model_object(context.settings.preset)]}


@router.get("/models/{name}")
def get_model(name: str, context: ContextDep, owner: OwnerDep) -> dict[str, Any]:
    check_model_name(context, name)
    return to_model_object(name)


def to_model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "omnivideo"}


def check_model_name(context: ServiceContext, name: str) -> None:
    if name != context.settings.preset:
        message = f"model: there is no {name[:100]!r} here; allowed: {context.settings.preset}"
        raise APIError(404, message, "model", "model_not_found")


def digest_messages(messages: list[ChatMessage]) -> str:
    """Return a digest of the roles, texts and media of all messages; other fields do not count."""
    content = [[message.role, message.text, message.media_urls] for message in messages]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class ChatCompletion:
    """One answer, with the thread that it belongs to and the turn that produces it."""

    def __init__(self, context: ServiceContext, owner: str, payload: ChatCompletionRequest, base_url: str = "/"):
        self.context, self.owner, self.payload = context, owner, payload
        self.links = create_link_builder(context, owner, base_url)
        self.created_at = int(time.time())
        self.thread_id, self.turn_id = "", ""
        self.idempotent_payload: BaseModel = payload
        self.retry_timeout_seconds, self.client_fields = ATTENDED_RETRY_TIMEOUT_SECONDS, dict[str, Any]()

    @property
    def id(self) -> str:
        return f"chatcmpl-{self.turn_id.removeprefix('turn_')}"

    def start_turn(self, idempotent_request: IdempotentRequest | None = None) -> None:
        """Start the turn of the last message, unless an earlier request with the idempotency key has done so.

        Raises APIError or InvalidInput if the request is refused.
        """
        if idempotent_request is None:
            turn = self.create_or_refuse_turn(make_id("turn_"))
        else:
            find = partial(self.context.turn_runner.find_live_turn, self.owner)
            turn = idempotent_request.run(self.idempotent_payload, "turn_", find, self.create_or_refuse_turn)
        self.turn_id, self.thread_id, self.created_at = turn.id, turn.thread_id, int(turn.created_at)

    def create_or_refuse_turn(self, turn_id: str) -> TurnRecord:
        """Create the turn, or one that explains in words what is wrong with a person's words or files."""
        try:
            return self.create_turn(turn_id)
        except UnusableContent as error:
            return self.context.turn_runner.refuse_turn(
                turn_id, self.owner, self.thread_id, error, client_fields=self.client_fields
            )

    def create_turn(self, turn_id: str) -> TurnRecord:
        check_model_name(self.context, self.payload.model)
        last_message = self.payload.messages[-1]
        if last_message.role != "user" or not last_message.text.strip():
            raise APIError(400, "messages: the last message must be the user's and contain text", "messages")
        self.thread_id = self.find_or_create_thread()
        field = f"messages.{len(self.payload.messages) - 1}"
        attachments = [
            artifact_from_part(
                self.context, self.owner, MediaPart(url=url), f"{self.thread_id}/attached", f"{field}.{name}"
            )
            for name, url in last_message.list_media()
        ]
        return self.context.turn_runner.start_turn(
            turn_id,
            self.owner,
            self.thread_id,
            last_message.text,
            attachments,
            retry_timeout_seconds=self.retry_timeout_seconds,
            client_fields=self.client_fields,
            **self.payload.to_turn_options(),
        )

    def find_or_create_thread(self) -> str:
        """Return the id of the thread that the messages before the last one belong to."""
        known_thread = self.context.turns.find_chat_thread(self.owner, digest_messages(self.payload.messages[:-1]))
        new_thread_id = uuid.uuid4().hex[:16]
        if known_thread is None:
            self.context.turns.create_thread(new_thread_id, self.owner)
            self.context.conversations.open_thread(new_thread_id, create=True, owner=self.owner)
            return new_thread_id
        known_thread_id, num_turns = known_thread
        thread = self.context.turn_runner.get_thread(self.owner, known_thread_id)
        if len(thread.get_turns()) == num_turns:
            return known_thread_id
        self.context.turns.create_thread(new_thread_id, self.owner)
        thread.fork(num_turns, new_thread_id)
        return new_thread_id

    def require_turn(self) -> TurnRecord:
        turn = self.context.turns.get_turn(self.turn_id, self.owner)
        assert turn is not None, "turns are never deleted"
        return turn

    def record_completion(self, answer_text: str) -> None:
        """Store which thread continues these messages."""
        turn = self.require_turn()
        answer = ChatMessage(role="assistant", content=answer_text)
        num_turns = turn.number if turn.state == "done" else turn.number - 1  # later turns do not count
        digest = digest_messages([*self.payload.messages, answer])
        self.context.turns.save_chat_thread(self.owner, digest, self.thread_id, num_turns)

    # ------------------------------------------------------------ responses

    @property
    def format(self) -> ChatFormat:
        options = self.payload.stream_options or StreamOptions()
        names = {"thread": self.thread_id, "turn": self.turn_id}
        return ChatFormat(
            self.id,
            self.created_at,
            self.payload.model,
            self.payload.progress,
            options.include_usage,
            {"omnivideo": names},
        )

    def end_answer(self, answer: ChatAnswer) -> tuple[list[AnswerPart], FinishReason, Usage]:
        """End the answer with its turn and store it. Return what is new, why it has ended, and its usage."""
        parts = list(answer.end(self.require_turn()))
        self.record_completion(answer.text)
        count_tokens = self.context.conversations.mllm.count_tokens
        is_cut = answer.is_cut(self.payload.token_limit, count_tokens)
        usage = answer.count_usage(count_tokens(self.prompt_text), count_tokens)
        return parts, "length" if is_cut else "stop", usage

    @property
    def prompt_text(self) -> str:
        return "\n".join(message.text for message in self.payload.messages)

    def build_completion(self) -> dict[str, Any]:
        """Return the answer of a turn that has ended. Raises APIError if it has failed or was cancelled."""
        answer = ChatAnswer(self.thread_id, self.links)
        answer.read_events(event for _, event in self.context.turns.list_events(self.turn_id))
        _, finish_reason, usage = self.end_answer(answer)
        return self.format.build_completion(answer.text, answer.reasoning, usage, finish_reason)

    async def stream_chunks(self, feed: EventFeed) -> AsyncIterator[ServerSentEvent]:
        """Yield the answer as server-sent events while the turn runs."""
        answer, chat_format = ChatAnswer(self.thread_id, self.links), self.format
        yield chat_format.begin_stream()
        async for _, event in feed.follow_turn(self.turn_id, idle_seconds=IDLE_SECONDS):
            for part in answer.read_event(event):
                for chunk in chat_format.build_chunks(part):
                    yield chunk
        try:
            parts, finish_reason, usage = await anyio.to_thread.run_sync(self.end_answer, answer)
        except Exception as error:
            log_if_internal(error, f"chat completion {self.id}")
            ending = list(chat_format.fail_stream(to_api_error(error)))
        else:
            ending = [chunk for part in parts for chunk in chat_format.build_chunks(part)]
            ending += chat_format.end_stream(finish_reason, usage if chat_format.includes_usage else None)
        for chunk in ending:
            yield chunk


@router.post("/chat/completions", response_class=JSONResponse)
async def create_chat_completion(
    payload: ChatCompletionRequest,
    request: Request,
    context: ContextDep,
    owner: OwnerDep,
    idempotent_request: IdempotencyDep,
) -> Response:
    """Send the last message in the conversation that the earlier messages form."""
    completion = ChatCompletion(context, owner, payload, str(request.base_url))
    await anyio.to_thread.run_sync(completion.start_turn, idempotent_request)
    if payload.stream:
        return EventSourceResponse(completion.stream_chunks(get_event_feed(request)), ping=15)
    async for _ in get_event_feed(request).follow_turn(completion.turn_id):
        pass
    return JSONResponse(await anyio.to_thread.run_sync(completion.build_completion))


def run_chat_request(context: ServiceContext, owner: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Answer a line of a batch as the route would, and block until the answer is complete.

    Raises OmniVideoError or APIError.
    """
    completion = ChatCompletion(context, owner, validate_fields(ChatCompletionRequest, fields))
    completion.start_turn()
    context.turns.wait_for_end(completion.turn_id, owner)
    return completion.build_completion()

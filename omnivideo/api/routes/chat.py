"""Chat completions, in the format of OpenAI's clients.

Such a client sends the whole conversation with every request and does not know about threads. api/chat/ reads the
messages and finds the thread; api/answers/ writes the answer.
"""

import time
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sse_starlette import EventSourceResponse

from omnivideo.agent.capabilities import explain_invalid_input
from omnivideo.api.answers.answer import IDLE_SECONDS, AnswerPart, ChatAnswer, Usage
from omnivideo.api.answers.chat_format import ChatFormat, FinishReason, ServerSentEvent
from omnivideo.api.answers.links import create_link_builder
from omnivideo.api.answers.sampling_fields import ChatSamplingFields, ResponseFormat
from omnivideo.api.chat.messages import ChatMessage
from omnivideo.api.chat.reading import TEXT_ONLY_SUFFIX, ChatRequest
from omnivideo.api.dependencies import (
    ContextDep,
    IdempotencyDep,
    IdempotentRequest,
    OwnerDep,
    ResourceId,
    ServiceContext,
    make_id,
)
from omnivideo.api.errors import (
    ERROR_RESPONSES,
    APIError,
    build_not_found_error,
    error_from_turn,
    log_if_internal,
    to_api_error,
)
from omnivideo.api.event_feed import EventFeed, get_event_feed
from omnivideo.api.request_body import ServiceRoute, rename_error_field, validate_fields
from omnivideo.api.turn_runner import ATTENDED_RETRY_TIMEOUT_SECONDS
from omnivideo.api.waiting import CLIENT_CLOSED_REQUEST, leave_after_stream, leave_if_refused, wait_for_work
from omnivideo.contracts import OPEN_STATES, Lane, RequestModel
from omnivideo.errors import InvalidInput, ModelUnavailable, UnusableContent
from omnivideo.turns import TurnRecord

router = APIRouter(route_class=ServiceRoute, prefix="/v1", tags=["chat"], responses=ERROR_RESPONSES)


class StreamOptions(RequestModel):
    include_usage: bool = False


class ChatCompletionRequest(ChatSamplingFields):
    """`progress` says whether a stream tells how the work on a clip goes on."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    progress: bool = True


@router.get("/models")
def list_models(context: ContextDep, owner: OwnerDep) -> dict[str, Any]:
    """Return the names that `model` accepts."""
    return {"object": "list", "data": [to_model_object(name) for name in list_model_names(context)]}


def list_model_names(context: ServiceContext) -> list[str]:
    """Return the names of the model, and of the same model that only answers in words."""
    return [context.settings.preset, context.settings.preset + TEXT_ONLY_SUFFIX]


@router.get("/models/{name}")
def get_model(name: ResourceId, context: ContextDep, owner: OwnerDep) -> dict[str, Any]:
    check_model_name(context, name)
    return to_model_object(name)


def to_model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "omnivideo"}


def check_model_name(context: ServiceContext, name: str) -> None:
    names = list_model_names(context)
    if name not in names:
        message = f"model: there is no {name[:100]!r} here; allowed: {', '.join(names)}"
        raise APIError(404, message, "model", "model_not_found")


class ChatCompletion:
    """One answer, with the thread that it belongs to and the turn that produces it."""

    def __init__(
        self,
        context: ServiceContext,
        owner: str,
        payload: ChatCompletionRequest,
        base_url: str = "/",
        lane: Lane = "interactive",
    ):
        check_model_name(context, payload.model)
        self.context, self.owner, self.payload = context, owner, payload
        self.links = create_link_builder(context, owner, base_url)
        self.request = ChatRequest(context, owner, payload.model, payload.messages, payload.response_format, lane)
        self.created_at = int(time.time())
        self.thread_id, self.turn_id = "", ""
        self.words: str | None = None  # the answer to a request that is no turn
        self.words_usage = Usage(0, 0, 0)
        self.idempotent_payload: BaseModel = payload
        self.turn_fields: dict[str, Any] = {"retry_timeout_seconds": ATTENDED_RETRY_TIMEOUT_SECONDS}

    @property
    def id(self) -> str:
        return f"chatcmpl-{self.turn_id.removeprefix('turn_') or uuid.uuid4().hex}"

    def start(self, idempotent_request: IdempotentRequest | None = None, turn_id: str = "") -> None:
        """Answer in words at once, or start the turn of the last message.

        An earlier request with the idempotency key may have started it. Without such a request, the turn has
        the id `turn_id`, or a new one. Raises APIError or InvalidInput if the request is refused.
        """
        try:
            self.words = self.answer_in_words()
            if self.words is not None:
                self.words_usage = self.count_words(self.words)
            else:
                turn = self.find_or_create_turn(idempotent_request, turn_id)
                self.turn_id, self.thread_id, self.created_at = turn.id, turn.thread_id, int(turn.created_at)
        except InvalidInput as error:
            raise rename_error_field(error, self.rename_field(error.field)) from None
        except APIError as error:
            if error.param is not None:
                field = self.rename_field(error.param)
                error.message, error.param = error.message.replace(error.param, field, 1), field
            raise

    def rename_field(self, field: str) -> str:
        """Return the request's name for the field of a turn."""
        if field != "text":
            return field
        indices = [index for index, message in enumerate(self.payload.messages) if message.role == "user"]
        return f"messages.{indices[-1] if indices else len(self.payload.messages) - 1}.content"

    def answer_in_words(self) -> str | None:
        """Return the answer to a request that is no turn, which may say what is wrong with it; None for a turn."""
        try:
            return self.request.answer_in_words()
        except UnusableContent as error:
            return explain_invalid_input(error)

    def find_or_create_turn(self, idempotent_request: IdempotentRequest | None, turn_id: str) -> TurnRecord:
        find = partial(self.context.turn_runner.find_live_turn, self.owner)
        if idempotent_request is None:
            return find(turn_id) or self.create_or_refuse_turn(turn_id or make_id("turn_"))
        return idempotent_request.run(
            self.idempotent_payload, "turn_", find, self.create_or_refuse_turn, is_waiting=True
        )

    def create_or_refuse_turn(self, turn_id: str) -> TurnRecord:
        """Create the turn, or one that explains in words what is wrong with a person's words or files."""
        try:
            return self.request.start_turn(turn_id, **self.payload.to_turn_options(), **self.turn_fields)
        except UnusableContent as error:
            named_error = rename_error_field(error, self.rename_field(error.field))
            return self.request.refuse_turn(turn_id, named_error, self.turn_fields.get("client_fields"))

    async def wait_for_beginning(self, feed: EventFeed) -> None:
        """Wait until a stream has something to say, or for a while.

        Raises the APIError of a turn that ends before, whose status a stream could no longer send.
        """
        beginning = await feed.wait_for_beginning(self.turn_id)
        turn = await anyio.to_thread.run_sync(self.require_turn)
        if not beginning.has_begun and turn.state in ("failed", "cancelled"):
            error = error_from_turn(turn)
            if error.explanation is None:
                raise error
        if beginning.waits_for and turn.state in OPEN_STATES:
            raise to_api_error(ModelUnavailable(beginning.waits_for))

    def cancel(self) -> None:
        self.context.turn_runner.cancel_turn(self.require_turn())

    def leave(self, idempotent_request: IdempotentRequest, has_disconnected: bool) -> None:
        """Stop waiting. If the client has disconnected and no other one waits, cancel the turn."""
        idempotent_request.leave(self.turn_id, self.cancel if has_disconnected else None)

    def require_turn(self) -> TurnRecord:
        turn = self.context.turns.get_turn(self.turn_id, self.owner)
        if turn is None:  # its thread was deleted
            raise build_not_found_error("turn", self.turn_id)
        return turn

    def record_completion(self) -> None:
        """Store which thread continues these messages."""
        turn = self.require_turn()
        num_turns = turn.number if turn.state == "done" else turn.number - 1  # later turns do not count
        self.request.remember(self.thread_id, num_turns)

    # ------------------------------------------------------------ responses

    @property
    def format(self) -> ChatFormat:
        options = self.payload.stream_options or StreamOptions()
        names = {"thread": self.thread_id or None, "turn": self.turn_id or None}
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
        self.record_completion()
        count_tokens = self.context.conversations.mllm.count_tokens
        is_cut = answer.is_cut(self.payload.token_limit, count_tokens)
        usage = answer.count_usage(count_tokens(self.prompt_text), count_tokens)
        return parts, "length" if is_cut else "stop", usage

    @property
    def prompt_text(self) -> str:
        return "\n".join(message.text for message in self.payload.messages)

    def build_completion(self) -> dict[str, Any]:
        """Return the answer of a turn that has ended. Raises APIError if it has failed or was cancelled."""
        if self.words is not None:
            return self.format.build_completion(self.words, "", self.words_usage)
        answer = ChatAnswer(self.thread_id, self.links)
        answer.read_events(event for _, event in self.context.turns.list_events(self.turn_id))
        _, finish_reason, usage = self.end_answer(answer)
        return self.format.build_completion(answer.text, answer.reasoning, usage, finish_reason)

    def count_words(self, words: str) -> Usage:
        """Return the usage of an answer that is no turn, and count it for the owner."""
        prompt_tokens, answer_tokens = map(self.context.conversations.mllm.count_tokens, (self.prompt_text, words))
        self.context.usage.add_usage(self.owner, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)
        return Usage(prompt_tokens, answer_tokens, 0)

    async def stream_words(self) -> AsyncIterator[ServerSentEvent]:
        """Yield an answer that is no turn as server-sent events."""
        chat_format = self.format
        yield chat_format.begin_stream()
        for chunk in chat_format.build_chunks(AnswerPart("text", self.words or "")):
            yield chunk
        for chunk in chat_format.end_stream("stop", self.words_usage if chat_format.includes_usage else None):
            yield chunk

    async def stream_chunks(self, feed: EventFeed) -> AsyncIterator[ServerSentEvent]:
        """Yield the answer as server-sent events while the turn runs."""
        answer, chat_format = ChatAnswer(self.thread_id, self.links), self.format
        yield chat_format.begin_stream()
        try:
            async for _, event in feed.follow_turn(self.turn_id, idle_seconds=IDLE_SECONDS):
                for part in answer.read_event(event):
                    for chunk in chat_format.build_chunks(part):
                        yield chunk
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
    await anyio.to_thread.run_sync(completion.start, idempotent_request)
    if completion.words is not None and payload.stream:
        return EventSourceResponse(completion.stream_words(), ping=15)
    if completion.words is not None:
        return JSONResponse(await anyio.to_thread.run_sync(completion.build_completion))
    leave = partial(completion.leave, idempotent_request)
    grace_seconds = context.settings.disconnect_grace_seconds
    feed = get_event_feed(request)
    if payload.stream:
        await leave_if_refused(partial(completion.wait_for_beginning, feed), leave)
        chunks = leave_after_stream(completion.stream_chunks(feed), leave, grace_seconds)
        return EventSourceResponse(chunks, ping=15)
    work = partial(feed.follow_to_end, completion.turn_id)
    if not await wait_for_work(request, work, leave, grace_seconds):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse(await anyio.to_thread.run_sync(completion.build_completion))


def run_chat_request(context: ServiceContext, owner: str, fields: dict[str, Any], line_key: str) -> dict[str, Any]:
    """Answer a line of a batch as the route would, and block until the answer is complete.

    Its clips are rendered after those of interactive requests. The line's key determines the turn, so that a line that
    is answered again has one turn. Raises OmniVideoError or APIError; a line of a key that has used up its share of the
    day is refused before it has a turn, so that it can be answered on the next day.
    """
    context.usage.check_daily_limits(owner)
    payload = validate_fields(ChatCompletionRequest, fields)
    completion = ChatCompletion(context, owner, payload, lane="batch")
    completion.start(turn_id=f"turn_{line_key}")
    if completion.turn_id:
        context.turns.wait_for_end(completion.turn_id, owner)
    return completion.build_completion()

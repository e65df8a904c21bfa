"""Responses, in the format of OpenAI's clients: the turns of a chat, which can also run in the background.

A response is a turn, and has its id. `previous_response_id` continues its thread, or a fork of it if the thread has
grown since; without one, the thread is found from the messages, as for chat completions.
"""

import re
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Any
from uuid import uuid4

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse

from omnivideo.api.answers.answer import IDLE_SECONDS, ChatAnswer
from omnivideo.api.answers.links import LinkBuilder, create_link_builder
from omnivideo.api.answers.response_fields import InputItem, ResponseRequest, list_input_items, to_chat_message
from omnivideo.api.answers.response_format import STATUSES, ResponseWriter, ServerSentEvent
from omnivideo.api.dependencies import (
    ContextDep,
    IdempotencyDep,
    IdempotentRequest,
    OwnerDep,
    ResourceId,
    ServiceContext,
)
from omnivideo.api.errors import ERROR_RESPONSES, APIError, build_not_found_error, log_if_internal, to_api_error
from omnivideo.api.event_feed import EventFeed, get_event_feed
from omnivideo.api.request_body import rename_error_field, validate_fields
from omnivideo.api.routes.chat import ChatCompletion, ChatCompletionRequest
from omnivideo.api.turn_runner import ATTENDED_RETRY_TIMEOUT_SECONDS, RETRY_TIMEOUT_SECONDS
from omnivideo.contracts import Artifact
from omnivideo.errors import InvalidInput
from omnivideo.turns import TurnRecord

router = APIRouter(prefix="/v1/responses", tags=["responses"], responses=ERROR_RESPONSES)
OPEN_STATES = ("queued", "running")
ITEM_ID_PATTERN = re.compile(r"(?:msg|rs|ig)_([0-9a-f]+)_\d+")
MESSAGE_FIELD_PATTERN = re.compile(r"messages\.(\d+)")


# ---------------------------------------------------------------- reading


class StoredResponse:
    """A response, read from the turn that produces it. `on_end` receives the text of an answer that is complete."""

    def __init__(
        self,
        context: ServiceContext,
        turn: TurnRecord,
        links: LinkBuilder,
        on_end: Callable[[str], None] = lambda text: None,
    ):
        self.context, self.turn, self.on_end = context, turn, on_end
        self.answer = ChatAnswer(turn.thread_id, links)
        self.client_fields: dict[str, Any] = turn.body.get("client_fields", {})

    def create_writer(self, shows_progress: bool) -> ResponseWriter:
        suffix = self.turn.id.removeprefix("turn_")
        names = {"id": f"resp_{suffix}", "created_at": int(self.turn.created_at)}
        return ResponseWriter(self.client_fields["response"] | names, suffix, self.load_picture, shows_progress)

    def load_picture(self, artifact: Artifact) -> tuple[bytes, str]:
        if artifact.medium == "video":
            return self.context.render_thumbnail(artifact, "animation")
        return self.context.store.get(artifact.key), artifact.key.rpartition(".")[2]

    def read_text(self) -> str:
        """Return the answer's text."""
        self.answer.read_events(event for _, event in self.context.turns.list_events(self.turn.id))
        return self.answer.text

    def build_response(self) -> dict[str, Any]:
        """Return the response object. Its output is empty until the turn has ended."""
        writer = self.create_writer(shows_progress=False)
        if self.turn.state not in OPEN_STATES:
            for _, event in self.context.turns.list_events(self.turn.id):
                for part in self.answer.read_event(event):
                    list(writer.add(part))
        return self.end(writer)[1]

    def end(self, writer: ResponseWriter) -> tuple[list[ServerSentEvent], dict[str, Any]]:
        """End the output with the turn. Return the events and the response object."""
        if self.turn.state in OPEN_STATES:
            return [], writer.build_response(STATUSES[self.turn.state])
        try:
            events = [event for part in self.answer.end(self.turn) for event in writer.add(part)]
        except APIError as error:
            events = list(writer.close_item())
            if self.turn.state == "cancelled":
                return events, writer.build_response("cancelled")
            return events, writer.build_response("failed", error=error)
        events += writer.close_item()
        self.on_end(self.answer.text)
        count_tokens = self.context.conversations.mllm.count_tokens
        usage = self.answer.count_usage(self.client_fields["prompt_tokens"], count_tokens)
        is_cut = self.answer.is_cut(self.client_fields["response"]["max_output_tokens"], count_tokens)
        return events, writer.build_response("completed", usage, is_cut=is_cut)

    def reload_and_end(self, writer: ResponseWriter) -> list[ServerSentEvent]:
        turn = self.context.turns.get_turn(self.turn.id, self.turn.owner)
        assert turn is not None, "turns are never deleted"
        self.turn = turn
        events, response = self.end(writer)
        return [*events, *writer.end(response)]

    async def stream_events(self, feed: EventFeed, starting_after: int = -1) -> AsyncIterator[ServerSentEvent]:
        """Yield the events with a number above `starting_after`, while the turn runs."""
        writer = self.create_writer(self.client_fields["shows_progress"])
        number = -1
        async for event in self.write_events(feed, writer):
            number += 1
            if number > starting_after:
                yield event

    async def write_events(self, feed: EventFeed, writer: ResponseWriter) -> AsyncIterator[ServerSentEvent]:
        for written in writer.begin():
            yield written
        async for _, event in feed.follow_turn(self.turn.id, idle_seconds=IDLE_SECONDS):
            for part in self.answer.read_event(event):
                # A picture is read from the store, which may take a while.
                for written in await run_sync(list, writer.add(part)) if part.artifact else writer.add(part):
                    yield written
        try:
            ending = await run_sync(self.reload_and_end, writer)
        except Exception as error:
            log_if_internal(error, f"response {self.turn.id}")
            failed = writer.build_response("failed", error=to_api_error(error))
            ending = list(writer.end(failed))
        for written in ending:
            yield written


def load_response(
    context: ServiceContext, owner: str, response_id: str, links: LinkBuilder, field: str = "id"
) -> StoredResponse:
    """Return the owner's response. Raises APIError (404) if there is none, or if it was not to be stored."""
    turn = context.turns.get_turn(f"turn_{response_id.removeprefix('resp_')}", owner)
    fields = turn.body.get("client_fields", {}).get("response") if turn is not None else None
    if turn is None or not fields or not fields["store"] or not context.turns.has_thread(turn.thread_id, owner):
        error = build_not_found_error("response", response_id)
        error.param = field
        raise error
    return StoredResponse(context, turn, links)


# ---------------------------------------------------------------- starting


class ResponseTurn(ChatCompletion):
    """The turn of a request for a response."""

    def __init__(self, context: ServiceContext, owner: str, request: ResponseRequest, base_url: str):
        self.request, links = request, create_link_builder(context, owner, base_url)
        messages, self.message_fields = list[dict[str, Any]](), list[str]()
        for field, item in list_input_items(request):
            message = read_item(context, owner, item, field, links)
            if message is not None and message not in messages[-1:]:
                messages.append(message)
                self.message_fields.append(field)
        if not messages:
            raise InvalidInput("input", "it has no message; give one")
        payload = validate_fields(ChatCompletionRequest, request.to_chat_fields() | {"messages": messages})
        super().__init__(context, owner, payload, base_url)
        self.idempotent_payload = request
        self.retry_timeout_seconds = RETRY_TIMEOUT_SECONDS if request.background else ATTENDED_RETRY_TIMEOUT_SECONDS
        self.client_fields = {
            "response": request.to_response_fields(),
            "prompt_tokens": context.conversations.mllm.count_tokens(self.prompt_text),
            "shows_progress": request.progress,
        }

    def start_turn(self, idempotent_request: IdempotentRequest | None = None) -> None:
        """Start the turn. Errors name the fields of this request, not those of the chat's messages."""
        try:
            super().start_turn(idempotent_request)
        except InvalidInput as error:
            raise rename_error_field(error, self.rename_field(error.field)) from None
        except APIError as error:
            if error.param is not None:
                field = self.rename_field(error.param)
                error.message, error.param = error.message.replace(error.param, field, 1), field
            raise

    def rename_field(self, field: str) -> str:
        if match := MESSAGE_FIELD_PATTERN.match(field):
            return self.message_fields[int(match[1])] + field[match.end() :]
        return "input" if field in ("messages", "text") else field

    def find_or_create_thread(self) -> str:
        """Return the thread of the previous response, as it was after it, or the one that the messages belong to."""
        if self.request.previous_response_id is None:
            return super().find_or_create_thread()
        previous_id = self.request.previous_response_id
        previous = load_response(self.context, self.owner, previous_id, self.links, "previous_response_id").turn
        if previous.state in OPEN_STATES:
            message = "previous_response_id: that response is not complete; wait until it ends, or cancel it"
            raise APIError(409, message, "previous_response_id", "busy")
        thread = self.context.turn_runner.get_thread(self.owner, previous.thread_id)
        num_turns = previous.number if previous.state == "done" else previous.number - 1
        if len(thread.get_turns()) == num_turns:
            return previous.thread_id
        new_thread_id = uuid4().hex[:16]
        self.context.turns.create_thread(new_thread_id, self.owner)
        thread.fork(num_turns, new_thread_id)
        return new_thread_id

    def load(self) -> StoredResponse:
        # A response that names the previous one does not have the whole conversation in its messages.
        has_history = self.request.previous_response_id is None
        on_end = {"on_end": self.record_completion} if has_history else {}
        return StoredResponse(self.context, self.require_turn(), self.links, **on_end)

    def build_ended_response(self) -> dict[str, Any]:
        """Return the response of a turn that has ended. Raises APIError if it has failed or was cancelled."""
        response = self.load()
        body = response.build_response()
        if body["status"] in ("failed", "cancelled"):
            list(response.answer.end(response.turn))  # it raises the turn's error
        return body


def read_item(
    context: ServiceContext, owner: str, item: InputItem, field: str, links: LinkBuilder
) -> dict[str, Any] | None:
    """Return an input item as a message; None for an item that says nothing, such as a picture of an earlier answer."""
    if item.type == "message":
        return to_chat_message(context, owner, item, field)
    match = ITEM_ID_PATTERN.fullmatch(item.id or "")
    if item.type == "item_reference" and match is not None:
        return {"role": "assistant", "content": load_response(context, owner, match[1], links, field).read_text()}
    return None


# ---------------------------------------------------------------- routes


@router.post("", response_class=JSONResponse)
async def create_response(
    payload: ResponseRequest,
    request: Request,
    context: ContextDep,
    owner: OwnerDep,
    idempotent_request: IdempotencyDep,
) -> Response:
    """Send the last message of the input. With `background`, the answer is fetched with GET."""
    response_turn = await run_sync(partial(ResponseTurn, context, owner, payload, str(request.base_url)))
    await run_sync(response_turn.start_turn, idempotent_request)
    feed = get_event_feed(request)
    if payload.stream:
        stored = await run_sync(response_turn.load)
        return EventSourceResponse(stored.stream_events(feed), ping=15)
    if payload.background:
        return JSONResponse(await run_sync(lambda: response_turn.load().build_response()))
    async for _ in feed.follow_turn(response_turn.turn_id):
        pass
    return JSONResponse(await run_sync(response_turn.build_ended_response))


@router.get("/{response_id}", response_class=JSONResponse)
async def get_response(
    response_id: ResourceId,
    request: Request,
    context: ContextDep,
    owner: OwnerDep,
    stream: bool = False,
    starting_after: Annotated[int, Query(ge=-1)] = -1,
) -> Response:
    """Return a response; with `stream`, its events after the number `starting_after`."""
    links = create_link_builder(context, owner, str(request.base_url))
    stored = await run_sync(load_response, context, owner, response_id, links)
    if stream:
        return EventSourceResponse(stored.stream_events(get_event_feed(request), starting_after), ping=15)
    return JSONResponse(await run_sync(stored.build_response))


@router.post("/{response_id}/cancel", response_class=JSONResponse)
def cancel_response(
    response_id: ResourceId,
    request: Request,
    context: ContextDep,
    owner: OwnerDep,
    idempotent_request: IdempotencyDep,
) -> Response:
    """Cancel a response within one denoising step. One that has ended stays as it is."""
    links = create_link_builder(context, owner, str(request.base_url))

    def cancel(response_id: str) -> StoredResponse:
        stored = load_response(context, owner, response_id, links)
        context.turn_runner.cancel_turn(stored.turn)
        context.turns.wait_for_end(stored.turn.id, owner)
        return load_response(context, owner, response_id, links)

    return JSONResponse(idempotent_request.repeat(response_id, cancel).build_response())

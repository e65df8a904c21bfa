"""Responses, in the format of OpenAI's clients: the turns of a chat, which can also run in the background.

A response is a turn, and has its id. `previous_response_id` continues its thread, or a fork of it if the thread has
grown since; without one, the thread is found from the messages, as for chat completions.
"""

import json
import math
import re
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal
from uuid import uuid4

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sse_starlette import EventSourceResponse

from omnivideo.api.answers.answer import IDLE_SECONDS, AnswerPart, ChatAnswer
from omnivideo.api.answers.links import LinkBuilder, create_link_builder
from omnivideo.api.answers.response_fields import InputItem, ResponseRequest, list_input_items, to_chat_message
from omnivideo.api.answers.response_format import STATUSES, ResponseWriter, ServerSentEvent
from omnivideo.api.chat.history import Position, ThreadFinder
from omnivideo.api.chat.messages import Exchange
from omnivideo.api.dependencies import (
    ContextDep,
    IdempotencyDep,
    OwnerDep,
    ResourceId,
    ServiceContext,
)
from omnivideo.api.errors import ERROR_RESPONSES, APIError, build_not_found_error, log_if_internal, to_api_error
from omnivideo.api.event_feed import EventFeed, get_event_feed
from omnivideo.api.request_body import ServiceRoute, validate_fields
from omnivideo.api.routes.chat import ChatCompletion, ChatCompletionRequest
from omnivideo.api.turn_runner import ATTENDED_RETRY_TIMEOUT_SECONDS, RETRY_TIMEOUT_SECONDS
from omnivideo.api.waiting import (
    CLIENT_CLOSED_REQUEST,
    leave_after_stream,
    leave_if_refused,
    leave_work,
    wait_for_work,
)
from omnivideo.contracts import OPEN_STATES, Artifact
from omnivideo.errors import InvalidInput
from omnivideo.turns import TurnRecord

router = APIRouter(route_class=ServiceRoute, prefix="/v1/responses", tags=["responses"], responses=ERROR_RESPONSES)
ITEM_ID_PATTERN = re.compile(r"(?:msg|rs|ig)_([0-9a-f]+)_\d+")
MESSAGE_FIELD_PATTERN = re.compile(r"messages\.(\d+)")


# ---------------------------------------------------------------- reading


class StoredResponse:
    """A response, read from the turn that produces it. `on_end` is called once its answer is complete."""

    def __init__(
        self,
        context: ServiceContext,
        turn: TurnRecord,
        links: LinkBuilder,
        on_end: Callable[[], None] = lambda: None,
    ):
        self.context, self.turn, self.on_end = context, turn, on_end
        self.answer = ChatAnswer(turn.thread_id, links)
        self.client_fields: dict[str, Any] = turn.body.get("client_fields", {})

    def create_writer(self, shows_progress: bool) -> ResponseWriter:
        suffix = self.turn.id.removeprefix("turn_")
        names = {
            "id": f"resp_{suffix}",
            "created_at": int(self.turn.created_at),
            "omnivideo": {"thread": self.turn.thread_id, "turn": self.turn.id},
        }
        fields, load = self.client_fields["response"] | names, partial(load_picture, self.context, self.turn.owner)
        return ResponseWriter(fields, suffix, load, shows_progress)

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
        self.on_end()
        count_tokens = self.context.conversations.mllm.count_tokens
        usage = self.answer.count_usage(self.client_fields["prompt_tokens"], count_tokens)
        is_cut = self.answer.is_cut(self.client_fields["response"]["max_output_tokens"], count_tokens)
        return events, writer.build_response("completed", usage, is_cut=is_cut)

    def reload_and_end(self, writer: ResponseWriter) -> list[ServerSentEvent]:
        turn = self.context.turns.get_turn(self.turn.id, self.turn.owner)
        if turn is None:
            raise build_not_found_error("response", f"resp_{self.turn.id.removeprefix('turn_')}")
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
        # A background response may be read again, and then its events must have the same numbers.
        idle_seconds = math.inf if self.client_fields["response"]["background"] else IDLE_SECONDS
        try:
            async for _, event in feed.follow_turn(self.turn.id, idle_seconds=idle_seconds):
                for part in self.answer.read_event(event):
                    # A picture is read from the store, which may take a while.
                    for written in await run_sync(list, writer.add(part)) if part.artifact else writer.add(part):
                        yield written
            ending = await run_sync(self.reload_and_end, writer)
        except Exception as error:
            log_if_internal(error, f"response {self.turn.id}")
            ending = list(writer.end(writer.build_response("failed", error=to_api_error(error))))
        for written in ending:
            yield written


class ResponseDeleted(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


def load_picture(context: ServiceContext, owner: str, artifact: Artifact) -> tuple[bytes, str]:
    """Return a picture, or a clip as an animated one, with its file suffix."""
    if artifact.medium == "video":
        return context.render_thumbnail(owner, artifact, "animation")
    return context.store.get(artifact.key), artifact.key.rpartition(".")[2]


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


class PreviousResponseFinder(ThreadFinder):
    """Continues the thread of the previous response, from its state after that response."""

    def __init__(self, context: ServiceContext, previous: TurnRecord):
        super().__init__(context, previous.owner)
        num_turns = previous.number if previous.state == "done" else previous.number - 1
        self.position = Position(previous.thread_id, num_turns, at_question=previous.state == "asks")

    def find_position(self, history: Sequence[Exchange]) -> Position:
        return replace(self.position, unmatched=tuple(history))


class ResponseTurn(ChatCompletion):
    """The turn of a request for a response."""

    def __init__(self, context: ServiceContext, owner: str, request: ResponseRequest, base_url: str):
        links = create_link_builder(context, owner, base_url)
        messages, self.message_fields = list[dict[str, Any]](), list[str]()
        for field, item in list_input_items(request):
            message = read_item(context, owner, item, field, links)
            is_repeated = item.type == "item_reference" and message in messages[-1:]  # several items of one answer
            if message is not None and not is_repeated:
                messages.append(message)
                self.message_fields.append(field)
        if not messages:
            raise InvalidInput("input", "it has no message; give one")
        if request.background and not request.store:
            raise InvalidInput("background", "such a response is fetched later; leave store out, or set it to true")
        payload = validate_fields(ChatCompletionRequest, request.to_chat_fields() | {"messages": messages})
        super().__init__(context, owner, payload, base_url)
        self.idempotent_payload = request
        self.response_fields = request.to_response_fields()
        client_fields = {
            "response": self.response_fields,
            "prompt_tokens": context.conversations.mllm.count_tokens(self.prompt_text),
            "shows_progress": request.progress,
        }
        retry_timeout_seconds = RETRY_TIMEOUT_SECONDS if request.background else ATTENDED_RETRY_TIMEOUT_SECONDS
        self.turn_fields = {"retry_timeout_seconds": retry_timeout_seconds, "client_fields": client_fields}
        if request.previous_response_id is not None:
            previous = load_response(context, owner, request.previous_response_id, links, "previous_response_id").turn
            if previous.state in OPEN_STATES:
                text = "previous_response_id: that response is not complete; wait until it ends, or cancel it"
                raise APIError(409, text, "previous_response_id", "busy")
            self.request.finder = PreviousResponseFinder(context, previous)

    def rename_field(self, field: str) -> str:
        field = super().rename_field(field)
        if match := MESSAGE_FIELD_PATTERN.match(field):
            item = self.message_fields[int(match[1])]
            return item + (field[match.end() :] if "." in item else "")  # a message may be nothing but text
        return "input" if field == "messages" else field

    def record_completion(self) -> None:
        """Store which thread continues these messages, unless they are only those after the previous response."""
        if not isinstance(self.request.finder, PreviousResponseFinder):
            super().record_completion()

    def load(self) -> "StoredResponse":
        return StoredResponse(self.context, self.require_turn(), self.links, self.record_completion)

    def build_ended_response(self) -> dict[str, Any]:
        """Return the response of a turn that has ended. Raises APIError if it has failed or was cancelled."""
        response = self.load()
        body = response.build_response()
        if body["status"] in ("failed", "cancelled"):
            list(response.answer.end(response.turn))  # it raises the turn's error
        return body

    def write_words(self) -> tuple[list[ServerSentEvent], dict[str, Any]]:
        """Return the events and the response object of an answer that is no turn; it is not stored."""
        suffix = uuid4().hex
        names = {"id": f"resp_{suffix}", "created_at": self.created_at, "store": False}
        writer = ResponseWriter(self.response_fields | names, suffix, partial(load_picture, self.context, self.owner))
        events = [*writer.begin(), *writer.add(AnswerPart("text", self.words or "")), *writer.close_item()]
        body = writer.build_response("completed", self.words_usage)
        return [*events, *writer.end(body)], body


def read_item(
    context: ServiceContext, owner: str, item: InputItem, field: str, links: LinkBuilder
) -> dict[str, Any] | None:
    """Return an input item as a message; None for an item that says nothing, such as a picture of an earlier answer."""
    if item.type == "message":
        return to_chat_message(item, field)
    if item.type.endswith("_output"):
        return {"role": "tool", "content": item.output if isinstance(item.output, str) else json.dumps(item.output)}
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
    await run_sync(response_turn.start, idempotent_request)
    if response_turn.words is not None:
        events, body = await run_sync(response_turn.write_words)
        return EventSourceResponse(iterate_events(events), ping=15) if payload.stream else JSONResponse(body)
    leave = partial(response_turn.leave, idempotent_request)
    grace_seconds, feed = context.settings.disconnect_grace_seconds, get_event_feed(request)
    stored = await run_sync(response_turn.load)
    if payload.background:
        await leave_work(leave, False, grace_seconds)
        if payload.stream:
            return EventSourceResponse(stored.stream_events(feed), ping=15)
        return JSONResponse(await run_sync(stored.build_response))
    if payload.stream:
        await leave_if_refused(partial(response_turn.wait_for_beginning, feed), leave)
        return EventSourceResponse(leave_after_stream(stored.stream_events(feed), leave, grace_seconds), ping=15)
    work = partial(feed.follow_to_end, response_turn.turn_id)
    if not await wait_for_work(request, work, leave, grace_seconds):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse(await run_sync(response_turn.build_ended_response))


async def iterate_events(events: Iterable[ServerSentEvent]) -> AsyncIterator[ServerSentEvent]:
    for event in events:
        yield event


@router.get("/{response_id}", response_class=JSONResponse)
async def get_response(
    response_id: ResourceId,
    request: Request,
    context: ContextDep,
    owner: OwnerDep,
    stream: bool = False,
    starting_after: Annotated[int, Query(ge=-1, le=2**31 - 1)] = -1,
) -> Response:
    """Return a response; with `stream`, its events after the number `starting_after`."""
    links = create_link_builder(context, owner, str(request.base_url))
    stored = await run_sync(load_response, context, owner, response_id, links)
    if stream:
        return EventSourceResponse(stored.stream_events(get_event_feed(request), starting_after), ping=15)
    return JSONResponse(await run_sync(stored.build_response))


@router.delete("/{response_id}")
def delete_response(response_id: ResourceId, request: Request, context: ContextDep, owner: OwnerDep) -> ResponseDeleted:
    """Delete a response; one that runs is cancelled. Sweeps remove all that was said and made in it within a day."""
    links = create_link_builder(context, owner, str(request.base_url))
    context.turn_runner.delete_turn(load_response(context, owner, response_id, links).turn)
    return ResponseDeleted(id=response_id)


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

"""Conversations: threads, their turns and events, forks and lineage."""

from functools import partial
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Header, Path, Query, Request, Response
from pydantic import BaseModel, Field
from sse_starlette import EventSourceResponse

from omnivideo.api.answers.links import MediaOwnerDep
from omnivideo.api.dependencies import (
    AfterCursor,
    ContextDep,
    IdempotencyDep,
    OwnerDep,
    ResourceId,
    ServiceContext,
)
from omnivideo.api.errors import ERROR_RESPONSES, APIError, build_not_found_error, error_from_turn
from omnivideo.api.event_feed import get_event_feed
from omnivideo.api.media import (
    MediaPart,
    artifact_from_part,
    build_range_response,
    content_from_bytes,
    content_from_store,
)
from omnivideo.api.request_body import Seed, ServiceRoute
from omnivideo.contracts import Artifact, RequestModel
from omnivideo.turns import Think, ThreadRecord, Turn, TurnRecord

router = APIRouter(route_class=ServiceRoute, prefix="/v1/threads", tags=["threads"], responses=ERROR_RESPONSES)
THREAD_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
ThreadId = Annotated[str, Field(pattern=THREAD_ID_PATTERN)]
THREAD_ID_DESCRIPTION = "1 to 64 letters, digits, dots, dashes or underscores, the first a letter or a digit"
ThreadPathId = Annotated[str, Path(pattern=THREAD_ID_PATTERN, description=THREAD_ID_DESCRIPTION)]
MAX_EVENT_NUMBER = 2**31 - 1  # the largest number that the database can store
TurnState = Literal["queued", "running", "done", "asks", "failed", "cancelled"]


class CreateThreadRequest(RequestModel):
    id: ThreadId | None = Field(default=None, description=THREAD_ID_DESCRIPTION)


class CreateTurnRequest(RequestModel):
    text: str = Field(min_length=1, max_length=4000)
    attachments: list[MediaPart] = Field(default=[], max_length=4)
    think: Think = "auto"
    check: int = Field(default=1, ge=1, le=16)
    seed: Seed = None
    steps: int | None = Field(default=None, ge=1, le=200)
    guidance_scale: float | None = Field(default=None, ge=0, le=30)
    stream: bool = False


class ForkThreadRequest(RequestModel):
    after_turn: int = Field(ge=0)
    id: ThreadId | None = Field(default=None, description=THREAD_ID_DESCRIPTION)


class ThreadSummary(BaseModel):
    id: str
    object: Literal["thread"] = "thread"
    created_at: int


class ThreadDetail(BaseModel):
    id: str
    object: Literal["thread"] = "thread"
    turns: list[Turn]
    question: str | None
    artifacts: list[Artifact]


class ThreadList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ThreadSummary]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


class TurnResponse(BaseModel):
    """`turn` is set once the state is "done". In the state "asks", the text of the next turn is the reply."""

    id: str
    object: Literal["thread.turn"] = "thread.turn"
    thread_id: str
    number: int
    state: TurnState
    created_at: int
    error: dict[str, Any] | None = None
    question: str | None = None
    turn: Turn | None = None


class ThreadDeleted(BaseModel):
    id: str
    object: Literal["thread.deleted"] = "thread.deleted"
    deleted: bool = True


@router.post("", status_code=201)
def create_thread(
    context: ContextDep,
    owner: OwnerDep,
    idempotent_request: IdempotencyDep,
    payload: CreateThreadRequest | None = None,
) -> ThreadSummary:
    """Create an empty thread. The same Idempotency-Key returns the same thread."""
    payload = payload or CreateThreadRequest()

    def create(thread_id: str) -> ThreadRecord:
        return context.turns.create_thread(thread_id, owner, client_id=payload.id)

    find = partial(context.turns.get_thread, owner)
    return to_thread_summary(idempotent_request.run(payload, "thread_", find, create))


def to_thread_summary(thread: ThreadRecord) -> ThreadSummary:
    return ThreadSummary(id=thread.public_id, created_at=int(thread.created_at))


@router.get("")
def list_threads(
    context: ContextDep,
    owner: OwnerDep,
    after: AfterCursor = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> ThreadList:
    """Return a page of your threads, ordered by age, beginning after the id `after`."""
    threads, has_more = context.turns.list_threads(owner, after, limit, order == "desc")
    data = [to_thread_summary(thread) for thread in threads]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return ThreadList(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


@router.get("/{name}")
def get_thread(name: ThreadPathId, context: ContextDep, owner: OwnerDep) -> ThreadDetail:
    """Return the thread's turns and artifacts, and the question that waits for a reply, if any."""
    contents = context.turn_runner.get_thread(owner, name).get_contents()
    return ThreadDetail(
        id=name, turns=list(contents.turns), question=contents.question, artifacts=list(contents.artifacts)
    )


@router.delete("/{name}")
def delete_thread(name: ThreadPathId, context: ContextDep, owner: OwnerDep) -> ThreadDeleted:
    """Delete a thread and cancel what runs in it. Sweeps remove all that was said and made in it within a day."""
    context.turn_runner.delete_thread(owner, name)
    return ThreadDeleted(id=name)


@router.post("/{name}/forks", status_code=201)
def fork_thread(
    name: ThreadPathId,
    payload: ForkThreadRequest,
    context: ContextDep,
    owner: OwnerDep,
    idempotent_request: IdempotencyDep,
) -> ThreadSummary:
    """Create a thread that begins with this thread's first `after_turn` turns."""
    thread = context.turn_runner.get_thread(owner, name)

    def create(fork_id: str) -> ThreadRecord:
        thread.ensure_state()
        if thread.find_snapshot_after(payload.after_turn) is None:
            allowed = f"allowed: 0 to {thread.get_progress().num_turns}"
            raise APIError(400, f"after_turn: this thread has no turn {payload.after_turn}; {allowed}", "after_turn")
        fork = context.turns.create_thread(fork_id, owner, thread.id, payload.after_turn, payload.id)
        context.turn_runner.get_thread(owner, fork.id)  # it writes the first checkpoint
        return fork

    find = partial(context.turns.get_thread, owner)
    return to_thread_summary(idempotent_request.run(payload, "thread_", find, create))


@router.get("/{name}/lineage")
def get_lineage(
    name: ThreadPathId,
    context: ContextDep,
    owner: OwnerDep,
    artifact: AfterCursor = None,
) -> list[Artifact]:
    """Return an artifact (by default the last one) and the artifacts it was made from, newest first."""
    return context.turn_runner.get_thread(owner, name).get_lineage(artifact)


@router.get("/{name}/artifacts/{key}", response_class=Response)
def get_artifact_content(
    name: ThreadPathId, key: ResourceId, request: Request, context: ContextDep, owner: MediaOwnerDep
) -> Response:
    """Return the bytes of an artifact or of its manifest, or a range of them."""
    thread = context.turn_runner.get_thread(owner, name)
    if not thread.has_file(key):
        raise build_not_found_error("artifact", key)
    return build_range_response(request, content_from_store(context, key))


@router.get("/{name}/artifacts/{key}/preview.webp", response_class=Response)
def get_artifact_preview(
    name: ThreadPathId, key: ResourceId, request: Request, context: ContextDep, owner: MediaOwnerDep
) -> Response:
    """Return a clip as an animated picture, for programs that show pictures only."""
    artifacts = context.turn_runner.get_thread(owner, name).get_artifacts()
    artifact = next((artifact for artifact in artifacts if artifact.key == key), None)
    if artifact is None:
        raise build_not_found_error("artifact", key)
    data, suffix = context.render_thumbnail(owner, artifact, "animation")
    return build_range_response(request, content_from_bytes(data, f"{key}-preview.{suffix}"))


# ---------------------------------------------------------------- turns


@router.post("/{name}/turns", status_code=202, response_model=TurnResponse)
def create_turn(
    name: ThreadPathId,
    payload: CreateTurnRequest,
    request: Request,
    context: ContextDep,
    owner: OwnerDep,
    idempotent_request: IdempotencyDep,
) -> Any:
    """Start a turn; with `stream`, the response is its events. The same Idempotency-Key returns the same turn."""
    thread = context.turn_runner.get_thread(owner, name)

    def create(turn_id: str) -> TurnRecord:
        context.text_limits.check_message("text", payload.text)  # before media are read
        attachments = [
            artifact_from_part(context, owner, part, f"{thread.id}/attached", f"attachments.{index}.{part.kind}")
            for index, part in enumerate(payload.attachments)
        ]
        options = payload.model_dump(exclude={"text", "attachments", "stream"})
        return context.turn_runner.start_turn(turn_id, owner, thread.id, payload.text, attachments, **options)

    turn = idempotent_request.run(payload, "turn_", partial(context.turn_runner.find_live_turn, owner), create)
    return stream_events(request, turn.id, 0) if payload.stream else to_turn_response(context, name, turn)


@router.get("/{name}/turns/{turn}")
def get_turn(name: ThreadPathId, turn: ResourceId, context: ContextDep, owner: OwnerDep) -> TurnResponse:
    """Return the state of a turn."""
    return to_turn_response(context, name, require_turn(context, owner, name, turn))


@router.post("/{name}/turns/{turn}/cancel")
def cancel_turn(
    name: ThreadPathId, turn: ResourceId, context: ContextDep, owner: OwnerDep, idempotent_request: IdempotencyDep
) -> TurnResponse:
    """Cancel a turn within one denoising step. The thread returns to its state before the turn."""

    def cancel(turn_id: str) -> TurnRecord:
        record = require_turn(context, owner, name, turn_id)
        context.turn_runner.cancel_turn(record)
        return record

    return to_turn_response(context, name, idempotent_request.repeat(turn, cancel))


@router.get(
    "/{name}/turns/{turn}/events",
    response_class=EventSourceResponse,
    responses={204: {"description": "The turn has ended, and there are no later events"}},
)
def follow_turn_events(
    name: ThreadPathId,
    turn: ResourceId,
    request: Request,
    context: ContextDep,
    owner: OwnerDep,
    last_event_id: Annotated[int, Header(ge=0, le=MAX_EVENT_NUMBER)] = 0,
) -> Response:
    """Stream the turn's events as they happen, beginning after the event `Last-Event-ID`.

    If none will follow, the answer is 204, so that a browser does not connect again.
    """
    turn_id = require_turn(context, owner, name, turn).id
    later = context.turns.read_events(turn_id, last_event_id)
    if not later.is_open and not later.events:
        return Response(status_code=204)
    return stream_events(request, turn_id, last_event_id)


def stream_events(request: Request, turn_id: str, last_number: int) -> EventSourceResponse:
    return EventSourceResponse(get_event_feed(request).stream_turn(turn_id, last_number), ping=15)


def require_turn(context: ServiceContext, owner: str, thread_id: str, turn_id: str) -> TurnRecord:
    thread, turn = context.turns.get_thread(owner, thread_id), context.turns.get_turn(turn_id, owner)
    if thread is None:
        raise build_not_found_error("thread", thread_id)
    if turn is None or turn.thread_id != thread.id:
        raise build_not_found_error("turn", turn_id)
    return turn


def to_turn_response(context: ServiceContext, thread_id: str, turn: TurnRecord) -> TurnResponse:
    response = TurnResponse(
        id=turn.id,
        thread_id=thread_id,
        number=turn.number,
        state=cast(TurnState, turn.state),
        created_at=int(turn.created_at),
        error=None if turn.error is None else error_from_turn(turn).to_body()["error"],
    )
    if turn.state == "done":
        response.turn = context.turn_runner.get_thread(turn.owner, turn.thread_id).get_turn(turn.number)
    if turn.state == "asks":
        response.question = context.turn_runner.get_thread(turn.owner, turn.thread_id).get_open_question()
    return response

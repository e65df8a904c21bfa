"""Conversations: threads, their turns and events, forks and lineage."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, Field
from sse_starlette import EventSourceResponse

from omnivideo.api.dependencies import ContextDep, OwnerDep
from omnivideo.api.errors import ERROR_RESPONSES, APIError, build_not_found_error
from omnivideo.api.event_feed import EventFeed
from omnivideo.api.media import MediaPart, artifact_from_part, build_range_response
from omnivideo.api.request_body import IdempotencyKey, make_id
from omnivideo.api.turn_runner import TurnRunner
from omnivideo.contracts import MAX_SEED, Artifact, Think, Turn

router = APIRouter(prefix="/v1/threads", tags=["threads"], responses=ERROR_RESPONSES)
ThreadId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class CreateThreadRequest(BaseModel):
    id: ThreadId | None = None


class CreateTurnRequest(BaseModel):
    text: str = Field(min_length=1, max_length=4000)
    attachments: list[MediaPart] = Field(default=[], max_length=4)
    think: Think = "auto"
    check: int = Field(default=1, ge=1, le=16)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    steps: int | None = Field(default=None, ge=1, le=200)
    guidance_scale: float | None = Field(default=None, ge=0, le=30)
    stream: bool = False


class ForkThreadRequest(BaseModel):
    after_turn: int = Field(ge=0)
    id: ThreadId | None = None


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


class TurnResponse(BaseModel):
    """`turn` is there once the state is done; `asks` means that the next turn's text is the reply."""

    id: str
    object: Literal["thread.turn"] = "thread.turn"
    thread_id: str
    number: int
    state: Literal["queued", "running", "done", "asks", "failed", "cancelled"]
    created_at: int
    error: dict[str, Any] | None = None
    question: str | None = None
    turn: Turn | None = None


class ThreadDeleted(BaseModel):
    id: str
    object: Literal["thread.deleted"] = "thread.deleted"
    deleted: bool = True


def get_event_feed(request: Request) -> EventFeed:
    feed: EventFeed = request.app.state.event_feed
    return feed


@router.post("", status_code=201)
def create_thread(
    context: ContextDep,
    owner: OwnerDep,
    payload: CreateThreadRequest | None = None,
    idempotency_key: IdempotencyKey = None,
) -> ThreadSummary:
    """A new, empty thread; the same Idempotency-Key is the same thread."""
    thread_id = (payload and payload.id) or make_id("thread", owner, idempotency_key)
    if not (idempotency_key and context.turns.has_thread(thread_id, owner)):
        context.turns.create_thread(thread_id, owner)
    context.conversations.open_thread(thread_id, create=True, owner=owner)
    return load_thread_summary(context, owner, thread_id)


def load_thread_summary(context: Any, owner: str, thread_id: str) -> ThreadSummary:
    row = next(row for row in context.turns.list_threads(owner, 10**6) if row["id"] == thread_id)
    return ThreadSummary(id=thread_id, created_at=int(row["created_at"]))


@router.get("")
def list_threads(context: ContextDep, owner: OwnerDep, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> ThreadList:
    """Your threads, the newest first."""
    rows = context.turns.list_threads(owner, limit)
    return ThreadList(data=[ThreadSummary(id=row["id"], created_at=int(row["created_at"])) for row in rows])


@router.get("/{name}")
def get_thread(name: str, context: ContextDep, owner: OwnerDep) -> ThreadDetail:
    """All that was said and made."""
    thread = context.turn_runner.get_thread(owner, name)
    return ThreadDetail(
        id=name, turns=thread.get_turns(), question=thread.get_open_question(), artifacts=thread.get_artifacts()
    )


@router.delete("/{name}")
def delete_thread(name: str, context: ContextDep, owner: OwnerDep) -> ThreadDeleted:
    """Forgets the thread; its artifacts go with the next sweep, unless something else refers to them."""
    context.turn_runner.get_thread(owner, name)
    context.turns.delete_thread(name)
    return ThreadDeleted(id=name)


@router.post("/{name}/forks", status_code=201)
def fork_thread(
    name: str,
    payload: ForkThreadRequest,
    context: ContextDep,
    owner: OwnerDep,
    idempotency_key: IdempotencyKey = None,
) -> ThreadSummary:
    """A new thread that begins with this one's first `after_turn` turns."""
    thread, branch = (
        context.turn_runner.get_thread(owner, name),
        payload.id or make_id("thread", owner, idempotency_key),
    )
    if idempotency_key and context.turns.has_thread(branch, owner):
        return load_thread_summary(context, owner, branch)
    snapshot = thread.find_snapshot_after(payload.after_turn)
    if snapshot is None:
        raise APIError(
            400,
            f"after_turn: {payload.after_turn} is not a turn of this thread: 0 to {len(thread.get_turns())}",
            "after_turn",
        )
    context.turns.create_thread(branch, owner)
    thread.fork(payload.after_turn, branch)
    return load_thread_summary(context, owner, branch)


@router.get("/{name}/lineage")
def get_lineage(name: str, context: ContextDep, owner: OwnerDep, artifact: str | None = None) -> list[Artifact]:
    """An artifact (the last one) and what it was made from, newest first."""
    return context.turn_runner.get_thread(owner, name).get_lineage(artifact)


@router.get("/{name}/artifacts/{key}", response_class=Response)
def get_artifact_content(name: str, key: str, request: Request, context: ContextDep, owner: OwnerDep) -> Response:
    """An artifact's bytes, or those of its manifest."""
    thread = context.turn_runner.get_thread(owner, name)
    if not any(key in (stored.key, stored.manifest) for stored in thread.get_artifacts()):
        raise build_not_found_error("artifact", key)
    return build_range_response(request, context.store.get(key), key)


# ---------------------------------------------------------------- turns


@router.post("/{name}/turns", status_code=202, response_model=TurnResponse)
def create_turn(
    name: str,
    payload: CreateTurnRequest,
    request: Request,
    context: ContextDep,
    owner: OwnerDep,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Begins a turn; with `stream`, its events follow at once.  The same Idempotency-Key is the same turn."""
    runner, turn_id = context.turn_runner, make_id("turn", owner, idempotency_key)
    runner.get_thread(owner, name)
    if idempotency_key and (row := context.turns.get_turn(turn_id, owner)) is not None:
        return stream_events(request, row.id, 0) if payload.stream else to_turn_response(runner, row)
    attachments = [artifact_from_part(context, owner, part, f"{name}/attached") for part in payload.attachments]
    options = payload.model_dump(exclude={"text", "attachments", "stream"})
    row = runner.start_turn(turn_id, owner, name, payload.text, attachments, **options)
    return stream_events(request, row.id, 0) if payload.stream else to_turn_response(runner, row)


@router.get("/{name}/turns/{turn}")
def get_turn(name: str, turn: str, context: ContextDep, owner: OwnerDep) -> TurnResponse:
    """How far a turn is."""
    return to_turn_response(context.turn_runner, require_turn(context, owner, name, turn))


@router.post("/{name}/turns/{turn}/cancel")
def cancel_turn(name: str, turn: str, context: ContextDep, owner: OwnerDep) -> TurnResponse:
    """Stops it within a denoising step; the thread is then as it was before the turn."""
    row, runner = require_turn(context, owner, name, turn), context.turn_runner
    runner.cancel_turn(row)
    return to_turn_response(runner, row)


@router.get("/{name}/turns/{turn}/events", response_class=EventSourceResponse)
def follow_turn_events(
    name: str, turn: str, request: Request, context: ContextDep, owner: OwnerDep,
    last_event_id: Annotated[int, Header(ge=0)] = 0,
) -> EventSourceResponse:  # fmt: skip
    """The turn's events as they come, from the one after `Last-Event-ID` on."""
    return stream_events(request, require_turn(context, owner, name, turn).id, last_event_id)


def stream_events(request: Request, turn_id: str, last_number: int) -> EventSourceResponse:
    return EventSourceResponse(get_event_feed(request).stream_turn(turn_id, last_number), ping=15)


def require_turn(context: Any, owner: str, thread_id: str, turn_id: str) -> Any:
    row = context.turns.get_turn(turn_id, owner)
    if row is None or row.thread_id != thread_id:
        raise build_not_found_error("turn", turn_id)
    return row


def to_turn_response(runner: TurnRunner, row: Any) -> TurnResponse:
    response = TurnResponse(
        id=row.id,
        thread_id=row.thread_id,
        number=row.number,
        state=row.state,
        created_at=int(row.created_at),
        error=row.error,
    )
    if row.state == "done":
        response.turn = runner.get_thread(row.owner, row.thread_id).get_turns()[row.number - 1]
    if row.state == "asks":
        response.question = runner.get_thread(row.owner, row.thread_id).get_open_question()
    return response

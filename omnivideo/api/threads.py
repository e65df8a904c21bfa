"""Conversations: threads, their turns and events, forks and lineage."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, Field
from sse_starlette import EventSourceResponse

from omnivideo.api.errors import REFUSALS, WireError, not_found
from omnivideo.api.events import Feed, sse
from omnivideo.api.forms import Key, name_for
from omnivideo.api.media import Part, artifact_of, ranged
from omnivideo.api.rooms import Owner, Room
from omnivideo.api.running import Runner
from omnivideo.contracts import MOST_SEED, Artifact, Think, Turn

router = APIRouter(prefix="/v1/threads", tags=["threads"], responses=REFUSALS)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class NewThread(BaseModel):
    id: Name | None = None


class NewTurn(BaseModel):
    text: str = Field(min_length=1, max_length=4000)
    attachments: list[Part] = Field(default=[], max_length=4)
    think: Think = "auto"
    check: int = Field(default=1, ge=1, le=16)
    seed: int | None = Field(default=None, ge=0, le=MOST_SEED)
    steps: int | None = Field(default=None, ge=1, le=200)
    guidance_scale: float | None = Field(default=None, ge=0, le=30)
    stream: bool = False


class NewFork(BaseModel):
    turn: int = Field(ge=0)
    id: Name | None = None


class ThreadShown(BaseModel):
    id: str
    object: Literal["thread"] = "thread"
    created_at: int


class ThreadWhole(BaseModel):
    id: str
    object: Literal["thread"] = "thread"
    turns: list[Turn]
    question: str | None
    artifacts: list[Artifact]


class ThreadList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ThreadShown]


class TurnShown(BaseModel):
    """`turn` is there once the state is done; `asks` means that the next turn's text is the reply."""

    id: str
    object: Literal["thread.turn"] = "thread.turn"
    thread: str
    number: int
    state: Literal["queued", "running", "done", "asks", "failed", "cancelled"]
    created_at: int
    error: dict[str, Any] | None = None
    question: str | None = None
    turn: Turn | None = None


class Gone(BaseModel):
    id: str
    object: Literal["thread.deleted"] = "thread.deleted"
    deleted: bool = True


def runner_of(request: Request) -> Runner:
    runner: Runner = request.app.state.runner
    return runner


def feed_of(request: Request) -> Feed:
    feed: Feed = request.app.state.feed
    return feed


@router.post("", status_code=201)
def create(rooms: Room, owner: Owner, wanted: NewThread | None = None, key: Key = None) -> ThreadShown:
    """A new, empty thread; the same Idempotency-Key is the same thread."""
    name = (wanted and wanted.id) or name_for("thread", owner, key)
    if not (key and rooms.turns.has_thread(name, owner)):
        rooms.turns.add_thread(name, owner)
    rooms.conversations.thread(name, create=True, owner=owner)
    return shown(rooms, owner, name)


def shown(rooms: Any, owner: str, name: str) -> ThreadShown:
    row = next(row for row in rooms.turns.threads_of(owner, 10**6) if row["id"] == name)
    return ThreadShown(id=name, created_at=int(row["made"]))


@router.get("")
def listing(rooms: Room, owner: Owner, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> ThreadList:
    """Your threads, the newest first."""
    rows = rooms.turns.threads_of(owner, limit)
    return ThreadList(data=[ThreadShown(id=row["id"], created_at=int(row["made"])) for row in rows])


@router.get("/{name}")
def get(name: str, request: Request, owner: Owner) -> ThreadWhole:
    """All that was said and made."""
    thread = runner_of(request).thread(owner, name)
    return ThreadWhole(id=name, turns=thread.history(), question=thread.question(), artifacts=thread.artifacts())


@router.delete("/{name}")
def delete(name: str, request: Request, rooms: Room, owner: Owner) -> Gone:
    """Forgets the thread; its artifacts go with the next sweep, unless something else refers to them."""
    runner_of(request).thread(owner, name)
    rooms.turns.drop_thread(name)
    return Gone(id=name)


@router.post("/{name}/forks", status_code=201)
def fork(name: str, wanted: NewFork, request: Request, rooms: Room, owner: Owner, key: Key = None) -> ThreadShown:
    """A new thread that begins with this one's first `turn` turns."""
    thread, branch = runner_of(request).thread(owner, name), wanted.id or name_for("thread", owner, key)
    if key and rooms.turns.has_thread(branch, owner):
        return shown(rooms, owner, branch)
    past = thread.after(wanted.turn)
    if past is None:
        raise WireError(400, f"turn: {wanted.turn} is not a turn of this thread: 0 to {len(thread.history())}", "turn")
    rooms.turns.add_thread(branch, owner)
    thread.fork(wanted.turn, branch)
    return shown(rooms, owner, branch)


@router.get("/{name}/lineage")
def lineage(name: str, request: Request, owner: Owner, artifact: str | None = None) -> list[Artifact]:
    """An artifact (the last one) and what it was made from, newest first."""
    return runner_of(request).thread(owner, name).lineage(artifact)


@router.get("/{name}/artifacts/{key}", response_class=Response)
def content(name: str, key: str, request: Request, rooms: Room, owner: Owner) -> Response:
    """An artifact's bytes, or those of its manifest."""
    thread = runner_of(request).thread(owner, name)
    if not any(key in (one.key, one.manifest) for one in thread.artifacts()):
        raise not_found("artifact", key)
    return ranged(request, rooms.store.get(key), key)


# ---------------------------------------------------------------- turns


@router.post("/{name}/turns", status_code=202, response_model=TurnShown)
def send(name: str, wanted: NewTurn, request: Request, rooms: Room, owner: Owner, key: Key = None) -> Any:
    """Begins a turn; with `stream`, its events follow at once.  The same Idempotency-Key is the same turn."""
    runner, turn = runner_of(request), name_for("turn", owner, key)
    runner.thread(owner, name)
    if key and (row := rooms.turns.get(turn, owner)) is not None:
        return stream(request, row.id, 0) if wanted.stream else turn_shown(runner, row)
    attachments = [artifact_of(rooms, owner, part, f"{name}/attached") for part in wanted.attachments]
    options = wanted.model_dump(exclude={"text", "attachments", "stream"})
    row = runner.begin(turn, owner, name, wanted.text, attachments, **options)
    return stream(request, row.id, 0) if wanted.stream else turn_shown(runner, row)


@router.get("/{name}/turns/{turn}")
def turn(name: str, turn: str, request: Request, rooms: Room, owner: Owner) -> TurnShown:
    """How far a turn is."""
    return turn_shown(runner_of(request), row_of(rooms, owner, name, turn))


@router.post("/{name}/turns/{turn}/cancel")
def cancel(name: str, turn: str, request: Request, rooms: Room, owner: Owner) -> TurnShown:
    """Stops it within a denoising step; the thread is then as it was before the turn."""
    row, runner = row_of(rooms, owner, name, turn), runner_of(request)
    runner.cancel(row)
    return turn_shown(runner, row)


@router.get("/{name}/turns/{turn}/events", response_class=EventSourceResponse)
def events(
    name: str, turn: str, request: Request, rooms: Room, owner: Owner,
    last_event_id: Annotated[int, Header(ge=0)] = 0,
) -> EventSourceResponse:  # fmt: skip
    """The turn's events as they come, from the one after `Last-Event-ID` on."""
    return stream(request, row_of(rooms, owner, name, turn).id, last_event_id)


def stream(request: Request, turn: str, after: int) -> EventSourceResponse:
    async def told() -> AsyncIterator[dict[str, str]]:
        async for number, body in feed_of(request).follow(turn, after):
            yield sse(number, body)

    return EventSourceResponse(told(), ping=15)


def row_of(rooms: Any, owner: str, name: str, turn: str) -> Any:
    row = rooms.turns.get(turn, owner)
    if row is None or row.thread != name:
        raise not_found("turn", turn)
    return row


def turn_shown(runner: Runner, row: Any) -> TurnShown:
    made = TurnShown(
        id=row.id, thread=row.thread, number=row.number, state=row.state, created_at=int(row.made), error=row.error
    )
    if row.state == "done":
        made.turn = runner.thread(row.owner, row.thread).history()[row.number - 1]
    if row.state == "asks":
        made.question = runner.thread(row.owner, row.thread).question()
    return made

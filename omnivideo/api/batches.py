"""Batches: a file of requests, worked off beside everything else.  backends/batches.py does the work."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from omnivideo.api.drawing import Order, image_names, image_orders, trouble, video_order
from omnivideo.api.errors import OURS, REFUSALS, WireError, body, not_found, of
from omnivideo.api.forms import After, Fields, Id, Key, Text, documented, name_for, parsed, reused, validated
from omnivideo.api.images import answer
from omnivideo.api.rooms import Owner, Room, Rooms
from omnivideo.api.videos import shown as video_shown
from omnivideo.contracts import JobStatus
from omnivideo.errors import InvalidInput, OmniVideoError

router = APIRouter(prefix="/v1/batches", tags=["batches"], responses=REFUSALS)
Endpoint = Literal["/v1/videos", "/v1/images/generations", "/v1/chat/completions"]
MOST = 100  # open ones of one owner
MOST_BYTES = 200 * 10**6  # of an input file
MOST_LINE = 10 * 2**20  # bytes
WINDOW = 86_400  # seconds after which a batch expires
TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
Label = Annotated[Text, Field(max_length=64)]


class NewBatch(BaseModel):
    input_file_id: Text = Field(max_length=64)
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: dict[Label, Annotated[Text, Field(max_length=512)]] | None = Field(default=None, max_length=16)


class Counts(BaseModel):
    total: int
    completed: int
    failed: int


class LineTrouble(BaseModel):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Troubles(BaseModel):
    object: Literal["list"] = "list"
    data: list[LineTrouble]


class Batch(BaseModel):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: Troubles | None = None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts
    metadata: dict[str, str] | None = None


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


def shown(row: Any) -> Batch:
    made = Batch(
        id=row.id, endpoint=row.endpoint, input_file_id=row.input, status=row.state, output_file_id=row.output,
        error_file_id=row.errors, created_at=int(row.made), expires_at=int(row.made) + WINDOW,
        request_counts=Counts(**row.counts), metadata=row.meta or None,
    )  # fmt: skip
    for state in TIMES:
        setattr(made, f"{state}_at", row.times.get(f"{state}_at"))
    if row.trouble:
        made.errors = Troubles(data=[LineTrouble(**one) for one in row.trouble])
    return made


def found(rooms: Rooms, batch_id: str, owner: str) -> Any:
    row = rooms.records.batch(batch_id, owner)
    if row is None:
        raise not_found("batch", batch_id)
    return row


@router.post("", response_model_exclude_none=True, openapi_extra=documented(NewBatch))
def create(rooms: Room, owner: Owner, fields: Fields, key: Key = None) -> Batch:
    """Takes on a file of requests, one to a line: {custom_id, method, url, body}; its lines are looked at next."""
    asked = validated(NewBatch, fields)
    file = rooms.records.file(asked.input_file_id, owner)
    if file is None:
        raise InvalidInput("input_file_id", f"there is no file {asked.input_file_id!r}")
    if file.purpose != "batch":
        raise InvalidInput("input_file_id", f"its purpose is {file.purpose}; allowed: batch")
    if file.bytes > MOST_BYTES:
        raise InvalidInput("input_file_id", f"it has {file.bytes} bytes; allowed: 1 to {MOST_BYTES}")
    row = rooms.records.add_batch(
        owner, MOST, id=name_for("batch", owner, key), endpoint=asked.endpoint, input=asked.input_file_id,
        meta=asked.metadata or {}, times={},
    )  # fmt: skip
    if (row.endpoint, row.input, row.meta) != (asked.endpoint, asked.input_file_id, asked.metadata or {}):
        raise reused()
    return shown(row)


@router.get("", response_model_exclude_none=True)
def listing(
    rooms: Room, owner: Owner, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> BatchList:  # fmt: skip
    """Your batches, the newest first."""
    rows, more = rooms.records.batches(owner, after, limit)
    data = [shown(row) for row in rows]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return BatchList(data=data, first_id=first, last_id=last, has_more=more)


@router.get("/{batch_id}", response_model_exclude_none=True)
def get(batch_id: Id, rooms: Room, owner: Owner) -> Batch:
    return shown(found(rooms, batch_id, owner))


@router.post("/{batch_id}/cancel", response_model_exclude_none=True)
def cancel(batch_id: Id, rooms: Room, owner: Owner) -> Batch:
    """Stops what is not done; what is done comes in the output file all the same."""
    row = found(rooms, batch_id, owner)
    while row.state in ("validating", "in_progress"):  # its runner may move it at the same time
        rooms.records.move(row, "cancelling")
        row = found(rooms, batch_id, owner)
    return shown(row)


# ---------------------------------------------------------------- lines, for whoever works them off


class Line(BaseModel):
    """One request.  `custom_id` is the user's name for it, and no other line's."""

    custom_id: Text = Field(min_length=1, max_length=512)
    method: Literal["POST"]
    url: Endpoint
    body: dict[str, Any]


class Lines:
    """What the wire says of a batch's lines (the port `Wire` of backends/lines.py)."""

    def __init__(self, rooms: Rooms):
        self.rooms = rooms

    def read(self, data: bytes, endpoint: str) -> tuple[str, str, dict[str, Any]]:
        """A line's custom_id, url and body; raises InvalidInput."""
        if len(data) > MOST_LINE:
            raise InvalidInput("line", f"it has {len(data)} bytes; allowed: 1 to {MOST_LINE}")
        line = validated(Line, parsed(data, "line"))
        if line.url != endpoint:
            raise InvalidInput("url", f"it is {line.url}, and the batch's endpoint {endpoint}")
        return line.custom_id, line.url, line.body

    def names(self, url: str, fields: Mapping[str, Any], name: str) -> list[str]:
        """The ids of a line's jobs."""
        if url == "/v1/videos":
            return [f"video_{name}"]
        n = fields.get("n", 1)
        return image_names(f"image_{name}", n if isinstance(n, int) and 1 <= n <= 8 else 1)

    def orders(self, owner: str, url: str, fields: Mapping[str, Any], name: str) -> list[Order]:
        """A line's jobs.  Raises an OmniVideoError."""
        if url == "/v1/videos":
            return [video_order(self.rooms, owner, fields, f"video_{name}")]
        if fields.get("response_format") == "b64_json":
            raise InvalidInput("response_format", "a batch gives images as URLs; allowed: url")
        return image_orders(self.rooms, owner, fields, f"image_{name}")

    def answer(self, url: str, statuses: list[JobStatus]) -> dict[str, Any]:
        """What a line's jobs, all done, come to."""
        made: BaseModel
        if url == "/v1/videos":
            made = video_shown(self.rooms, statuses[0])
        else:
            made = answer(self.rooms, statuses, inline=False, base="")
        return made.model_dump(exclude_none=True)

    def trouble(self, statuses: Collection[JobStatus]) -> Exception:
        """Why a line's jobs did not all come to something."""
        return trouble(next(status for status in statuses if status.state != "done"))

    def refusal(self, error: Exception) -> tuple[int, dict[str, Any]]:
        """An error as its status and body."""
        if isinstance(error, OmniVideoError):
            error = of(error)
        if not isinstance(error, WireError):
            error = WireError(500, OURS, None, "internal")
        return error.status, body(error.status, error.message, error.param, error.code)

"""Batches: a file of requests, worked off beside everything else.  backends/batches.py does the work."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from omnivideo.api.dependencies import ContextDep, OwnerDep, ServiceContext
from omnivideo.api.errors import (
    ERROR_RESPONSES,
    INTERNAL_ERROR,
    APIError,
    build_error_body,
    build_not_found_error,
    to_api_error,
)
from omnivideo.api.generation import JobRequest, build_image_jobs, build_video_job, error_from_status, make_image_ids
from omnivideo.api.request_body import (
    AfterCursor,
    BodyFields,
    CleanText,
    IdempotencyKey,
    ResourceId,
    build_key_reused_error,
    document_request_body,
    make_id,
    parse_json_object,
    validate_fields,
)
from omnivideo.api.routes.images import build_images_response
from omnivideo.api.routes.videos import to_video_object
from omnivideo.contracts import JobStatus
from omnivideo.errors import InvalidInput, OmniVideoError

router = APIRouter(prefix="/v1/batches", tags=["batches"], responses=ERROR_RESPONSES)
BatchEndpoint = Literal["/v1/videos", "/v1/images/generations", "/v1/chat/completions"]
MAX_OPEN_BATCHES = 100  # open ones of one owner
MAX_INPUT_BYTES = 200 * 10**6  # of an input file
MAX_LINE_BYTES = 10 * 2**20  # bytes
COMPLETION_WINDOW_SECONDS = 86_400  # seconds after which a batch expires
TIMESTAMPED_STATES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
MetadataLabel = Annotated[CleanText, Field(max_length=64)]


class CreateBatchRequest(BaseModel):
    input_file_id: CleanText = Field(max_length=64)
    endpoint: BatchEndpoint
    completion_window: Literal["24h"]
    metadata: dict[MetadataLabel, Annotated[CleanText, Field(max_length=512)]] | None = Field(
        default=None, max_length=16
    )


class BatchRequestCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchLineError(BaseModel):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrorList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchLineError]


class BatchObject(BaseModel):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrorList | None = None
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
    request_counts: BatchRequestCounts
    metadata: dict[str, str] | None = None


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


def to_batch_object(row: Any) -> BatchObject:
    batch = BatchObject(
        id=row.id,
        endpoint=row.endpoint,
        input_file_id=row.input_file_id,
        status=row.state,
        output_file_id=row.output_file_id,
        error_file_id=row.error_file_id,
        created_at=int(row.created_at),
        expires_at=int(row.created_at) + COMPLETION_WINDOW_SECONDS,
        request_counts=BatchRequestCounts(**row.counts),
        metadata=row.metadata or None,
    )
    for state in TIMESTAMPED_STATES:
        setattr(batch, f"{state}_at", row.state_times.get(f"{state}_at"))
    if row.validation_errors:
        batch.errors = BatchErrorList(data=[BatchLineError(**problem) for problem in row.validation_errors])
    return batch


def require_batch(context: ServiceContext, batch_id: str, owner: str) -> Any:
    row = context.batches.get_batch(batch_id, owner)
    if row is None:
        raise build_not_found_error("batch", batch_id)
    return row


@router.post("", response_model_exclude_none=True, openapi_extra=document_request_body(CreateBatchRequest))
def create_batch(
    context: ContextDep, owner: OwnerDep, fields: BodyFields, idempotency_key: IdempotencyKey = None
) -> BatchObject:
    """Takes on a file of requests, one to a line: {custom_id, method, url, body}; its lines are looked at next."""
    payload = validate_fields(CreateBatchRequest, fields)
    file = context.files.get_file(payload.input_file_id, owner)
    if file is None:
        raise InvalidInput("input_file_id", f"there is no file {payload.input_file_id!r}")
    if file.purpose != "batch":
        raise InvalidInput("input_file_id", f"its purpose is {file.purpose}; allowed: batch")
    if file.size_bytes > MAX_INPUT_BYTES:
        raise InvalidInput("input_file_id", f"it has {file.size_bytes} bytes; allowed: 1 to {MAX_INPUT_BYTES}")
    row = context.batches.create_batch(
        owner,
        MAX_OPEN_BATCHES,
        batch_id=make_id("batch", owner, idempotency_key),
        endpoint=payload.endpoint,
        input_file_id=payload.input_file_id,
        metadata=payload.metadata or {},
    )
    if (row.endpoint, row.input_file_id, row.metadata) != (
        payload.endpoint,
        payload.input_file_id,
        payload.metadata or {},
    ):
        raise build_key_reused_error()
    return to_batch_object(row)


@router.get("", response_model_exclude_none=True)
def list_batches(
    context: ContextDep, owner: OwnerDep, after: AfterCursor = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> BatchList:  # fmt: skip
    """Your batches, the newest first."""
    rows, has_more = context.batches.list_batches(owner, after, limit)
    data = [to_batch_object(row) for row in rows]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return BatchList(data=data, first_id=first, last_id=last, has_more=has_more)


@router.get("/{batch_id}", response_model_exclude_none=True)
def get_batch(batch_id: ResourceId, context: ContextDep, owner: OwnerDep) -> BatchObject:
    return to_batch_object(require_batch(context, batch_id, owner))


@router.post("/{batch_id}/cancel", response_model_exclude_none=True)
def cancel_batch(batch_id: ResourceId, context: ContextDep, owner: OwnerDep) -> BatchObject:
    """Stops what is not done; what is done comes in the output file all the same."""
    row = require_batch(context, batch_id, owner)
    while row.state in ("validating", "in_progress"):  # its runner may move it at the same time
        context.batches.transition_batch(row, "cancelling")
        row = require_batch(context, batch_id, owner)
    return to_batch_object(row)


# ---------------------------------------------------------------- lines, for whoever works them off


class BatchLineRequest(BaseModel):
    """One request.  `custom_id` is the user's name for it, and no other line's."""

    custom_id: CleanText = Field(min_length=1, max_length=512)
    method: Literal["POST"]
    url: BatchEndpoint
    body: dict[str, Any]


class BatchLineHandler:
    """What the wire says of a batch's lines (the port `Wire` of backends/lines.py)."""

    def __init__(self, context: ServiceContext):
        self.context = context

    def parse_line(self, data: bytes, endpoint: str) -> tuple[str, str, dict[str, Any]]:
        """A line's custom_id, url and body; raises InvalidInput."""
        if len(data) > MAX_LINE_BYTES:
            raise InvalidInput("line", f"it has {len(data)} bytes; allowed: 1 to {MAX_LINE_BYTES}")
        line = validate_fields(BatchLineRequest, parse_json_object(data, "line"))
        if line.url != endpoint:
            raise InvalidInput("url", f"it is {line.url}, and the batch's endpoint {endpoint}")
        return line.custom_id, line.url, line.body

    def list_job_ids(self, url: str, fields: Mapping[str, Any], name: str) -> list[str]:
        """The ids of a line's jobs."""
        if url == "/v1/videos":
            return [f"video_{name}"]
        n = fields.get("n", 1)
        return make_image_ids(f"image_{name}", n if isinstance(n, int) and 1 <= n <= 8 else 1)

    def build_job_requests(self, owner: str, url: str, fields: Mapping[str, Any], name: str) -> list[JobRequest]:
        """A line's jobs.  Raises an OmniVideoError."""
        if url == "/v1/videos":
            return [build_video_job(self.context, owner, fields, f"video_{name}")]
        if fields.get("response_format") == "b64_json":
            raise InvalidInput("response_format", "a batch gives images as URLs; allowed: url")
        return build_image_jobs(self.context, owner, fields, f"image_{name}")

    def build_response_body(self, url: str, statuses: list[JobStatus]) -> dict[str, Any]:
        """What a line's jobs, all done, come to."""
        response: BaseModel
        if url == "/v1/videos":
            response = to_video_object(self.context, statuses[0])
        else:
            response = build_images_response(self.context, statuses, inline=False, base_url="")
        return response.model_dump(exclude_none=True)

    def error_from_statuses(self, statuses: Collection[JobStatus]) -> Exception:
        """Why a line's jobs did not all come to something."""
        return error_from_status(next(status for status in statuses if status.state != "done"))

    def to_error_response(self, error: Exception) -> tuple[int, dict[str, Any]]:
        """An error as its status and body."""
        if isinstance(error, OmniVideoError):
            error = to_api_error(error)
        if not isinstance(error, APIError):
            error = APIError(500, INTERNAL_ERROR, None, "internal")
        return error.status_code, build_error_body(error.status_code, error.message, error.param, error.code)

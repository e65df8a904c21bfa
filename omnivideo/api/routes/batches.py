"""Batches: files of requests that are processed at low priority. backends/batches/ runs them."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from omnivideo.api.answers.links import create_link_builder
from omnivideo.api.dependencies import (
    AfterCursor,
    ContextDep,
    IdempotencyDep,
    OwnerDep,
    ResourceId,
    ServiceContext,
)
from omnivideo.api.errors import ERROR_RESPONSES, build_not_found_error, error_from_job, to_api_error
from omnivideo.api.generation import JobRequest, build_image_jobs, build_video_jobs, make_image_ids, make_video_ids
from omnivideo.api.generation_requests import ImageGenerationRequest, VideoRequest
from omnivideo.api.request_body import (
    BodyFields,
    CleanText,
    ServiceRoute,
    Unsupported,
    document_request_body,
    parse_json_object,
    validate_fields,
)
from omnivideo.api.routes.images import ImageObject, build_image_path, build_images_response
from omnivideo.api.routes.videos import to_video_object
from omnivideo.contracts import JobStatus, RequestModel
from omnivideo.errors import InvalidInput
from omnivideo.records import BatchRecord

router = APIRouter(route_class=ServiceRoute, prefix="/v1/batches", tags=["batches"], responses=ERROR_RESPONSES)
BatchEndpoint = Literal["/v1/videos", "/v1/images/generations", "/v1/chat/completions"]
MAX_OPEN_BATCHES = 100  # per owner
MAX_INPUT_BYTES = 200 * 10**6
MAX_LINE_BYTES = 10 * 2**20
COMPLETION_WINDOW_SECONDS = 86_400  # seconds after which a batch expires
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
TIMESTAMPED_STATES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
MetadataLabel = Annotated[CleanText, Field(max_length=64)]


class CreateBatchRequest(RequestModel):
    input_file_id: CleanText = Field(max_length=64)
    endpoint: BatchEndpoint
    completion_window: Literal["24h"]
    metadata: dict[MetadataLabel, Annotated[CleanText, Field(max_length=512)]] | None = Field(
        default=None, max_length=16
    )
    output_expires_after: Unsupported = None


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
    status: BatchStatus
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


class BatchDeleted(BaseModel):
    id: str
    object: Literal["batch.deleted"] = "batch.deleted"
    deleted: bool = True


def to_batch_object(batch: BatchRecord) -> BatchObject:
    fields: dict[str, Any] = {f"{state}_at": batch.state_times.get(f"{state}_at") for state in TIMESTAMPED_STATES}
    if batch.validation_errors:
        fields["errors"] = BatchErrorList(data=[BatchLineError(**error) for error in batch.validation_errors])
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        input_file_id=batch.input_file_id,
        status=cast(BatchStatus, batch.state),
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=int(batch.created_at),
        expires_at=int(batch.created_at) + COMPLETION_WINDOW_SECONDS,
        request_counts=BatchRequestCounts(**batch.counts),
        metadata=batch.metadata or None,
        **fields,
    )


def require_batch(context: ServiceContext, batch_id: str, owner: str) -> BatchRecord:
    batch = context.batches.get_batch(batch_id, owner)
    if batch is None:
        raise build_not_found_error("batch", batch_id)
    return batch


@router.post("", response_model_exclude_none=True, openapi_extra=document_request_body(CreateBatchRequest))
def create_batch(
    context: ContextDep, owner: OwnerDep, fields: BodyFields, idempotent_request: IdempotencyDep
) -> BatchObject:
    """Create a batch from a file with one request per line: {custom_id, method, url, body}.

    The lines are validated afterwards; a batch with invalid lines fails.
    """
    payload = validate_fields(CreateBatchRequest, fields)
    batch = idempotent_request.run(
        payload,
        "batch_",
        find=lambda batch_id: find_live_batch(context, owner, batch_id),
        create=lambda batch_id: store_batch(context, owner, payload, batch_id),
    )
    return to_batch_object(batch)


def find_live_batch(context: ServiceContext, owner: str, batch_id: str) -> BatchRecord | None:
    """Return the owner's batch, or None if it does not exist or was cancelled."""
    batch = context.batches.get_batch(batch_id, owner)
    return None if batch is None or batch.state in ("cancelling", "cancelled") else batch


def store_batch(context: ServiceContext, owner: str, payload: CreateBatchRequest, batch_id: str) -> BatchRecord:
    """Create a batch; raise InvalidInput if its file does not exist or is not a batch file."""
    file = context.files.get_file(payload.input_file_id, owner)
    if file is None:
        raise InvalidInput("input_file_id", f"there is no file {payload.input_file_id!r}")
    if file.purpose != "batch":
        raise InvalidInput("input_file_id", f"its purpose is {file.purpose}; allowed: batch")
    if file.size_bytes > MAX_INPUT_BYTES:
        raise InvalidInput("input_file_id", f"it has {file.size_bytes} bytes; allowed: 1 to {MAX_INPUT_BYTES}")
    return context.batches.create_batch(
        owner,
        MAX_OPEN_BATCHES,
        batch_id=batch_id,
        endpoint=payload.endpoint,
        input_file_id=payload.input_file_id,
        metadata=payload.metadata or {},
    )


@router.get("", response_model_exclude_none=True)
def list_batches(
    context: ContextDep, owner: OwnerDep, after: AfterCursor = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> BatchList:
    """Return a page of your batches, newest first, beginning after the id `after`."""
    batches, has_more = context.batches.list_batches(owner, after, limit)
    data = [to_batch_object(batch) for batch in batches]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return BatchList(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


@router.get("/{batch_id}", response_model_exclude_none=True)
def get_batch(batch_id: ResourceId, context: ContextDep, owner: OwnerDep) -> BatchObject:
    return to_batch_object(require_batch(context, batch_id, owner))


@router.post("/{batch_id}/cancel", response_model_exclude_none=True)
def cancel_batch(
    batch_id: ResourceId, context: ContextDep, owner: OwnerDep, idempotent_request: IdempotencyDep
) -> BatchObject:
    """Cancel the lines that are not done. The output file contains the results of the others."""

    def cancel(batch_id: str) -> BatchRecord:
        batch = require_batch(context, batch_id, owner)
        while batch.state in ("validating", "in_progress"):  # try again if the runner has changed the state meanwhile
            context.batches.transition_batch(batch, "cancelling")
            batch = require_batch(context, batch_id, owner)
        return batch

    return to_batch_object(idempotent_request.repeat(batch_id, cancel))


@router.delete("/{batch_id}")
def delete_batch(batch_id: ResourceId, context: ContextDep, owner: OwnerDep) -> BatchDeleted:
    """Delete a batch with its results, and cancel it if it has not ended. Its input file is a file of its own."""
    if not context.batches.delete_batch(batch_id, owner):
        raise build_not_found_error("batch", batch_id)
    return BatchDeleted(id=batch_id)


# ---------------------------------------------------------------- lines, for the batch runner


class BatchLineRequest(RequestModel):
    """One request of a batch. `custom_id` is the user's name for it, which must be unique within the batch."""

    custom_id: CleanText = Field(min_length=1, max_length=512)
    method: Literal["POST"]
    url: BatchEndpoint
    body: dict[str, Any]


def read_count(fields: Mapping[str, Any]) -> int:
    """Return a line's `n` as the request will be read, or 1 if it will be refused."""
    try:
        return validate_fields(LineCount, fields).n
    except InvalidInput:
        return 1


class LineCount(RequestModel):
    n: int = Field(default=1, ge=1, le=8)


class BatchLineHandler:
    """Parses the lines of batches and builds their responses (the port BatchLinePort of backends/batches)."""

    def __init__(self, context: ServiceContext):
        self.context = context

    def parse_line(self, data: bytes, endpoint: str) -> tuple[str, str, dict[str, Any]]:
        """Return a line's custom_id, url and body; raise InvalidInput if it is malformed."""
        if len(data) > MAX_LINE_BYTES:
            raise InvalidInput("line", f"it has {len(data)} bytes; allowed: 1 to {MAX_LINE_BYTES}")
        line = validate_fields(BatchLineRequest, parse_json_object(data, "line"))
        if line.url != endpoint:
            raise InvalidInput("url", f"it is {line.url}; allowed: the batch's endpoint, {endpoint}")
        return line.custom_id, line.url, line.body

    def list_job_ids(self, url: str, fields: Mapping[str, Any], name: str) -> list[str]:
        """Return the ids of a line's jobs; raise InvalidInput if its request is refused."""
        if url == "/v1/videos":
            return make_video_ids(f"video_{name}", read_count(fields))
        return make_image_ids(f"image_{name}", read_count(fields))

    def build_job_requests(self, owner: str, url: str, fields: Mapping[str, Any], name: str) -> list[JobRequest]:
        """Build a line's jobs; raise an OmniVideoError if its request is refused."""
        if url == "/v1/videos":
            return build_video_jobs(self.context, owner, validate_fields(VideoRequest, fields), f"video_{name}")
        if fields.get("response_format") == "b64_json":
            raise InvalidInput("response_format", "a batch returns images as URLs; allowed: url")
        return build_image_jobs(self.context, owner, validate_fields(ImageGenerationRequest, fields), f"image_{name}")

    def build_response_body(self, url: str, statuses: list[JobStatus]) -> dict[str, Any]:
        """Return the response to a line whose jobs are all done."""
        response: BaseModel
        if url == "/v1/videos":
            response = to_video_object(self.context, statuses[0])
        else:
            # A batch is read later than a signature lasts, and by a client that has its key.
            links = create_link_builder(self.context, statuses[0].owner)
            response = build_images_response(
                statuses,
                lambda status: ImageObject(
                    id=status.id, url=links.build_link(build_image_path(status.id), is_signed=False)
                ),
            )
        return response.model_dump(exclude_none=True)

    def error_from_statuses(self, statuses: Collection[JobStatus]) -> Exception:
        """Return the error of the first job of a line that is not done."""
        return error_from_job(next(status for status in statuses if status.state != "done"))

    def to_error_response(self, error: Exception) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the body of an error."""
        api_error = to_api_error(error)
        return api_error.status_code, api_error.to_body()

"""Files: what users keep here to name it later, and what batches leave for them."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, InstanceOf
from pydantic.json_schema import SkipJsonSchema
from starlette.datastructures import UploadFile

from omnivideo.api.dependencies import ContextDep, OwnerDep, ServiceContext
from omnivideo.api.errors import ERROR_RESPONSES, build_not_found_error
from omnivideo.api.media import build_range_response
from omnivideo.api.request_body import (
    AfterCursor,
    BodyFields,
    CleanText,
    IdempotencyKey,
    ResourceId,
    build_key_reused_error,
    document_request_body,
    make_id,
    rename_error_field,
    validate_fields,
)
from omnivideo.contracts import Artifact
from omnivideo.errors import InvalidInput, UnreadableMedia

router = APIRouter(prefix="/v1/files", tags=["files"], responses=ERROR_RESPONSES)
UploadPurpose = Literal["batch", "vision", "user_data"]


class UploadField(BaseModel):
    upload: SkipJsonSchema[InstanceOf[UploadFile]]


class CreateFileRequest(BaseModel):
    """`vision` must be an image or a clip, `batch` lines of JSON; `user_data` may be anything."""

    file: UploadField
    purpose: UploadPurpose


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output", "vision", "user_data"]
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


def to_file_object(row: Any) -> FileObject:
    return FileObject(
        id=row.id, bytes=row.size_bytes, created_at=int(row.created_at), filename=row.name, purpose=row.purpose
    )


def require_file(context: ServiceContext, file_id: str, owner: str) -> Any:
    row = context.files.get_file(file_id, owner)
    if row is None:
        raise build_not_found_error("file", file_id)
    return row


@router.post("", openapi_extra=document_request_body(CreateFileRequest, "file", accepts_json=False))
def upload_file(
    context: ContextDep, owner: OwnerDep, fields: BodyFields, idempotency_key: IdempotencyKey = None
) -> FileObject:
    """Keeps a file.  Its name is a label, and nothing here is ever called so."""
    payload = validate_fields(CreateFileRequest, fields)
    data, filename = payload.file.upload.file.read(), sanitize_filename(payload.file.upload.filename or "")
    if not data:
        raise InvalidInput("file", f"it is empty; allowed: 1 to {context.settings.max_upload_bytes} bytes")
    artifact = ingest_upload(context, data, filename, payload.purpose)
    object_key = artifact.key if artifact else context.store.put(data, "jsonl" if payload.purpose == "batch" else "bin")
    row = context.files.create_file(
        owner,
        file_id=make_id("file", owner, idempotency_key).replace("_", "-"),
        name=filename,
        purpose=payload.purpose,
        size_bytes=len(data),
        object_key=object_key,
        artifact=artifact.model_dump() if artifact else None,
    )
    if (row.object_key, row.purpose) != (object_key, payload.purpose):
        raise build_key_reused_error()
    return to_file_object(row)


def sanitize_filename(filename: str) -> str:
    """The last part of the user's name for it, on one line and short."""
    basename = re.split(r"[\\/]", filename)[-1][-255:]
    return "".join(char for char in basename if char.isprintable()) or "file"


def ingest_upload(context: ServiceContext, data: bytes, filename: str, purpose: UploadPurpose) -> Artifact | None:
    """The file as an image or a clip, decoded in a limited process; None for what is kept as it is."""
    try:
        return context.ingest_media(data, "upload", filename) if purpose != "batch" else None
    except UnreadableMedia as error:
        if purpose == "vision":
            raise rename_error_field(error, "file") from None
        return None


@router.get("")
def list_files(
    context: ContextDep,
    owner: OwnerDep,
    after: AfterCursor = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[CleanText | None, Query(max_length=40)] = None,
) -> FileList:
    """Your files by age, `after` the one of that id."""
    rows, has_more = context.files.list_files(owner, purpose, after, limit, order == "desc")
    data = [to_file_object(row) for row in rows]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return FileList(data=data, first_id=first, last_id=last, has_more=has_more)


@router.get("/{file_id}")
def get_file(file_id: ResourceId, context: ContextDep, owner: OwnerDep) -> FileObject:
    return to_file_object(require_file(context, file_id, owner))


@router.delete("/{file_id}")
def delete_file(file_id: ResourceId, context: ContextDep, owner: OwnerDep) -> FileDeleted:
    """Forgets it; its bytes go with the next sweep, unless something else refers to them."""
    if not context.files.delete_file(file_id, owner):
        raise build_not_found_error("file", file_id)
    return FileDeleted(id=file_id)


@router.get("/{file_id}/content", response_class=Response)
def get_file_content(file_id: ResourceId, request: Request, context: ContextDep, owner: OwnerDep) -> Response:
    """The file's bytes, to be saved and never shown as a page: a stranger may have written them."""
    row = require_file(context, file_id, owner)
    response = build_range_response(request, context.store.get(row.object_key), row.object_key)
    # Quoted whole, so that no name can end the header or begin another one.
    response.headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(row.name, safe='')}"
    return response

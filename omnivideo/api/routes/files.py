"""Files: what users upload to refer to it later, and the result files of their batches."""

import os
import re
from typing import Annotated, BinaryIO, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field, InstanceOf
from pydantic.json_schema import SkipJsonSchema
from starlette.datastructures import UploadFile

from omnivideo.api.dependencies import (
    AfterCursor,
    ContextDep,
    IdempotencyDep,
    OwnerDep,
    ResourceId,
    ServiceContext,
)
from omnivideo.api.errors import ERROR_RESPONSES, build_not_found_error
from omnivideo.api.media import build_range_response, content_from_store
from omnivideo.api.request_body import (
    BodyFields,
    CleanText,
    FormObject,
    ServiceRoute,
    document_request_body,
    rename_error_field,
    validate_fields,
)
from omnivideo.contracts import Artifact, RequestModel
from omnivideo.errors import InvalidInput, UnreadableMedia
from omnivideo.records import FileRecord

router = APIRouter(route_class=ServiceRoute, prefix="/v1/files", tags=["files"], responses=ERROR_RESPONSES)
UploadPurpose = Literal["batch", "vision", "user_data", "assistants"]


class UploadField(BaseModel):
    upload: SkipJsonSchema[InstanceOf[UploadFile]]


class ExpiresAfter(FormObject):
    """A file is deleted this many seconds after it was created."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=30 * 86_400)


class CreateFileRequest(RequestModel):
    """A `vision` file must be an image or a clip, a `batch` file JSON lines; the others can be anything.

    `assistants` is what the Vercel AI SDK sends by default.
    """

    file: UploadField
    purpose: UploadPurpose
    expires_after: ExpiresAfter | None = None


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Literal["batch", "batch_output", "vision", "user_data", "assistants"]
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


def to_file_object(file: FileRecord) -> FileObject:
    return FileObject.model_validate(
        {
            "id": file.id,
            "bytes": file.size_bytes,
            "created_at": int(file.created_at),
            "expires_at": None if file.expires_at is None else int(file.expires_at),
            "filename": file.name,
            "purpose": file.purpose,
        }
    )


def require_file(context: ServiceContext, file_id: str, owner: str) -> FileRecord:
    file = context.files.get_file(file_id, owner)
    if file is None:
        raise build_not_found_error("file", file_id)
    return file


@router.post("", openapi_extra=document_request_body(CreateFileRequest, "file", accepts_json=False))
def upload_file(
    context: ContextDep, owner: OwnerDep, fields: BodyFields, idempotent_request: IdempotencyDep
) -> FileObject:
    """Store a file. Its name is only a label; it is never used as a path."""
    payload = validate_fields(CreateFileRequest, fields)
    file = idempotent_request.run(
        payload,
        "file-",
        find=lambda file_id: context.files.get_file(file_id, owner),
        create=lambda file_id: store_file(context, owner, payload, file_id),
    )
    return to_file_object(file)


def store_file(context: ServiceContext, owner: str, payload: CreateFileRequest, file_id: str) -> FileRecord:
    file, filename = payload.file.upload.file, sanitize_filename(payload.file.upload.filename or "")
    size_bytes = file.seek(0, os.SEEK_END)
    if not size_bytes:
        raise InvalidInput("file", f"it is empty; allowed: 1 to {context.settings.max_upload_bytes} bytes")
    with context.usage.reserve_bytes(owner, size_bytes):
        artifact = ingest_upload(context, owner, file, filename, payload.purpose)
        suffix = "jsonl" if payload.purpose == "batch" else "bin"
        object_key = artifact.key if artifact else context.store.put_stream(file, suffix)
    return context.files.create_file(
        owner,
        file_id=file_id,
        name=filename,
        purpose=payload.purpose,
        size_bytes=size_bytes,
        object_key=object_key,
        artifact=artifact.model_dump() if artifact else None,
        lifetime_seconds=payload.expires_after.seconds if payload.expires_after else None,
    )


def sanitize_filename(filename: str) -> str:
    """Return the last part of the user's path, without control characters and at most 255 characters long."""
    basename = re.split(r"[\\/]", filename)[-1][-255:]
    return "".join(char for char in basename if char.isprintable()) or "file"


def ingest_upload(
    context: ServiceContext, owner: str, file: BinaryIO, filename: str, purpose: UploadPurpose
) -> Artifact | None:
    """Store the file as an image or a clip and return it; return None if it is to be stored as plain bytes.

    Raises UnreadableMedia if a file for `vision` is neither an image nor a clip.
    """
    try:
        return context.ingest_media(owner, file, "upload", filename) if purpose != "batch" else None
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
    """Return a page of your files, ordered by age, beginning after the id `after`."""
    records, has_more = context.files.list_files(owner, purpose, after, limit, order == "desc")
    data = [to_file_object(file) for file in records]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return FileList(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


@router.get("/{file_id}")
def get_file(file_id: ResourceId, context: ContextDep, owner: OwnerDep) -> FileObject:
    return to_file_object(require_file(context, file_id, owner))


@router.delete("/{file_id}")
def delete_file(file_id: ResourceId, context: ContextDep, owner: OwnerDep) -> FileDeleted:
    """Delete a file. Sweeps remove its bytes within a day, unless something else refers to them."""
    if not context.files.delete_file(file_id, owner):
        raise build_not_found_error("file", file_id)
    return FileDeleted(id=file_id)


@router.get("/{file_id}/content", response_class=Response)
def get_file_content(file_id: ResourceId, request: Request, context: ContextDep, owner: OwnerDep) -> Response:
    """Return the file's bytes as an attachment, so that a browser does not run what it contains."""
    file = require_file(context, file_id, owner)
    response = build_range_response(request, content_from_store(context, file.object_key))
    # All special characters are quoted, so that a name cannot end the header or start another one.
    response.headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(file.name, safe='')}"
    return response

"""Files: what users keep here to name it later, and what batches leave for them."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, InstanceOf
from pydantic.json_schema import SkipJsonSchema
from starlette.datastructures import UploadFile

from omnivideo.api.errors import REFUSALS, not_found
from omnivideo.api.forms import After, Fields, Id, Key, Text, documented, name_for, renamed, reused, validated
from omnivideo.api.media import ranged
from omnivideo.api.rooms import Owner, Room, Rooms
from omnivideo.contracts import Artifact
from omnivideo.errors import InvalidInput, UnreadableMedia

router = APIRouter(prefix="/v1/files", tags=["files"], responses=REFUSALS)
Purpose = Literal["batch", "vision", "user_data"]


class Upload(BaseModel):
    upload: SkipJsonSchema[InstanceOf[UploadFile]]


class NewFile(BaseModel):
    """`vision` must be an image or a clip, `batch` lines of JSON; `user_data` may be anything."""

    file: Upload
    purpose: Purpose


class File(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output", "vision", "user_data"]
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[File]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


def shown(row: Any) -> File:
    return File(id=row.id, bytes=row.bytes, created_at=int(row.made), filename=row.name, purpose=row.purpose)


def found(rooms: Rooms, file_id: str, owner: str) -> Any:
    row = rooms.records.file(file_id, owner)
    if row is None:
        raise not_found("file", file_id)
    return row


@router.post("", openapi_extra=documented(NewFile, "file", plain=False))
def create(rooms: Room, owner: Owner, fields: Fields, key: Key = None) -> File:
    """Keeps a file.  Its name is a label, and nothing here is ever called so."""
    asked = validated(NewFile, fields)
    data, name = asked.file.upload.file.read(), label(asked.file.upload.filename or "")
    if not data:
        raise InvalidInput("file", f"it is empty; allowed: 1 to {rooms.settings.upload_most} bytes")
    artifact = media(rooms, data, name, asked.purpose)
    stored = artifact.key if artifact else rooms.store.put(data, "jsonl" if asked.purpose == "batch" else "bin")
    row = rooms.records.add_file(
        owner, id=name_for("file", owner, key).replace("_", "-"), name=name, purpose=asked.purpose, bytes=len(data),
        key=stored, artifact=artifact.model_dump() if artifact else None,
    )  # fmt: skip
    if (row.key, row.purpose) != (stored, asked.purpose):
        raise reused()
    return shown(row)


def label(name: str) -> str:
    """The last part of the user's name for it, on one line and short."""
    last = re.split(r"[\\/]", name)[-1][-255:]
    return "".join(char for char in last if char.isprintable()) or "file"


def media(rooms: Rooms, data: bytes, name: str, purpose: Purpose) -> Artifact | None:
    """The file as an image or a clip, decoded in a limited process; None for what is kept as it is."""
    try:
        return rooms.taken(data, "upload", name) if purpose != "batch" else None
    except UnreadableMedia as error:
        if purpose == "vision":
            raise renamed(error, "file") from None
        return None


@router.get("")
def listing(
    rooms: Room, owner: Owner, after: After = None, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    order: Literal["asc", "desc"] = "desc", purpose: Annotated[Text | None, Query(max_length=40)] = None,
) -> FileList:  # fmt: skip
    """Your files by age, `after` the one of that id."""
    rows, more = rooms.records.files(owner, purpose, after, limit, order == "desc")
    data = [shown(row) for row in rows]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return FileList(data=data, first_id=first, last_id=last, has_more=more)


@router.get("/{file_id}")
def get(file_id: Id, rooms: Room, owner: Owner) -> File:
    return shown(found(rooms, file_id, owner))


@router.delete("/{file_id}")
def delete(file_id: Id, rooms: Room, owner: Owner) -> FileDeleted:
    """Forgets it; its bytes go with the next sweep, unless something else refers to them."""
    if not rooms.records.remove_file(file_id, owner):
        raise not_found("file", file_id)
    return FileDeleted(id=file_id)


@router.get("/{file_id}/content", response_class=Response)
def content(file_id: Id, request: Request, rooms: Room, owner: Owner) -> Response:
    """The file's bytes, to be saved and never shown as a page: a stranger may have written them."""
    row = found(rooms, file_id, owner)
    response = ranged(request, rooms.store.get(row.key), row.key)
    # Quoted whole, so that no name can end the header or begin another one.
    response.headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(row.name, safe='')}"
    return response

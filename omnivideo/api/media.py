"""Images and clips in requests and responses: what a request refers to or uploads, and responses with ranges."""

import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import anyio
from anyio.lowlevel import RunVar
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ConfigDict, Field, InstanceOf, model_validator
from pydantic.json_schema import SkipJsonSchema
from starlette.datastructures import UploadFile

from omnivideo.api.dependencies import ServiceContext
from omnivideo.api.request_body import CleanText, FormObject, rename_error_field
from omnivideo.contracts import Artifact, JobStatus, RequestModel
from omnivideo.errors import InvalidInput, PoolBusy, StoreError

MEDIA_TYPES = {
    "png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif",
    "avif": "image/avif", "heic": "image/heic",
    "mp4": "video/mp4", "webm": "video/webm", "mov": "video/quicktime", "mkv": "video/x-matroska",
    "json": "application/json",
}  # fmt: skip
ETAG_PATTERN = re.compile(r'(?:W/)?("[^"]*")')
PART_BYTES = 2**20  # of a download, in memory at a time
MAX_DOWNLOAD_READS = 16  # threads that read parts of downloads
PART_RETRY_SECONDS = 0.1
DOWNLOAD_LIMITER: RunVar[anyio.CapacityLimiter] = RunVar("download_limiter")
RANGE_PATTERN = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


# ---------------------------------------------------------------- storing


def store_media(
    context: ServiceContext, owner: str, source: bytes | BinaryIO, created_by: str, name: str = ""
) -> Artifact:
    """Store an owner's image or clip. Raises UnreadableMedia if it is neither, and LimitReached."""
    size_bytes = len(source) if isinstance(source, bytes) else source.seek(0, os.SEEK_END)
    with context.usage.reserve_bytes(owner, size_bytes):
        return context.ingest_media(owner, source, created_by, name)


# ---------------------------------------------------------------- attachments of threads and chats


class MediaPart(RequestModel):
    """An image or a clip: an uploaded file's id, or a URL (data:, or http(s) on a host that the operator allows)."""

    file_id: str | None = Field(default=None, max_length=64)
    url: str | None = None

    @model_validator(mode="after")
    def check_exactly_one(self) -> "MediaPart":
        if (self.file_id is None) == (self.url is None):
            raise ValueError("give either file_id or url")
        return self

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return "file_id" if self.url is None else "url"


def artifact_from_part(context: ServiceContext, owner: str, part: MediaPart, created_by: str, field: str) -> Artifact:
    """Return the part as a stored artifact; raise an InvalidInput that names the request's field."""
    try:
        if part.url is not None:
            return store_media(context, owner, context.fetch_media(owner, part.url), created_by)
        return artifact_from_file(context, owner, str(part.file_id)).model_copy(update={"created_by": created_by})
    except InvalidInput as error:
        raise rename_error_field(error, field) from None


# ---------------------------------------------------------------- sources of edits

EXPIRED_MESSAGE = "that video has expired; generate it again"


def has_expired(context: ServiceContext, status: JobStatus) -> bool:
    """Return whether the job's result may have been removed because of its age."""
    if status.state != "done" or status.ended_at is None:
        return False
    return status.ended_at + context.settings.artifact_lifetime_seconds < time.time()


class MediaReference(FormObject):
    """An image or a clip: uploaded with the request or before it (`file_id`), generated here (`id`), or at a URL."""

    model_config = ConfigDict(title="Reference")

    upload: SkipJsonSchema[InstanceOf[UploadFile] | None] = None
    file_id: CleanText | None = None
    image_url: CleanText | None = None
    video_url: CleanText | None = None
    id: CleanText | None = None


def resolve_source(context: ServiceContext, owner: str, reference: MediaReference, field: str) -> Artifact:
    """Return the referenced image or clip as an artifact; raise an InvalidInput that names the field."""
    reference_fields = reference.model_dump(exclude_none=True)
    if len(reference_fields) != 1:
        raise InvalidInput(field, "give a file, or one of file_id, image_url, video_url and id")
    kind = next(iter(reference_fields))
    field_path = field if kind == "upload" or field.endswith("url") else f"{field}.{kind}"
    try:
        return ARTIFACT_RESOLVERS[kind](context, owner, reference_fields[kind])
    except InvalidInput as error:
        raise rename_error_field(error, field_path) from None


def artifact_from_upload(context: ServiceContext, owner: str, file: UploadFile) -> Artifact:
    return store_media(context, owner, file.file, "upload", file.filename or "")


def artifact_from_file(context: ServiceContext, owner: str, file_id: str) -> Artifact:
    file = context.files.get_file(file_id, owner)
    if file is None:
        raise InvalidInput("file_id", f"there is no file {file_id[:100]!r}")
    if file.artifact is None:
        raise InvalidInput("file_id", "that file is not an image or a clip")
    return Artifact.parse_stored(file.artifact)


def artifact_from_url(context: ServiceContext, owner: str, url: str) -> Artifact:
    return store_media(context, owner, context.fetch_media(owner, url), "upload")


def artifact_from_job(context: ServiceContext, owner: str, job_id: str) -> Artifact:
    status = context.jobs.get_owned_job(job_id, owner, "video")
    if status is None:
        raise InvalidInput("id", f"there is no video {job_id[:100]!r}")
    if status.result is None:
        raise InvalidInput("id", "that video is not completed")
    if has_expired(context, status):
        raise InvalidInput("id", EXPIRED_MESSAGE)
    return status.result


ARTIFACT_RESOLVERS: dict[str, Callable[[ServiceContext, str, Any], Artifact]] = {
    "upload": artifact_from_upload,
    "file_id": artifact_from_file,
    "image_url": artifact_from_url,
    "video_url": artifact_from_url,
    "id": artifact_from_job,
}


# ---------------------------------------------------------------- responses


def matches_etag(if_none_match: str, etag: str) -> bool:
    """Return whether the header `If-None-Match` is * or lists the entity tag, which may be marked as weak (W/)."""
    return if_none_match.strip() == "*" or etag in ETAG_PATTERN.findall(if_none_match)


class StoredContent(NamedTuple):
    """Bytes to answer with. `key` is a digest of them with a suffix; `read` returns them from one index to another.

    `digest` is the SHA-256 of all of them if it must be checked that the store has sent the bytes that it was given.
    """

    key: str
    size: int
    read: Callable[[int, int], bytes]  # the first and the last byte, both included
    digest: str | None = None


def content_from_store(context: ServiceContext, key: str) -> StoredContent:
    """Return an object. A small one is read at once and checked, so that each range of it is right."""
    size, digest = context.store.get_size(key), key.partition(".")[0]
    if size > PART_BYTES:
        return StoredContent(key, size, partial(context.store.read_range, key), digest)
    data = context.store.get(key)
    check_digest(key, digest, hashlib.sha256(data).hexdigest())
    return content_from_bytes(data, key)


def check_digest(key: str, expected: str, actual: str) -> None:
    if actual != expected:
        raise StoreError(f"store: {key} has other bytes than were stored")


def content_from_bytes(data: bytes, key: str) -> StoredContent:
    return StoredContent(key, len(data), lambda first, last: data[first : last + 1])


def build_range_response(request: Request, content: StoredContent) -> Response:
    """Return the content, or the requested range of it (206, or 416 with the size if the range lies outside of it).

    The key is the entity tag. Only a part of the content is in memory at a time.
    """
    size, key = content.size, content.key
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{key}"', "X-Content-Type-Options": "nosniff"}
    media_type = MEDIA_TYPES.get(key.rpartition(".")[2], "application/octet-stream")
    if matches_etag(request.headers.get("if-none-match", ""), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    is_current = request.headers.get("if-range", headers["ETag"]) == headers["ETag"]
    range_match = RANGE_PATTERN.fullmatch(request.headers.get("range", "")) if is_current else None
    start, end, status_code = 0, size - 1, 200
    if range_match is not None and range_match.groups() != ("", ""):
        first, last = range_match.groups()
        start = int(first) if first else max(0, size - int(last))
        end = min(int(last), size - 1) if first and last else size - 1
        if start > end:
            return Response(status_code=416, headers=headers | {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"], status_code = f"bytes {start}-{end}/{size}", 206
    # The first part is read now, so that what is missing has the status of an error.
    first_part = content.read(start, min(end, start + PART_BYTES - 1)) if size else b""
    if len(first_part) == end - start + 1:
        return Response(first_part, status_code, headers, media_type)
    headers["Content-Length"] = str(end - start + 1)
    return StreamingResponse(stream_parts(content, first_part, start, end), status_code, headers, media_type)


async def stream_parts(content: StoredContent, first_part: bytes, start: int, end: int) -> AsyncIterator[bytes]:
    """Yield the content from `start` to `end`; it is read in threads of its own, of which there are few.

    Raises StoreError before the last part of the whole content if the store has sent other bytes than it was given.
    """
    is_whole = content.digest is not None and (start, end) == (0, content.size - 1)
    digest = hashlib.sha256(first_part)
    yield first_part
    for position in range(start + PART_BYTES, end + 1, PART_BYTES):
        part = await read_part(content, position, min(end, position + PART_BYTES - 1))
        if is_whole:
            digest.update(part)
            if position + len(part) > end:
                check_digest(content.key, str(content.digest), digest.hexdigest())
        yield part


async def read_part(content: StoredContent, first: int, last: int) -> bytes:
    while True:
        try:
            return await anyio.to_thread.run_sync(content.read, first, last, limiter=get_download_limiter())
        except PoolBusy:  # a download that has begun waits
            await anyio.sleep(PART_RETRY_SECONDS)


def get_download_limiter() -> anyio.CapacityLimiter:
    """Return the limiter of threads that read parts of downloads in this event loop."""
    try:
        return DOWNLOAD_LIMITER.get()
    except LookupError:
        DOWNLOAD_LIMITER.set(limiter := anyio.CapacityLimiter(MAX_DOWNLOAD_READS))
        return limiter

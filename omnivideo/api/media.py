"""Images and clips in requests and responses: what a request refers to, and responses with a range of bytes."""

import re
import time
from collections.abc import Callable
from typing import Any

from fastapi import Request, Response
from pydantic import ConfigDict, Field, InstanceOf, model_validator
from pydantic.json_schema import SkipJsonSchema
from starlette.datastructures import UploadFile

from omnivideo.api.dependencies import ServiceContext
from omnivideo.api.request_body import CleanText, rename_error_field
from omnivideo.contracts import Artifact, JobStatus, RequestModel
from omnivideo.errors import InvalidInput

MEDIA_TYPES = {
    "png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif",
    "avif": "image/avif", "heic": "image/heic",
    "mp4": "video/mp4", "webm": "video/webm", "mov": "video/quicktime", "mkv": "video/x-matroska",
    "json": "application/json",
}  # fmt: skip
ETAG_PATTERN = re.compile(r'(?:W/)?("[^"]*")')
RANGE_PATTERN = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


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
            return context.ingest_media(context.fetch_media(part.url), created_by)
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


class MediaReference(RequestModel):
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
    return context.ingest_media(file.file.read(), "upload", file.filename or "")


def artifact_from_file(context: ServiceContext, owner: str, file_id: str) -> Artifact:
    file = context.files.get_file(file_id, owner)
    if file is None:
        raise InvalidInput("file_id", f"there is no file {file_id[:100]!r}")
    if file.artifact is None:
        raise InvalidInput("file_id", "that file is not an image or a clip")
    return Artifact(**file.artifact)


def artifact_from_url(context: ServiceContext, owner: str, url: str) -> Artifact:
    return context.ingest_media(context.fetch_media(url), "upload")


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


def build_range_response(request: Request, data: bytes, key: str) -> Response:
    """Return the bytes, or the requested range of them (206, or 416 with the size if the range lies outside of them).

    The key, which is a digest of the bytes, is the entity tag.
    """
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{key}"', "X-Content-Type-Options": "nosniff"}
    media_type = MEDIA_TYPES.get(key.rpartition(".")[2], "application/octet-stream")
    if matches_etag(request.headers.get("if-none-match", ""), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    is_current = request.headers.get("if-range", headers["ETag"]) == headers["ETag"]
    range_match = RANGE_PATTERN.fullmatch(request.headers.get("range", "")) if is_current else None
    if range_match is None or range_match.groups() == ("", ""):
        return Response(data, media_type=media_type, headers=headers)
    first, last = range_match.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    end = min(int(last), len(data) - 1) if first and last else len(data) - 1
    if start > end:
        return Response(status_code=416, headers=headers | {"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
    return Response(data[start : end + 1], 206, headers, media_type)

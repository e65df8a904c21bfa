"""Images and clips on their way in and out of the service."""

import re
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel, Field, model_validator

from omnivideo.api.errors import APIError, build_not_found_error
from omnivideo.contracts import Artifact

MEDIA_TYPES = {
    "png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif",
    "mp4": "video/mp4", "webm": "video/webm", "mov": "video/quicktime", "mkv": "video/x-matroska",
    "json": "application/json",
}  # fmt: skip
RANGE_PATTERN = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class MediaPart(BaseModel):
    """An image or a clip: an uploaded file's id, or a URL (data:, or http(s) from a host that the operator allows)."""

    file_id: str | None = Field(default=None, max_length=64)
    url: str | None = None

    @model_validator(mode="after")
    def check_exactly_one(self) -> "MediaPart":
        if (self.file_id is None) == (self.url is None):
            raise ValueError("give file_id or url, one of the two")
        return self


def artifact_from_part(context: Any, owner: str, part: MediaPart, created_by: str) -> Artifact:
    """The part in the store; raises UnreadableMedia where it is no image or clip."""
    if part.url is not None:
        artifact: Artifact = context.ingest_media(context.fetch_media(part.url), created_by)
        return artifact
    file = context.files.get_file(part.file_id, owner)
    if file is None:
        raise build_not_found_error("file", str(part.file_id))
    if file.artifact is None:
        raise APIError(400, "file_id: that file is no image or clip", "file_id", "invalid_value")
    return Artifact(**(file.artifact | {"created_by": created_by}))


def build_range_response(request: Request, data: bytes, key: str) -> Response:
    """The bytes, or the range that is asked for: 206, or 416 with the size.  The key is the entity tag."""
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{key}"', "X-Content-Type-Options": "nosniff"}
    media_type = MEDIA_TYPES.get(key.rpartition(".")[2], "application/octet-stream")
    if request.headers.get("if-none-match") == headers["ETag"]:
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

"""Images and clips on their way in and out of the service."""

import re
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel, Field, model_validator

from omnivideo.api.errors import WireError, not_found
from omnivideo.contracts import Artifact

TYPES = {
    "png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif",
    "mp4": "video/mp4", "webm": "video/webm", "mov": "video/quicktime", "mkv": "video/x-matroska",
    "json": "application/json",
}  # fmt: skip
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class Part(BaseModel):
    """An image or a clip: an uploaded file's id, or a URL (data:, or http(s) from a host that the operator allows)."""

    file_id: str | None = Field(default=None, max_length=64)
    url: str | None = None

    @model_validator(mode="after")
    def one(self) -> "Part":
        if (self.file_id is None) == (self.url is None):
            raise ValueError("give file_id or url, one of the two")
        return self


def artifact_of(rooms: Any, owner: str, part: Part, made_by: str) -> Artifact:
    """The part in the store; raises UnreadableMedia where it is no image or clip."""
    if part.url is not None:
        made: Artifact = rooms.taken(rooms.fetched(part.url), made_by)
        return made
    file = rooms.records.file(part.file_id, owner)
    if file is None:
        raise not_found("file", str(part.file_id))
    if file.artifact is None:
        raise WireError(400, "file_id: that file is no image or clip", "file_id", "invalid_value")
    return Artifact(**(file.artifact | {"made_by": made_by}))


def ranged(request: Request, data: bytes, key: str) -> Response:
    """The bytes, or the range that is asked for: 206, or 416 with the size.  The key is the entity tag."""
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{key}"', "X-Content-Type-Options": "nosniff"}
    kind = TYPES.get(key.rpartition(".")[2], "application/octet-stream")
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    fresh = request.headers.get("if-range", headers["ETag"]) == headers["ETag"]
    asked = RANGE.fullmatch(request.headers.get("range", "")) if fresh else None
    if asked is None or asked.groups() == ("", ""):
        return Response(data, media_type=kind, headers=headers)
    first, last = asked.groups()
    begin = int(first) if first else max(0, len(data) - int(last))
    end = min(int(last), len(data) - 1) if first and last else len(data) - 1
    if begin > end:
        return Response(status_code=416, headers=headers | {"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
    return Response(data[begin : end + 1], 206, headers, kind)

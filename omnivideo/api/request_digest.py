"""Compute the digest that distinguishes a request from another one with the same idempotency key."""

import base64
import hashlib
import json
import re
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import UploadFile

DATA_URL_PATTERN = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


class BytesDigest(str):
    """The digest of a file's bytes, in place of the upload or the data URL that contained them."""


def digest_request(path: str, payload: BaseModel | None) -> str:
    """Return the digest of a request's path and of its fields, after defaults and null have been resolved.

    An upload and a data URL of the same bytes have the same digest, and so have a form and a JSON body.
    """
    fields = replace_bytes(payload.model_dump(exclude_none=True)) if payload else {}
    return hashlib.sha256(json.dumps([path, fields], sort_keys=True).encode()).hexdigest()


def replace_bytes(value: Any) -> Any:
    """Return the value with a digest for each upload and data URL, under the name `bytes` if it was in an object."""
    match value:
        case dict():
            replaced = {name: replace_bytes(item) for name, item in value.items()}
            return {"bytes" if isinstance(item, BytesDigest) else name: item for name, item in replaced.items()}
        case list() | tuple():
            return [replace_bytes(item) for item in value]
        case UploadFile():
            value.file.seek(0)
            digest = hashlib.sha256()
            while chunk := value.file.read(2**20):
                digest.update(chunk)
            value.file.seek(0)
            return BytesDigest(digest.hexdigest())
        case str() if (head := DATA_URL_PATTERN.match(value)) is not None:
            try:
                return BytesDigest(hashlib.sha256(base64.b64decode(value[head.end() :], validate=True)).hexdigest())
            except ValueError:
                return value
    return value

"""A request's body as fields, whether it comes as JSON or as a form, as the openai client sends it.

In a form `a[b]` is field b of a, `a[]` a list, and a file is `{"upload": file}`: what was uploaded, what is in the
store and what is to be fetched look alike from here on.
"""

import hashlib
import json
import re
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Annotated, Any, TypeVar

import anyio
from fastapi import Depends, Header, Path, Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, InstanceOf, ValidationError
from pydantic.json_schema import SkipJsonSchema
from starlette.datastructures import FormData, UploadFile

from omnivideo.api.errors import WireError
from omnivideo.api.rooms import Rooms
from omnivideo.contracts import Artifact
from omnivideo.errors import InvalidInput

JSON_MOST = 64 * 2**20  # bytes of a body in JSON: room for a clip in a data URL
JSON_SMALL = 64 * 2**10  # bytes that are parsed sooner than a thread is woken for them
PART_MOST = 8 * 2**20  # bytes of a form's field that is no file
FIELD = re.compile(r"(\w{1,64})(?:\[(\w{0,64})\])?")
Model = TypeVar("Model", bound=BaseModel)


def clean(text: str) -> str:
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("it holds characters that are none: NUL or half a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(clean)]
Id = Annotated[str, Path(pattern=r"^[A-Za-z0-9_.-]{1,200}$")]
After = Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_.-]{1,200}$")]
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]


# ---------------------------------------------------------------- bodies


async def fields_of(request: Request) -> AsyncIterator[dict[str, Any]]:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind == "application/json":
        yield await json_of(request)
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        async with request.form(max_files=4, max_fields=64, max_part_size=PART_MOST) as form:
            yield nested(form)
    else:
        raise WireError(415, "the body has another type; allowed: application/json, multipart/form-data", "body")


Fields = Annotated[dict[str, Any], Depends(fields_of)]


async def json_of(request: Request) -> dict[str, Any]:
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > JSON_MOST:
            raise WireError(413, f"the body is above {JSON_MOST} bytes; send files as a form", "body", "too_large")
    return parsed(data) if len(data) <= JSON_SMALL else await anyio.to_thread.run_sync(parsed, data)


def parsed(data: bytes | bytearray, what: str = "body") -> dict[str, Any]:
    """A JSON object; raises InvalidInput for anything else, numbers that are none and nesting without end included."""
    try:
        found = json.loads(data, parse_constant=no_number)
    except (ValueError, RecursionError):
        raise InvalidInput(what, "it is no JSON") from None
    if not isinstance(found, dict):
        raise InvalidInput(what, "it is no JSON object")
    return found


def no_number(name: str) -> float:
    raise ValueError(name)


def nested(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        found = FIELD.fullmatch(name)
        if found is None:
            continue  # no field of ours is called so
        field, inner = found.groups()
        given: Any = {"upload": value} if isinstance(value, UploadFile) else value
        if inner is None:
            fields[field] = given
        elif inner == "":
            fields.setdefault(field, [])
            fields[field] += [given]
        else:
            fields[field] = (fields[field] if isinstance(fields.get(field), dict) else {}) | {inner: given}
    return fields


def validated(kind: type[Model], fields: Mapping[str, Any]) -> Model:
    """Raises InvalidInput with the first wrong field's name; fields that the model does not know are let go."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "body"
        raise InvalidInput(where[:100], fault["msg"][0].lower() + fault["msg"][1:]) from None


def documented(kind: type[BaseModel], *files: str, plain: bool = True) -> dict[str, Any]:
    """A route's body in the OpenAPI document: as JSON if `plain`, and as a form where some fields may be files."""
    schema = kind.model_json_schema()
    schema = inlined(schema, schema.pop("$defs", {}))
    content: dict[str, Any] = {"application/json": {"schema": schema}} if plain else {}
    if files:
        uploads = {name: {"type": "string", "format": "binary"} for name in files}
        content["multipart/form-data"] = {"schema": schema | {"properties": schema["properties"] | uploads}}
    return {"requestBody": {"required": True, "content": content}}


def inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """The schema with its parts in place: a reference would lead nowhere from inside the document."""
    if isinstance(schema, list):
        return [inlined(one, parts) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return inlined(parts[schema["$ref"].rpartition("/")[2]], parts)
    return {name: inlined(one, parts) for name, one in schema.items()}


# ---------------------------------------------------------------- media that a request speaks of


class Reference(BaseModel):
    """An image or a clip: uploaded with the request, before it (`file_id`), drawn here (`id`), or at a URL."""

    model_config = ConfigDict(title="Reference")

    upload: SkipJsonSchema[InstanceOf[UploadFile] | None] = None
    file_id: Text | None = None
    image_url: Text | None = None
    id: Text | None = None


def source_of(rooms: Rooms, owner: str, given: Reference, field: str) -> Artifact:
    """Raises InvalidInput that names the field."""
    ways = given.model_dump(exclude_none=True)
    if len(ways) != 1:
        raise InvalidInput(field, "give a file, or one of file_id, image_url and id")
    way = next(iter(ways))
    where = field if way == "upload" else f"{field}.{way}"
    try:
        return WAYS[way](rooms, owner, ways[way])
    except InvalidInput as error:
        raise renamed(error, where) from None


def renamed(error: InvalidInput, field: str) -> InvalidInput:
    return InvalidInput(field, str(error).removeprefix(f"{error.field}: "))


def uploaded(rooms: Rooms, owner: str, file: UploadFile) -> Artifact:
    made: Artifact = rooms.taken(file.file.read(), "upload", file.filename or "")
    return made


def filed(rooms: Rooms, owner: str, file_id: str) -> Artifact:
    row = rooms.records.file(file_id, owner)
    if row is None:
        raise InvalidInput("file_id", f"there is no file {file_id[:100]!r}")
    if row.artifact is None:
        raise InvalidInput("file_id", "that file is no image or clip")
    return Artifact(**row.artifact)


def fetched(rooms: Rooms, owner: str, url: str) -> Artifact:
    made: Artifact = rooms.taken(rooms.fetched(url), "upload")
    return made


def drawn(rooms: Rooms, owner: str, job_id: str) -> Artifact:
    found = rooms.records.job(job_id, owner, "video")
    if found is None:
        raise InvalidInput("id", f"there is no video {job_id[:100]!r}")
    if found.result is None:
        raise InvalidInput("id", "that video is not completed")
    made: Artifact = found.result
    return made


WAYS: dict[str, Callable[[Rooms, str, Any], Artifact]] = {
    "upload": uploaded, "file_id": filed, "image_url": fetched, "id": drawn,
}  # fmt: skip


# ---------------------------------------------------------------- repeated requests


def name_for(kind: str, owner: str, key: str | None) -> str:
    """An id: of its own, or the one that every request of this owner with this key gets."""
    made = uuid.uuid4().hex if key is None else hashlib.sha256(f"{owner}\0{kind}\0{key}".encode()).hexdigest()[:32]
    return f"{kind}_{made}"


def digest_of(*parts: Any) -> str:
    """Of all that makes a request this one and no other."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def reused() -> WireError:
    text = "Idempotency-Key: it was given before, with another request; give a new one"
    return WireError(422, text, "Idempotency-Key", "idempotency_key_reused")

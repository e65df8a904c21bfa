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

from omnivideo.api.dependencies import ServiceContext
from omnivideo.api.errors import APIError
from omnivideo.contracts import Artifact
from omnivideo.errors import InvalidInput

MAX_JSON_BYTES = 64 * 2**20  # bytes of a body in JSON: room for a clip in a data URL
MAX_INLINE_JSON_BYTES = 64 * 2**10  # bytes that are parsed sooner than a thread is woken for them
MAX_FORM_FIELD_BYTES = 8 * 2**20  # bytes of a form's field that is no file
FORM_FIELD_PATTERN = re.compile(r"(\w{1,64})(?:\[(\w{0,64})\])?")
Model = TypeVar("Model", bound=BaseModel)


def check_characters(text: str) -> str:
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("it holds characters that are none: NUL or half a surrogate pair")
    return text


CleanText = Annotated[str, AfterValidator(check_characters)]
ResourceId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_.-]{1,200}$")]
AfterCursor = Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_.-]{1,200}$")]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]


# ---------------------------------------------------------------- bodies


async def read_body_fields(request: Request) -> AsyncIterator[dict[str, Any]]:
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type == "application/json":
        yield await read_json_body(request)
    elif content_type in ("multipart/form-data", "application/x-www-form-urlencoded"):
        async with request.form(max_files=4, max_fields=64, max_part_size=MAX_FORM_FIELD_BYTES) as form:
            yield fields_from_form(form)
    else:
        raise APIError(415, "the body has another type; allowed: application/json, multipart/form-data", "body")


BodyFields = Annotated[dict[str, Any], Depends(read_body_fields)]


async def read_json_body(request: Request) -> dict[str, Any]:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_JSON_BYTES:
            raise APIError(413, f"the body is above {MAX_JSON_BYTES} bytes; send files as a form", "body", "too_large")
    return (
        parse_json_object(data)
        if len(data) <= MAX_INLINE_JSON_BYTES
        else await anyio.to_thread.run_sync(parse_json_object, data)
    )


def parse_json_object(data: bytes | bytearray, field: str = "body") -> dict[str, Any]:
    """A JSON object; raises InvalidInput for anything else, numbers that are none and nesting without end included."""
    try:
        parsed = json.loads(data, parse_constant=reject_constant)
    except (ValueError, RecursionError):
        raise InvalidInput(field, "it is no JSON") from None
    if not isinstance(parsed, dict):
        raise InvalidInput(field, "it is no JSON object")
    return parsed


def reject_constant(name: str) -> float:
    raise ValueError(name)


def fields_from_form(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        match = FORM_FIELD_PATTERN.fullmatch(name)
        if match is None:
            continue  # no field of ours is called so
        field, subfield = match.groups()
        entry: Any = {"upload": value} if isinstance(value, UploadFile) else value
        if subfield is None:
            fields[field] = entry
        elif subfield == "":
            fields.setdefault(field, [])
            fields[field] += [entry]
        else:
            fields[field] = (fields[field] if isinstance(fields.get(field), dict) else {}) | {subfield: entry}
    return fields


def validate_fields(model_class: type[Model], fields: Mapping[str, Any]) -> Model:
    """Raises InvalidInput with the first wrong field's name; fields that the model does not know are let go."""
    try:
        return model_class.model_validate(fields)
    except ValidationError as error:
        first_error = error.errors()[0]
        field_path = ".".join(str(part) for part in first_error["loc"]) or "body"
        raise InvalidInput(field_path[:100], first_error["msg"][0].lower() + first_error["msg"][1:]) from None


def document_request_body(model_class: type[BaseModel], *file_fields: str, accepts_json: bool = True) -> dict[str, Any]:
    """A route's body in the OpenAPI document: as JSON if `accepts_json`, and as a form where some fields may be
    files."""
    schema = model_class.model_json_schema()
    schema = inline_definitions(schema, schema.pop("$defs", {}))
    content: dict[str, Any] = {"application/json": {"schema": schema}} if accepts_json else {}
    if file_fields:
        uploads = {name: {"type": "string", "format": "binary"} for name in file_fields}
        content["multipart/form-data"] = {"schema": schema | {"properties": schema["properties"] | uploads}}
    return {"requestBody": {"required": True, "content": content}}


def inline_definitions(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with its parts in place: a reference would lead nowhere from inside the document."""
    if isinstance(schema, list):
        return [inline_definitions(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return inline_definitions(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: inline_definitions(item, definitions) for name, item in schema.items()}


# ---------------------------------------------------------------- media that a request speaks of


class MediaReference(BaseModel):
    """An image or a clip: uploaded with the request, before it (`file_id`), drawn here (`id`), or at a URL."""

    model_config = ConfigDict(title="Reference")

    upload: SkipJsonSchema[InstanceOf[UploadFile] | None] = None
    file_id: CleanText | None = None
    image_url: CleanText | None = None
    id: CleanText | None = None


def resolve_source(context: ServiceContext, owner: str, reference: MediaReference, field: str) -> Artifact:
    """Raises InvalidInput that names the field."""
    reference_fields = reference.model_dump(exclude_none=True)
    if len(reference_fields) != 1:
        raise InvalidInput(field, "give a file, or one of file_id, image_url and id")
    kind = next(iter(reference_fields))
    field_path = field if kind == "upload" else f"{field}.{kind}"
    try:
        return ARTIFACT_RESOLVERS[kind](context, owner, reference_fields[kind])
    except InvalidInput as error:
        raise rename_error_field(error, field_path) from None


def rename_error_field(error: InvalidInput, field: str) -> InvalidInput:
    return InvalidInput(field, str(error).removeprefix(f"{error.field}: "))


def artifact_from_upload(context: ServiceContext, owner: str, file: UploadFile) -> Artifact:
    artifact: Artifact = context.ingest_media(file.file.read(), "upload", file.filename or "")
    return artifact


def artifact_from_file(context: ServiceContext, owner: str, file_id: str) -> Artifact:
    row = context.files.get_file(file_id, owner)
    if row is None:
        raise InvalidInput("file_id", f"there is no file {file_id[:100]!r}")
    if row.artifact is None:
        raise InvalidInput("file_id", "that file is no image or clip")
    return Artifact(**row.artifact)


def artifact_from_url(context: ServiceContext, owner: str, url: str) -> Artifact:
    artifact: Artifact = context.ingest_media(context.fetch_media(url), "upload")
    return artifact


def artifact_from_job(context: ServiceContext, owner: str, job_id: str) -> Artifact:
    status = context.jobs.get_owned_job(job_id, owner, "video")
    if status is None:
        raise InvalidInput("id", f"there is no video {job_id[:100]!r}")
    if status.result is None:
        raise InvalidInput("id", "that video is not completed")
    artifact: Artifact = status.result
    return artifact


ARTIFACT_RESOLVERS: dict[str, Callable[[ServiceContext, str, Any], Artifact]] = {
    "upload": artifact_from_upload,
    "file_id": artifact_from_file,
    "image_url": artifact_from_url,
    "id": artifact_from_job,
}


# ---------------------------------------------------------------- repeated requests


def make_id(prefix: str, owner: str, idempotency_key: str | None) -> str:
    """An id: of its own, or the one that every request of this owner with this key gets."""
    suffix = (
        uuid.uuid4().hex
        if idempotency_key is None
        else hashlib.sha256(f"{owner}\0{prefix}\0{idempotency_key}".encode()).hexdigest()[:32]
    )
    return f"{prefix}_{suffix}"


def digest_request(*parts: Any) -> str:
    """Of all that makes a request this one and no other."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def build_key_reused_error() -> APIError:
    text = "Idempotency-Key: it was given before, with another request; give a new one"
    return APIError(422, text, "Idempotency-Key", "idempotency_key_reused")

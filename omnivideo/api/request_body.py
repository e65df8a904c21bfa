"""A request's body as a dict of fields, from JSON or from a form as the openai client sends it.

In a form, `a[b]` is field b of the object a, `a[]` or `a[0]` is an item of the list a, and a file becomes
{"upload": file}. An uploaded file, a stored file and a file to fetch are therefore fields of the same model
(media.MediaReference). An input of a form that is left empty is absent, unless the field is a text.
"""

import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Annotated, Any, TypeVar, get_args

import anyio
from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Scope

from omnivideo.api.errors import APIError, BodyError, to_api_error
from omnivideo.contracts import MAX_SEED, RequestModel
from omnivideo.errors import InvalidInput
from omnivideo.validation import check_characters, describe_errors

MAX_JSON_BYTES = 2**20
MAX_MEDIA_JSON_BYTES = 64 * 2**20  # enough for a clip in a data URL
# The routes that take data URLs.
MEDIA_PATHS = re.compile(
    r"/v1/(?:chat/completions|responses|videos(?:/.*)?|images/.*|route|understand|threads/[^/]*/turns)"
)
# Commas, colons and brackets of a body. Parsing a body with more takes long, and other requests wait meanwhile.
MAX_JSON_SEPARATORS = 50_000
MAX_INLINE_JSON_BYTES = 64 * 2**10  # parsing a body up to this size takes less time than starting a thread for it
MAX_FORM_FIELD_BYTES = 8 * 2**20  # of one field that is not a file
MAX_FORM_FILES, MAX_FORM_FIELDS = 17, 64  # so many images as OpenAI's clients may send, and a mask
FORM_FIELD_PATTERN = re.compile(r"(\w{1,64})(?:\[(\w{0,64})\])?")
Model = TypeVar("Model", bound=BaseModel)


CleanText = Annotated[str, AfterValidator(check_characters)]


def refuse_value(value: object) -> None:
    raise ValueError("it is not supported here; leave it out")


def refuse_unless_off(value: object) -> object:
    """Return false, 0 or None, which change nothing; raise ValueError for anything else."""
    if value:
        refuse_value(value)
    return value


# A field that changes the result and that this service cannot honour: it is refused by name, not ignored.
Unsupported = Annotated[Any, AfterValidator(refuse_value)]
# A switch for something that this service does not do; forms send "false", which pydantic reads.
UnsupportedSwitch = Annotated[bool | None, AfterValidator(refuse_unless_off)]
UnsupportedNumber = Annotated[int | None, AfterValidator(refuse_unless_off)]
# -1 means any seed, as many clients send it.
Seed = Annotated[int | None, Field(ge=-1, le=MAX_SEED), AfterValidator(lambda seed: None if seed == -1 else seed)]


# ---------------------------------------------------------------- reading


async def read_body_fields(request: Request) -> AsyncIterator[dict[str, Any]]:
    """Yield the body's fields; a form's temporary files are deleted after the request.

    Raises InvalidInput for a malformed body, and APIError for another media type or a body that is too large.
    """
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type == "application/json":
        yield await read_json_body(request)
    elif content_type in ("multipart/form-data", "application/x-www-form-urlencoded"):
        form = await read_form(request)
        try:
            yield fields_from_form(form)
        finally:
            await form.close()
    else:
        raise APIError(415, "the body has an unknown type; allowed: application/json, multipart/form-data", "body")


async def read_form(request: Request) -> FormData:
    """Return the body's form; raise InvalidInput for a malformed one, and for too many files or fields."""
    limits = {"max_files": MAX_FORM_FILES, "max_fields": MAX_FORM_FIELDS, "max_part_size": MAX_FORM_FIELD_BYTES}
    try:
        return await request.form(**limits)
    except HTTPException as error:
        raise error if isinstance(error, BodyError) else InvalidInput("body", str(error.detail).lower()) from None


BodyFields = Annotated[dict[str, Any], Depends(read_body_fields)]


def get_content_type(scope: Scope) -> bytes:
    return next((value for name, value in scope["headers"] if name == b"content-type"), b"").lower()


def is_form(content_type: bytes) -> bool:
    return content_type.startswith((b"multipart/form-data", b"application/x-www-form-urlencoded"))


def get_max_body_bytes(scope: Scope, max_upload_bytes: int) -> tuple[int, str]:
    """Return how large a request's body may be, and the advice for a larger one. Only forms may contain files."""
    if is_form(get_content_type(scope)):
        return max_upload_bytes, ""
    takes_media = MEDIA_PATHS.fullmatch(scope["path"]) is not None
    return min(max_upload_bytes, MAX_MEDIA_JSON_BYTES if takes_media else MAX_JSON_BYTES), "; send files as a form"


async def read_json_body(request: Request) -> dict[str, Any]:
    data = await request.body()
    if len(data) <= MAX_INLINE_JSON_BYTES:
        return parse_json_object(data)
    return await anyio.to_thread.run_sync(parse_json_object, data)


def parse_json_object(data: bytes, field: str = "body") -> dict[str, Any]:
    """Return a JSON object; raise InvalidInput for anything else."""
    parsed = parse_json(data, field)
    if not isinstance(parsed, dict):
        raise InvalidInput(field, "it is not a JSON object")
    return parsed


def parse_json(data: bytes, field: str = "body") -> Any:
    """Return a JSON value; raise InvalidInput for NaN, Infinity, excessive nesting and too many values."""
    if sum(map(data.count, b",:[{")) > MAX_JSON_SEPARATORS:
        raise InvalidInput(field, "it has too many values; send fewer, or several requests")
    try:
        return json.loads(data, parse_constant=reject_constant)
    except (ValueError, RecursionError):
        raise InvalidInput(field, "it is not valid JSON") from None


class FormObject(RequestModel):
    """An object that a form may also contain as JSON in one field, as clients of vLLM-Omni send it."""

    @model_validator(mode="before")
    @classmethod
    def read_json_text(cls, fields: Any) -> Any:
        """Return the object in a text that begins like one, and everything else unchanged."""
        if not isinstance(fields, str) or not fields.lstrip().startswith("{"):
            return fields
        try:
            return parse_json_object(fields.encode(errors="replace"))
        except InvalidInput as error:
            raise ValueError(str(error).removeprefix(f"{error.field}: ")) from None


class JSONRequest(Request):
    """A request whose JSON is parsed like a BodyFields body: with limits, and not in the event loop if it is large."""

    async def json(self) -> Any:
        data = await self.body()
        try:
            if len(data) <= MAX_INLINE_JSON_BYTES:
                return parse_json(data)
            return await anyio.to_thread.run_sync(parse_json, data)
        except InvalidInput as error:
            raise BodyError(to_api_error(error)) from None


class ServiceRoute(APIRoute):
    """A route whose JSON body is read by JSONRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json_request(request: Request) -> Response:
            return await handle(JSONRequest(request.scope, request.receive))

        return handle_json_request


def reject_constant(name: str) -> float:
    """Refuse NaN and Infinity, which Python's parser accepts."""
    raise ValueError(name)


class FormFields(dict[str, Any]):
    """The fields of a form, in which an empty text may mean that a field is absent."""


def fields_from_form(form: FormData) -> FormFields:
    """Return a form's fields. A field that is given several times is a list.

    Raises InvalidInput for a field that is an object and something else.
    """
    values, lists, objects = dict[str, list[Any]](), set[str](), dict[str, dict[str, Any]]()
    for name, value in form.multi_items():
        match = FORM_FIELD_PATTERN.fullmatch(name)
        # No model has a field with a name of another form.
        field, subfield = (name, None) if match is None else (str(match[1]), match[2])
        entry: Any = {"upload": value} if isinstance(value, UploadFile) else value
        if subfield and not subfield.isdecimal():
            if subfield in objects.setdefault(field, {}):
                raise InvalidInput(f"{field}.{subfield}", "it is given more than once")
            objects[field][subfield] = entry
            continue
        values.setdefault(field, []).append(entry)
        if subfield is not None:
            lists.add(field)
    if ambiguous_fields := sorted(values.keys() & objects.keys()):
        field = ambiguous_fields[0]
        raise InvalidInput(field, f"it is given both as a value and as {field}[...]; give one of them")
    simple_fields = {
        field: entries if field in lists or len(entries) > 1 else entries[0] for field, entries in values.items()
    }
    return FormFields(simple_fields | objects)


# ---------------------------------------------------------------- checking


def validate_fields(model_class: type[Model], fields: Mapping[str, Any]) -> Model:
    """Return the fields as a model, ignoring those that it does not define.

    Raises an InvalidInput that names the first invalid field.
    """
    if isinstance(fields, FormFields):
        fields = drop_empty_inputs(model_class, fields)
    try:
        return model_class.model_validate(fields)
    except ValidationError as error:
        field, message = describe_errors(error.errors(), fields, model_class.model_fields)
        raise InvalidInput(field[:100] or "body", message) from None


def drop_empty_inputs(model_class: type[BaseModel], fields: FormFields) -> dict[str, Any]:
    """Return a form's fields without the empty ones that are no texts, such as a number that was not filled in."""
    definitions = model_class.model_fields
    return {
        name: value
        for name, value in fields.items()
        if value != "" or name not in definitions or takes_text(definitions[name].annotation)
    }


def takes_text(annotation: Any) -> bool:
    return annotation in (str, Any) or any(map(takes_text, get_args(annotation)))


def rename_error_field(error: InvalidInput, field: str) -> InvalidInput:
    """Return the same error under the name of the field that the client sent."""
    return type(error)(field, str(error).removeprefix(f"{error.field}: "))


# ---------------------------------------------------------------- documenting


def document_request_body(model_class: type[BaseModel], *file_fields: str, accepts_json: bool = True) -> dict[str, Any]:
    """Return a route's body for the OpenAPI document: as JSON if `accepts_json`, and as a form if `file_fields` exist.

    FastAPI cannot derive it, because the routes take the body as a dict (BodyFields).
    """
    schema = model_class.model_json_schema()
    schema = inline_definitions(schema, schema.pop("$defs", {}))
    content: dict[str, Any] = {"application/json": {"schema": schema}} if accepts_json else {}
    if file_fields:
        uploads = {name: {"type": "string", "format": "binary"} for name in file_fields}
        content["multipart/form-data"] = {"schema": schema | {"properties": schema["properties"] | uploads}}
    return {"requestBody": {"required": True, "content": content}}


def inline_definitions(schema: Any, definitions: dict[str, Any]) -> Any:
    """Replace references with what they refer to, because `$defs` cannot be reached from within the document."""
    if isinstance(schema, list):
        return [inline_definitions(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return inline_definitions(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: inline_definitions(item, definitions) for name, item in schema.items()}

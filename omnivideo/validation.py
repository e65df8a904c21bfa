"""Describe what pydantic refuses in words: the field as the client has sent it, and what is allowed.

Pydantic's own messages contain regular expressions and the names of types, and its paths the names of classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ErrorDetails = Any  # pydantic_core.ErrorDetails, which pydantic does not export
FieldPath = tuple[str | int, ...]
BOUNDS = ("ge", "gt", "le", "lt", "min_length", "max_length")
REQUIRED_KINDS = {
    "string": "give text", "int": "give a whole number", "float": "give a number", "finite": "give a finite number",
    "bool": "give true or false", "list": "give a list", "tuple": "give a list", "dict": "give an object",
    "model": "give an object", "is": "give a file", "json": "it is not valid JSON", "none": "leave it out",
}  # fmt: skip


def describe_errors(
    errors: Sequence[ErrorDetails], given: Any, fields: Mapping[str, FieldInfo] | None = None
) -> tuple[str, str]:
    """Return the path of the first invalid field in what was `given`, with dots, and what is wrong with it.

    `fields` are those of the model, from which the allowed range is read.
    """
    paths = [find_path(error, given) for error in errors]
    # Of a union, each member reports errors; the member that the client meant accepted the most of it, or its type.
    index = max(
        (index for index, path in enumerate(paths) if path[: len(paths[0])] == paths[0]),
        key=lambda index: (len(paths[index]), not errors[index]["type"].endswith("_type")),
    )
    path, error = paths[index], errors[index]
    # The bounds of a list are not those of its items.
    is_item = isinstance(error["loc"][-1], int)
    field = None if is_item else find_field(path, fields or {})
    return ".".join(map(str, path)), describe_error(error, field)


def find_path(error: ErrorDetails, given: Any) -> FieldPath:
    """Return the error's place in what was given, without the names of union members that pydantic adds."""
    path, value = list[str | int](), given
    for number, part in enumerate(error["loc"], start=1):
        is_key = isinstance(value, Mapping) and part in value
        is_index = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        is_missing_key = error["type"] == "missing" and number == len(error["loc"]) and isinstance(value, Mapping)
        if is_key or is_index:
            value = value[part]
        if is_key or is_index or is_missing_key:
            path.append(part)
    if not path:
        path += [part for part in error["loc"] if isinstance(part, str)][:1]
    return tuple(path)


def find_field(path: FieldPath, fields: Mapping[str, FieldInfo]) -> FieldInfo | None:
    """Return the definition of the field at a path."""
    field = None
    for name in path:
        if isinstance(name, str):
            field = fields.get(name)
            if field is None:
                return None
            models = list(find_models(field.annotation))
            fields = {name: field for model in models for name, field in model.model_fields.items()}
    return field


def find_models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from find_models(argument)


def describe_error(error: ErrorDetails, field: FieldInfo | None) -> str:
    """Return what is wrong with a value, and what is allowed, in words."""
    kind, context = error["type"], error.get("ctx", {})
    match kind:
        case "missing":
            return "it is required"
        case "value_error":
            return str(context["error"])
        case "literal_error":
            return f"allowed: {context['expected'].replace(' or ', ', ').replace(chr(39), '')}"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"its type is not known; allowed: {context.get('expected_tags', 'a type').replace(chr(39), '')}"
        case "string_pattern_mismatch":
            return f"give {field.description}" if field and field.description else "it has the wrong form"
        case "string_too_long" | "string_too_short" | "too_long" | "too_short":
            value = error["input"]
            if value == "":
                return "it is empty"
            unit = "characters" if isinstance(value, str) else "items"
            return f"it has {len(value)} {unit}; {describe_range(context, field)}"
        case "extra_forbidden":
            return "there is no such field"
    if kind.startswith(("greater", "less")):
        return describe_range(context, field)
    required = REQUIRED_KINDS.get(kind.split("_")[0], "it is not valid")
    is_number = kind.startswith(("int", "float", "finite"))
    bounds = describe_range(context, field) if is_number else ""
    return f"{required}; {bounds}" if bounds else required


def describe_range(context: Mapping[str, Any], field: FieldInfo | None) -> str:
    """Return the bounds of a number, or of a length, such as "allowed: 1 to 200"."""
    bounds = {name: context[name] for name in BOUNDS if name in context}
    for constraint in field.metadata if field else ():
        bounds |= {name: bound for name in BOUNDS if (bound := getattr(constraint, name, None)) is not None}
    lowest, highest = bounds.get("ge", bounds.get("min_length")), bounds.get("le", bounds.get("max_length"))
    if lowest is not None and highest is not None:
        return f"allowed: {lowest} to {highest}" if lowest != highest else f"allowed: {format_bound(lowest)}"
    words = {"at least": lowest, "above": bounds.get("gt"), "at most": highest, "below": bounds.get("lt")}
    parts = [f"{word} {format_bound(bound)}" for word, bound in words.items() if bound is not None]
    return f"allowed: {' and '.join(parts)}" if parts else ""


def format_bound(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def check_texts(value: Any) -> Any:
    """Return the value; raise ValueError if a text in it, at any depth, has characters that cannot be stored."""
    match value:
        case str():
            return check_characters(value)
        case list():
            return [check_texts(item) for item in value]
        case dict():
            return {check_texts(name): check_texts(item) for name, item in value.items()}
    return value


def check_characters(text: str) -> str:
    """Return the text; raise ValueError if it has a NUL or a lone surrogate, which cannot be stored or sent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        pass
    else:
        if "\0" not in text:
            return text
    raise ValueError("it contains invalid characters: NUL or a lone surrogate")

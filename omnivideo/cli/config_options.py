"""Command-line options generated from a configuration class, which defines names, types, ranges, help and panels."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from omnivideo.contracts import FrozenModel, invalid_input_from_validation

Config = TypeVar("Config", bound=FrozenModel)


def accept_config(config_class: type[Config]) -> Callable[[Callable[[Config], None]], Callable[..., None]]:
    """Turn a function of one configuration into a command with an argument or option for every field.

    A required field, or one without a panel, is an argument; the others are options.
    """

    def decorate(function: Callable[[Config], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**values: Any) -> None:
            try:
                config = config_class(**values)
            except ValidationError as error:
                raise invalid_input_from_validation(error, config_class.model_fields) from None
            function(config)

        parameters = [build_parameter(name, field) for name, field in config_class.model_fields.items()]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def build_parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Return a field as a parameter from which typer makes an argument or an option."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    bounds: dict[str, Any] = {"min": find_bound(field, "ge"), "max": find_bound(field, "le")}
    value_type, default = field.annotation, field.default
    if get_origin(value_type) is tuple:  # typer knows repeatable options as lists, of plain types only
        item_type = get_args(value_type)[0]
        value_type, default = list[int] if item_type is int else list[str], list(default)
    if extra:
        flags = [str(extra["flag"])] if extra.get("flag") else []
        info = typer.Option(*flags, help=field.description, rich_help_panel=str(extra["panel"]), **bounds)
    else:
        info = typer.Argument(help=field.description, **bounds)
    default = inspect.Parameter.empty if field.is_required() else default
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[value_type, info]
    )


def find_bound(field: FieldInfo, kind: str) -> float | None:
    """Return a field's lower ("ge") or upper ("le") bound, or None if it has none."""
    return next((getattr(item, kind) for item in field.metadata if hasattr(item, kind)), None)

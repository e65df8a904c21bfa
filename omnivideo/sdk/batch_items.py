"""The lines of a batch: their fields, their parsing, and the digest by which a request is recognised."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from omnivideo.contracts import get_generation_task, resolve_sampling_params
from omnivideo.errors import InvalidInput
from omnivideo.ports import TextLimits
from omnivideo.presets import Preset
from omnivideo.validation import check_texts, describe_errors

MAX_ID_BYTES = 200  # a file is named after the id, and file systems allow 255 bytes with the suffixes
MAX_LISTED_PROBLEMS = 20
Line = str | dict[str, Any]


def check_id(item_id: str) -> str:
    """Return an id; raise ValueError if a file cannot have this name."""
    if not (item_id[:1].isalnum() and item_id.isprintable() and "/" not in item_id and "\\" not in item_id):
        raise ValueError("it names a file: begin with a letter or a digit, and use no slash or line break")
    if len(item_id.encode()) > MAX_ID_BYTES:
        raise ValueError(f"it is longer than {MAX_ID_BYTES} bytes")
    return item_id


class BatchItem(BaseModel):
    """One line of a batch: a prompt, and the settings that differ from the preset's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, AfterValidator(check_id)]
    prompt: Annotated[str, BeforeValidator(check_texts)] = Field(min_length=1, max_length=4000)
    image: bool | None = None
    seed: int = Field(default=0, ge=-1)
    steps: int | None = None
    guidance_scale: float | None = None
    frames: int | None = None
    fps: float | None = None
    seconds: float | None = None
    width: int | None = None
    height: int | None = None
    negative_prompt: Annotated[str | None, BeforeValidator(check_texts)] = None

    def get_settings(self) -> dict[str, Any]:
        """Return what the line says besides its id, its prompt and the medium."""
        return self.model_dump(exclude={"id", "prompt", "image"})


def compute_digest(item: BatchItem, model: str = "") -> str:
    """Return the digest of all that a line requests, without its id, and of the model that generates it."""
    request = item.model_dump(exclude={"id"}, exclude_none=True) | {"model": model}
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def parse_items(
    lines: Iterable[Line], preset: Preset | None = None, text_limits: TextLimits | None = None
) -> list[BatchItem]:
    """Parse prompts, dicts and lines of JSON, which are numbered from 1; raise as `parse_numbered_lines` does."""
    return parse_numbered_lines(enumerate(lines, start=1), preset, text_limits)


def parse_text(text: str, preset: Preset | None = None, text_limits: TextLimits | None = None) -> list[BatchItem]:
    """Parse the lines of a file; empty lines are left out, but counted in the numbers of the others."""
    lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    return parse_numbered_lines(lines, preset, text_limits)


def parse_numbered_lines(
    lines: Iterable[tuple[int, Line]], preset: Preset | None = None, text_limits: TextLimits | None = None
) -> list[BatchItem]:
    """Parse lines with their numbers, and check the settings and texts where the preset and its limits are known.

    A line without an id gets one from its request, so that it keeps it wherever it stands. Raises an InvalidInput that
    names every wrong line with its number.
    """
    items, problems = list[BatchItem](), list[tuple[str, str]]()
    seen_ids, counts = set[str](), Counter[str]()
    for number, line in lines:
        try:
            item = parse_line(line, counts)
            check_item(item, preset, text_limits)
        except LineError as error:
            problems += [(f"line {number}{field}", message) for field, message in error.problems]
            continue
        if item.id in seen_ids:
            problems.append((f"line {number}", f"the id {item.id!r} is not unique"))
        seen_ids.add(item.id)
        items.append(item)
    if len(problems) == 1:
        raise InvalidInput(*problems[0])
    if problems:
        raise InvalidInput("prompts", "\n  ".join(list_problems(problems)))
    if not items:
        raise InvalidInput("prompts", "the batch is empty; give 1 prompt or more")
    return items


def list_problems(problems: list[tuple[str, str]]) -> Iterator[str]:
    yield f"{len(problems)} problems; nothing was generated"
    yield from (f"{place}: {message}" for place, message in problems[:MAX_LISTED_PROBLEMS])
    if len(problems) > MAX_LISTED_PROBLEMS:
        yield f"and {len(problems) - MAX_LISTED_PROBLEMS} more"


class LineError(Exception):
    """What is wrong with a line: pairs of a field, such as ", seed" or nothing, and a message."""

    def __init__(self, *problems: tuple[str, str]):
        super().__init__(problems)
        self.problems = problems


def parse_line(line: Line, counts: Counter[str]) -> BatchItem:
    """Parse a line; without an id it is named after its request, and repeated ones are numbered with `counts`."""
    values: Any = line
    if isinstance(line, str):
        try:
            values = json.loads(line) if line.lstrip().startswith("{") else {"prompt": line.strip()}
        except (ValueError, RecursionError):
            raise LineError(("", "it is not valid JSON")) from None
    try:
        item = BatchItem(**({"id": "unnamed"} | values))
    except ValidationError as error:
        fields = BatchItem.model_fields
        found = (describe_errors([details], values, fields) for details in error.errors())
        raise LineError(*((f", {field}", message) for field, message in found)) from None
    if "id" in values:
        return item
    name = compute_digest(item)[:12]
    counts[name] += 1
    return item.model_copy(update={"id": name if counts[name] == 1 else f"{name}-{counts[name]}"})


def check_item(item: BatchItem, preset: Preset | None, text_limits: TextLimits | None) -> None:
    """Raise LineError if the preset cannot generate what a line requests."""
    try:
        params = None
        if preset is not None:
            task = get_generation_task("image" if item.image or item.frames == 1 else "video")
            params = resolve_sampling_params(preset, task, **item.get_settings())
        if text_limits is not None:
            text_limits.check_prompt("prompt", item.prompt, params)
            text_limits.check_negative_prompt("negative_prompt", item.negative_prompt or "")
    except InvalidInput as error:
        raise LineError((f", {error.field}", str(error).removeprefix(f"{error.field}: "))) from None

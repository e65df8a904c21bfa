"""Batches of prompts: their parsing, and running them in this process with a file of results that can be resumed."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omnivideo.errors import InvalidInput, OmniVideoError

if TYPE_CHECKING:
    from omnivideo.sdk.result import Result

RESULTS_FILE = "results.jsonl"


class BatchItem(BaseModel):
    """One line of a batch: a prompt, and the settings that differ from the preset's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    prompt: str = Field(min_length=1, max_length=4000)
    image: bool | None = None
    seed: int = Field(default=0, ge=-1)
    steps: int | None = None
    guidance_scale: float | None = None
    frames: int | None = None
    fps: float | None = None
    seconds: float | None = None
    width: int | None = None
    height: int | None = None
    negative_prompt: str | None = None


class ClipGenerator(Protocol):
    """Generates the items of a batch, as a Studio does."""

    @property
    def generate(self) -> Callable[..., "Result"]: ...


@dataclass(frozen=True)
class BatchOutcome:
    """The file of an item's clip within the batch's folder, or the error; neither if it was done before."""

    id: str
    file: str | None
    error: str | None


def parse_items(lines: Iterable[str | dict[str, Any]]) -> list[BatchItem]:
    """Parse prompts, dicts and lines of JSON; raise an InvalidInput that names the line."""
    items, seen_ids = [], set()
    for line_number, line in enumerate(lines, start=1):
        item = parse_item(line, line_number)
        if item.id in seen_ids:
            raise InvalidInput(f"line {line_number}", f"the id {item.id!r} is not unique")
        seen_ids.add(item.id)
        items.append(item)
    if not items:
        raise InvalidInput("prompts", "the batch is empty; give 1 prompt or more")
    return items


def parse_item(line: str | dict[str, Any], line_number: int) -> BatchItem:
    values: Any = line
    if isinstance(line, str):
        try:
            values = json.loads(line) if line.lstrip().startswith("{") else {"prompt": line}
        except ValueError:
            raise InvalidInput(f"line {line_number}", "it is not valid JSON") from None
    try:
        return BatchItem(**({"id": f"{line_number:06d}"} | values))
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"line {line_number}, {'.'.join(map(str, first['loc']))}", first["msg"]) from None


def load_finished_ids(folder: Path) -> set[str]:
    """Return the ids of items whose result is in the results file and whose clip exists.

    Removes a last line that is incomplete because the process was killed while it wrote it.
    """
    path = folder / RESULTS_FILE
    if not path.exists():
        return set()
    text = path.read_text()
    complete_lines = text[: text.rfind("\n") + 1]
    if complete_lines != text:
        path.write_text(complete_lines)
    lines = [json.loads(line) for line in complete_lines.splitlines()]
    return {line["id"] for line in lines if line["file"] and (folder / line["file"]).exists()}


class BatchResults:
    """The folder of a batch with its results file, to which it appends a line for each outcome."""

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput("output", f"the folder cannot be created: {error.strerror}") from None
        self.finished_ids = load_finished_ids(folder)
        self.file = (folder / RESULTS_FILE).open("a")

    def __enter__(self) -> "BatchResults":
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def is_finished(self, item: BatchItem) -> bool:
        """Return whether an earlier run has generated the item."""
        return item.id in self.finished_ids

    def write(self, item: BatchItem, outcome: BatchOutcome) -> None:
        self.file.write(json.dumps(vars(outcome) | {"prompt": item.prompt}) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def run_batch(studio: ClipGenerator, items: list[BatchItem], folder: Path) -> Iterator[BatchOutcome]:
    """Generate the items that are not done and write a line for each to the results file.

    A failed item does not stop the others.
    """
    with BatchResults(folder) as results:
        for item in items:
            outcome = BatchOutcome(item.id, None, None)
            if not results.is_finished(item):
                outcome = generate_item(studio, item, folder)
                results.write(item, outcome)
            yield outcome


def generate_item(studio: ClipGenerator, item: BatchItem, folder: Path) -> BatchOutcome:
    overrides = item.model_dump(exclude={"id", "prompt", "image"})
    try:
        result = studio.generate(item.prompt, image=item.image, **overrides)
        name = f"{item.id}.{'mp4' if len(result.frames) > 1 else 'png'}"
        result.save(folder / name)
    except OmniVideoError as error:
        return BatchOutcome(item.id, None, str(error))
    return BatchOutcome(item.id, name, None)

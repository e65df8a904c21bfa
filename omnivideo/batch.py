"""Many prompts in a row, with a line of JSON for each result; what is left after a stop is taken up again."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omnivideo.errors import InvalidInput, OmniVideoError

RESULTS = "results.jsonl"


class Item(BaseModel):
    """One line of a batch: a prompt, and settings where they are not the preset's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    prompt: str = Field(min_length=1, max_length=4000)
    image: bool | None = None
    seed: int = Field(default=0, ge=0)
    steps: int | None = None
    guidance_scale: float | None = None
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Outcome:
    id: str
    file: str | None
    error: str | None


def items(lines: Iterable[str | dict[str, Any]]) -> list[Item]:
    """Prompts, objects, or lines of JSON as items; raises InvalidInput that names the line."""
    made, seen = [], set()
    for at, line in enumerate(lines, start=1):
        item = item_of(line, at)
        if item.id in seen:
            raise InvalidInput(f"line {at}", f"the id {item.id!r} is there twice")
        seen.add(item.id)
        made.append(item)
    if not made:
        raise InvalidInput("prompts", "there are none; give 1 or more")
    return made


def item_of(line: str | dict[str, Any], at: int) -> Item:
    values: Any = line
    if isinstance(line, str):
        try:
            values = json.loads(line) if line.lstrip().startswith("{") else {"prompt": line}
        except ValueError:
            raise InvalidInput(f"line {at}", "it is not JSON") from None
    try:
        return Item(**({"id": f"{at:06d}"} | values))
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"line {at}, {'.'.join(map(str, first['loc']))}", first["msg"]) from None


def finished(folder: Path) -> set[str]:
    """Ids whose result is in the file and whose clip is there; a last line that was cut is taken out."""
    path = folder / RESULTS
    if not path.exists():
        return set()
    text = path.read_text()
    kept = text[: text.rfind("\n") + 1]
    if kept != text:
        path.write_text(kept)
    lines = [json.loads(line) for line in kept.splitlines()]
    return {line["id"] for line in lines if line["file"] and (folder / line["file"]).exists()}


def run(studio: Any, wanted: list[Item], folder: Path) -> Iterator[Outcome]:
    """Draws what is left into `folder`, one result line each; a prompt that fails does not stop the others."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput("output", f"the folder cannot be made: {error.strerror}") from None
    done = finished(folder)
    with (folder / RESULTS).open("a") as results:
        for item in wanted:
            outcome = Outcome(item.id, None, None)
            if item.id not in done:
                outcome = draw_one(studio, item, folder)
                results.write(json.dumps(vars(outcome) | {"prompt": item.prompt}) + "\n")
                results.flush()
                os.fsync(results.fileno())
            yield outcome


def draw_one(studio: Any, item: Item, folder: Path) -> Outcome:
    given = item.model_dump(exclude={"id", "prompt", "image"})
    try:
        result = studio.generate(item.prompt, image=item.image, **given)
        name = f"{item.id}.{'mp4' if len(result.frames) > 1 else 'png'}"
        result.save(folder / name)
    except OmniVideoError as error:
        return Outcome(item.id, None, str(error))
    return Outcome(item.id, name, None)

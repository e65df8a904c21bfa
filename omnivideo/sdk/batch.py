"""Batches of prompts: their results in a folder, from which another run continues, and running them in this process."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from omnivideo.errors import InvalidInput, OmniVideoError
from omnivideo.sdk.batch_items import BatchItem, compute_digest

if TYPE_CHECKING:
    from omnivideo.contracts import ModelIdentity
    from omnivideo.sdk.result import Result

RESULTS_FILE = "results.jsonl"


class ClipGenerator(Protocol):
    """Generates the items of a batch, as a Studio does."""

    @property
    def model(self) -> "ModelIdentity": ...

    @property
    def generate(self) -> Callable[..., "Result"]: ...


@dataclass(frozen=True)
class BatchOutcome:
    """The file of an item's clip within the batch's folder, or the error; neither if it was done before."""

    id: str
    file: str | None
    error: str | None


class BatchFolder:
    """The folder of a batch's clips and its results.jsonl, which has one line for each item that was tried.

    A request is recognised by its digest: a line whose request has changed since is generated anew. `model` names
    what generates the clips.
    """

    def __init__(self, folder: Path, model: str = ""):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput("output", f"the folder cannot be created: {error.strerror}") from None
        self.folder = folder
        self.model = model
        self.path = folder / RESULTS_FILE
        self.lines = self.load_lines()

    def load_lines(self) -> dict[str, dict[str, Any]]:
        """Return the results by id; remove what a killed process has left incomplete."""
        if not self.path.exists():
            return {}
        text = self.path.read_text(encoding="utf-8")
        lines = [line for line in map(parse_result, text.split("\n")) if line]
        by_id = {line["id"]: line for line in lines}
        if text != "".join(map(format_result, by_id.values())):
            self.write_lines(by_id)
        return by_id

    def is_done(self, item: BatchItem) -> bool:
        """Return whether this request has a result whose file exists."""
        line = self.lines.get(item.id)
        if line is None or line.get("digest") != compute_digest(item, self.model):
            return False
        return bool(line["file"]) and (self.folder / line["file"]).exists()

    def record(self, item: BatchItem, outcome: BatchOutcome) -> None:
        """Write an outcome to the disk; it takes the place of an earlier one of this id."""
        line = vars(outcome) | {"prompt": item.prompt, "digest": compute_digest(item, self.model)}
        is_new = item.id not in self.lines
        self.lines[item.id] = line
        if not is_new:
            self.write_lines(self.lines)
            return
        with self.path.open("a", encoding="utf-8") as results:
            results.write(format_result(line))
            results.flush()
            os.fsync(results.fileno())

    def write_lines(self, lines: dict[str, dict[str, Any]]) -> None:
        partial = self.path.with_name(f".{RESULTS_FILE}.partial")
        with partial.open("w", encoding="utf-8") as results:
            results.writelines(map(format_result, lines.values()))
            results.flush()
            os.fsync(results.fileno())
        os.replace(partial, self.path)


def parse_result(text: str) -> dict[str, Any] | None:
    """Return a line of the results file, or None if it is incomplete."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and {"id", "file", "error"} <= line.keys() else None


def format_result(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def run_batch(studio: ClipGenerator, items: list[BatchItem], folder: Path) -> Iterator[BatchOutcome]:
    """Generate the items that are not done and record each in the results file.

    A failed item does not stop the others.
    """
    model = studio.model
    results = BatchFolder(folder, f"{model.preset}/{model.weights}/{model.precision}")
    for item in items:
        outcome = BatchOutcome(item.id, None, None)
        if not results.is_done(item):
            outcome = generate_item(studio, item, folder)
            results.record(item, outcome)
        yield outcome


def generate_item(studio: ClipGenerator, item: BatchItem, folder: Path) -> BatchOutcome:
    try:
        result = studio.generate(item.prompt, image=item.image, **item.get_settings())
        name = f"{item.id}.{'mp4' if len(result.frames) > 1 else 'png'}"
        result.save(folder / name)
    except OmniVideoError as error:
        return BatchOutcome(item.id, None, str(error))
    return BatchOutcome(item.id, name, None)

"""A journal of records that survive a kill: each is a JSON line, on disk before the next; a cut-off line is dropped."""

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """A file of records by key; a later record replaces an earlier one with the same key."""

    def __init__(self, path: Path):
        self.records: dict[str, dict[str, Any]] = {}
        if path.exists():
            text = path.read_text()
            complete_lines = text[: text.rfind("\n") + 1]
            for line in complete_lines.splitlines():
                record = json.loads(line)
                self.records[record["key"]] = record
            if complete_lines != text:
                os.truncate(path, len(complete_lines.encode()))
        self.file = path.open("a")

    def append_record(self, key: str, record: dict[str, Any]) -> dict[str, Any]:
        """Append a record and wait until it is on disk."""
        self.records[key] = record = {"key": key} | record
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        return record

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically."""
    partial_path = path.with_name(f".{path.name}.part")
    partial_path.write_text(text)
    os.replace(partial_path, path)

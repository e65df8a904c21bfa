"""Records that outlive a kill: one JSON line each, on the disk before the next begins; a cut line is made anew."""

import json
import os
from pathlib import Path


class Journal:
    """A file of records by key; of two with the same key the later one holds."""

    def __init__(self, path: Path):
        self.records: dict[str, dict] = {}
        if path.exists():
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]
            for line in whole.splitlines():
                record = json.loads(line)
                self.records[record["key"]] = record
            if whole != text:
                os.truncate(path, len(whole.encode()))
        self.file = path.open("a")

    def put(self, key: str, record: dict) -> dict:
        self.records[key] = record = {"key": key} | record
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        return record

    def close(self) -> None:
        self.file.close()


def write_whole(path: Path, text: str) -> None:
    """All of it or nothing."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)

"""Identify the weights of a folder by one digest of the contents of its files, without reading them at every start.

A large folder has a record of its digests, `.digests.json`: a file is only read again if its size, its modification
time or its inode has changed. The import writes the record. If the folder is read-only, the record is elsewhere.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from omnivideo.errors import CheckpointError

RECORD_FILE = ".digests.json"
RECORD_ABOVE_BYTES = 256 << 20  # smaller folders are read in less time than a record is worth
HASHING_THREADS = 4
FileStamp = tuple[int, int, int]  # size in bytes, modification time in ns, inode


@dataclass(frozen=True)
class FolderDigest:
    """The digest of a folder's weights, 16 hexadecimal digits, and the state of its files when it was computed."""

    folder: Path
    value: str
    stamps: Mapping[str, FileStamp]

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file has changed: manifests would name other weights than those loaded."""
        if stamp_files(self.folder) != self.stamps:
            raise CheckpointError(f"the weights folder {self.folder.name!r} changed while it was loaded; start again")


def compute_file_digest(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compute_folder_digest(folder: Path, record_folder: Path | None = None) -> FolderDigest:
    """Return the digest of all weights files as they are now, whatever the folder's index says.

    `record_folder` gets the record if the weights folder cannot be written to.
    """
    stamps = stamp_files(folder)
    records = [folder / RECORD_FILE]
    if record_folder is not None:
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        records.append(record_folder / "digests" / f"{name}.json")
    known: dict[str, str] = {}
    for record in records:
        known |= read_record(record, stamps)
    unknown = [file for file in stamps if file not in known]
    try:
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            known |= dict(zip(unknown, pool.map(lambda file: compute_file_digest(folder / file), unknown), strict=True))
    except OSError as error:
        text = f"the weights folder {folder.name!r} cannot be read: {error.strerror or error}"
        raise CheckpointError(text) from None
    if unknown and not write_record(records[0], stamps, known) and record_folder is not None:
        write_record(records[1], stamps, known)
    return FolderDigest(folder, combine_digests(known), stamps)


def combine_digests(digests: Mapping[str, str]) -> str:
    """Return one digest for the digests of all files."""
    return hashlib.sha256(json.dumps(dict(digests), sort_keys=True).encode()).hexdigest()[:16]


def record_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the record of a folder whose digests were computed while its files were written."""
    write_record(folder / RECORD_FILE, stamp_files(folder), digests)


def stamp_files(folder: Path) -> dict[str, FileStamp]:
    """Return the state of each weights file, by its path in the folder; a link stands for its target."""
    stamps = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with suppress(OSError):  # a broken link; loading names it
            stat = path.stat()
            stamps[path.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return stamps


def read_record(record: Path, stamps: Mapping[str, FileStamp]) -> dict[str, str]:
    """Return the recorded digests of the files that have not changed since."""
    try:
        entries = json.loads(record.read_text())
        return {file: str(entries[file][3]) for file, stamp in stamps.items()
                if file in entries and tuple(entries[file][:3]) == stamp}  # fmt: skip
    except (OSError, ValueError, TypeError, LookupError):
        return {}


def write_record(record: Path, stamps: Mapping[str, FileStamp], digests: Mapping[str, str]) -> bool:
    """Write the record in one piece and return True; return False if it cannot be written."""
    if sum(size for size, _, _ in stamps.values()) < RECORD_ABOVE_BYTES:
        return True
    partial = record.with_name(f"{record.name}.{os.getpid()}.partial")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({file: [*stamps[file], digests[file]] for file in stamps if file in digests}))
        partial.replace(record)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        return False
    return True

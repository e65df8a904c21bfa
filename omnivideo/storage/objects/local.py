"""The object store in a folder: content-addressed files, written whole or not at all."""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from omnivideo.errors import ArtifactNotFound, StoreError

KEY_PATTERN = re.compile(r"[0-9a-f]{64}\.[a-z0-9]{1,16}")
DAY_SECONDS = 86_400.0


def compute_object_key(data: bytes, suffix: str) -> str:
    return f"{hashlib.sha256(data).hexdigest()}.{suffix}"


class LocalObjectStore:
    """`<folder>/ab/abcd….mp4`.  Several processes may share it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path_for_key(self, key: str) -> Path:
        """The file of a key, there or not; raises NotStored for what is no key (never a path out of the folder)."""
        if not KEY_PATTERN.fullmatch(key):
            raise ArtifactNotFound(
                "store: that is no artifact key; a key is 64 hexadecimal digits, a dot and a file type"
            )
        return self.folder / key[:2] / key

    def put(self, data: bytes, suffix: str) -> str:
        key = compute_object_key(data, suffix)
        path = self.path_for_key(key)
        try:
            with suppress(FileNotFoundError):
                os.utime(path)  # young again, so that a sweep that runs now leaves it
                return key
            self.write_atomically(path, data)
        except OSError as error:
            raise StoreError(f"store: nothing was kept: {error.strerror or 'the folder cannot be written'}") from error
        return key

    def write_atomically(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{secrets.token_hex(8)}.part")
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def get(self, key: str) -> bytes:
        try:
            return self.path_for_key(key).read_bytes()
        except FileNotFoundError:
            raise ArtifactNotFound(f"store: there is no artifact {key}") from None
        except OSError as error:
            raise StoreError(f"store: {key} cannot be read: {error.strerror}") from error

    def has(self, key: str) -> bool:
        return self.path_for_key(key).exists()

    def iter_keys(self) -> Iterator[str]:
        for path in sorted(self.folder.glob("??/*")):
            if KEY_PATTERN.fullmatch(path.name):
                yield path.name

    def sweep(self, referenced_keys: Collection[str], lifetime_seconds: float = 7 * DAY_SECONDS) -> list[str]:
        """Removes what nothing refers to and nobody has put for `lifetime` seconds; returns the removed keys.

        Parts that a killed process left are removed by the same age.
        """
        now, gone = time.time(), []
        for path in sorted(self.folder.glob("??/*")):
            with suppress(FileNotFoundError):
                if path.name in referenced_keys or now - path.stat().st_mtime < lifetime_seconds:
                    continue
            if self.remove_if_stale(path, now - lifetime_seconds):
                gone += [path.name] if KEY_PATTERN.fullmatch(path.name) else []
        return gone

    def remove_if_stale(self, path: Path, modified_before: float) -> bool:
        """Takes an old file away.  It is moved aside first: a put that made it young in the meantime gets it back."""
        aside = path.with_name(f".{secrets.token_hex(8)}.old")
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return False
        if aside.stat().st_mtime >= modified_before:
            os.rename(aside, path)
            return False
        aside.unlink()
        return True

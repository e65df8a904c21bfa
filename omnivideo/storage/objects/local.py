"""Store objects as files in a folder, named by their digest and written atomically."""

import hashlib
import io
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from omnivideo.errors import ArtifactNotFound, StoreError

KEY_PATTERN = re.compile(r"[0-9a-f]{64}\.[a-z0-9]{1,16}")
DAY_SECONDS = 86_400.0
PROBE_BYTES = 2**16  # written to find out whether the disk has room
COPY_BYTES = 2**20  # read and written at a time


def compute_object_key(data: bytes, suffix: str) -> str:
    """Return `<sha256 of the bytes>.<suffix>`."""
    return f"{hashlib.sha256(data).hexdigest()}.{suffix}"


def compute_file_key(file: BinaryIO, suffix: str) -> str:
    """Return the key of a file without reading all of it into memory."""
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(COPY_BYTES):
        digest.update(chunk)
    return f"{digest.hexdigest()}.{suffix}"


def ignore_key(key: str) -> None:
    """Do nothing with the key of an object that is about to be written."""


class LocalObjectStore:
    """A store in a folder, as `<folder>/ab/abcd….mp4`. Several processes may share it.

    `announce` is called with the key of each object before it is written.
    """

    def __init__(self, folder: Path, announce: Callable[[str], None] = ignore_key):
        self.folder, self.announce = folder, announce

    def path_for_key(self, key: str) -> Path:
        """Return the file of a key, whether or not it exists.

        Raises ArtifactNotFound for anything but a key, so that no path leads out of the folder.
        """
        if not KEY_PATTERN.fullmatch(key):
            raise ArtifactNotFound(
                "store: that is not an artifact key; a key is 64 hexadecimal digits, a dot and a file type"
            )
        return self.folder / key[:2] / key

    def put(self, data: bytes, suffix: str) -> str:
        return self.put_stream(io.BytesIO(data), suffix)

    def put_stream(self, file: BinaryIO, suffix: str) -> str:
        """Store a file with only a part of it in memory. The file must not change meanwhile."""
        key = compute_file_key(file, suffix)
        path = self.path_for_key(key)
        self.announce(key)
        try:
            with suppress(FileNotFoundError):
                os.utime(path)  # a concurrent sweep must not remove it
                return key
            file.seek(0)
            self.write_atomically(path, file)
        except OSError as error:
            raise StoreError(
                f"store: the file was not written: {error.strerror or 'the folder cannot be written'}"
            ) from error
        return key

    def write_atomically(self, path: Path, source: BinaryIO) -> None:
        """Write a file that either exists with all its bytes or does not exist, even after a crash."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{secrets.token_hex(8)}.part")
        try:
            with part.open("wb") as file:
                shutil.copyfileobj(source, file, COPY_BYTES)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Raise StoreError if nothing can be written, for example because the disk is full."""
        path = self.folder / f".{secrets.token_hex(8)}.part"
        try:
            self.write_atomically(path, io.BytesIO(bytes(PROBE_BYTES)))
        except OSError as error:
            raise StoreError(f"store: it cannot be written: {error.strerror or 'the folder is missing'}") from error
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def get(self, key: str) -> bytes:
        with self.translate_errors(key):
            return self.path_for_key(key).read_bytes()

    def read_range(self, key: str, first_byte: int, last_byte: int) -> bytes:
        """Return the bytes from `first_byte` to `last_byte`, both included, or fewer if the file ends before."""
        with self.translate_errors(key), self.path_for_key(key).open("rb") as file:
            file.seek(first_byte)
            return file.read(last_byte - first_byte + 1)

    def get_size(self, key: str) -> int:
        with self.translate_errors(key):
            return self.path_for_key(key).stat().st_size

    def has(self, key: str) -> bool:
        return self.path_for_key(key).exists()

    def delete(self, key: str) -> None:
        with suppress(ArtifactNotFound), self.translate_errors(key):
            self.path_for_key(key).unlink()

    @contextmanager
    def translate_errors(self, key: str) -> Iterator[None]:
        """Raise the errors of the file system as our own."""
        try:
            yield
        except FileNotFoundError:
            raise ArtifactNotFound("store: there is no such artifact; it may have expired") from None
        except OSError as error:
            raise StoreError(f"store: {key} cannot be read: {error.strerror}") from error

    def iter_keys(self) -> Iterator[str]:
        for path in sorted(self.folder.glob("??/*")):
            if KEY_PATTERN.fullmatch(path.name):
                yield path.name

    def sweep(
        self,
        referenced_keys: Collection[str],
        lifetime_seconds: float = 7 * DAY_SECONDS,
        candidates: Collection[str] | None = None,
    ) -> list[str]:
        """Remove the unreferenced files that were not written within `lifetime_seconds`. Return their keys.

        If `candidates` is given, only these are removed. Otherwise incomplete files of killed processes are removed at
        the same age.
        """
        now, removed_keys = time.time(), list[str]()
        paths = self.folder.glob("??/*") if candidates is None else map(self.path_for_key, candidates)
        for path in sorted(paths):
            with suppress(FileNotFoundError):
                if path.name in referenced_keys or now - path.stat().st_mtime < lifetime_seconds:
                    continue
            if self.remove_if_stale(path, now - lifetime_seconds):
                removed_keys += [path.name] if KEY_PATTERN.fullmatch(path.name) else []
        return removed_keys

    def remove_if_stale(self, path: Path, modified_before: float) -> bool:
        """Remove a file unless it was written again in the meantime. Return whether it was removed.

        The file is moved first, so that its age can be checked while no `put` can change it.
        """
        moved_path = path.with_name(f".{secrets.token_hex(8)}.old")
        try:
            os.rename(path, moved_path)
        except FileNotFoundError:
            return False
        if moved_path.stat().st_mtime >= modified_before:
            os.rename(moved_path, path)
            return False
        moved_path.unlink()
        return True

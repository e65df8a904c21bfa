"""Storage of shards: a folder, or a bucket on an S3 server (`s3://bucket/prefix`, with the service's settings)."""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from urllib3.exceptions import ProtocolError, TimeoutError

from omnivideo.errors import ArtifactNotFound, InvalidInput, MissingDependency
from omnivideo.settings import load_settings

if TYPE_CHECKING:
    from minio import Minio


class FileStore(Protocol):
    """Files by name, read completely, by range, or as a stream."""

    def list_names(self, suffix: str) -> list[str]: ...
    def get_size(self, name: str) -> int: ...
    def read_range(self, name: str, offset: int = 0, length: int = 0) -> bytes: ...
    def open(self, name: str) -> AbstractContextManager[IO[bytes]]: ...
    def put_file(self, path: Path) -> None: ...


def open_file_store(location: str | Path) -> FileStore:
    """Return the store of a folder or of `s3://bucket/prefix`."""
    if not str(location).startswith("s3://"):
        return LocalFileStore(Path(location))
    bucket, _, prefix = str(location).removeprefix("s3://").partition("/")
    return S3FileStore(bucket, prefix)


class LocalFileStore:
    """Files in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def list_names(self, suffix: str) -> list[str]:
        if not self.folder.is_dir():
            raise InvalidInput("shards", f"the folder {self.folder.name!r} does not exist; allowed: a folder of shards")
        return sorted(path.name for path in self.folder.glob(f"*{suffix}"))

    def get_size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def read_range(self, name: str, offset: int = 0, length: int = 0) -> bytes:
        """Return `length` bytes from `offset`, or all if `length` is 0; raise ArtifactNotFound for a missing file."""
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(offset)
                return file.read(length or -1)
        except FileNotFoundError:
            raise ArtifactNotFound(f"shards: {name} does not exist") from None

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        with (self.folder / name).open("rb") as file:
            yield file

    def put_file(self, path: Path) -> None:
        """Move a file into the folder atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{path.name}.partial"
        shutil.move(path, partial)
        partial.rename(self.folder / path.name)


class S3FileStore:
    """Objects under a prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str):
        try:
            from omnivideo.storage.objects.s3_client import create_s3_client, translate_errors
        except ImportError:
            raise MissingDependency("shards on S3 need the S3 client: pip install 'minio>=7.2.20,<8'") from None
        settings = load_settings()
        if not (settings.s3 and bucket):
            raise InvalidInput(
                "shards",
                "s3://bucket/prefix needs OMNIVIDEO_S3, OMNIVIDEO_S3_ACCESS_KEY and OMNIVIDEO_S3_SECRET_KEY",
            )
        self.connect = lambda: create_s3_client(
            settings.s3, settings.s3_access_key, settings.s3_secret_key, settings.s3_region
        )
        self.clients_by_pid: dict[int, Minio] = {}
        self.translate_errors = lambda name="": translate_errors(settings.s3, name)
        self.bucket, self.prefix = bucket, f"{prefix.strip('/')}/".lstrip("/")

    @property
    def client(self) -> "Minio":
        """Return this process's client; a forked prefetch worker must not share its parent's connections."""
        if os.getpid() not in self.clients_by_pid:
            self.clients_by_pid[os.getpid()] = self.connect()
        return self.clients_by_pid[os.getpid()]

    def list_names(self, suffix: str) -> list[str]:
        with self.translate_errors():
            objects = self.client.list_objects(self.bucket, self.prefix)
            names = [(item.object_name or "").removeprefix(self.prefix) for item in objects]
        return sorted(name for name in names if name.endswith(suffix))

    def get_size(self, name: str) -> int:
        with self.translate_errors(name):
            return self.client.stat_object(self.bucket, self.prefix + name).size or 0

    def read_range(self, name: str, offset: int = 0, length: int = 0) -> bytes:
        remaining_tries = 2  # the pool retries requests, but not after the first byte of a response
        while True:
            remaining_tries -= 1
            with self.open(name, offset, length) as response:
                try:
                    return bytes(response.read())
                except (ProtocolError, TimeoutError):
                    if not remaining_tries:
                        raise

    @contextmanager
    def open(self, name: str, offset: int = 0, length: int = 0) -> Iterator[IO[bytes]]:
        with self.translate_errors(name):
            response = self.client.get_object(self.bucket, self.prefix + name, offset, length)
            try:
                yield response  # type: ignore[misc]
            finally:
                response.close()
                response.release_conn()

    def put_file(self, path: Path) -> None:
        with self.translate_errors(path.name):
            if not self.client.bucket_exists(self.bucket):
                self.client.make_bucket(self.bucket)
            self.client.fput_object(self.bucket, self.prefix + path.name, str(path))

"""Store objects on an S3 server (MinIO, Garage, SeaweedFS, RustFS, AWS and others).

S3 has no "delete unless it was written again". A sweep and a put of the same bytes therefore coordinate by a mark:
  sweep  writes a mark for the shard (`ab`), lists the ages of its objects, deletes the old ones, removes the mark
  put    uploads the object, waits until the shard has no mark, and checks that the object exists
If a put sees no mark, it has uploaded before any later sweep lists the shard, and that sweep finds the object young.
An earlier sweep has ended; if it deleted the object, the put notices and uploads it again. This relies on S3's strong
consistency (since 2020): a listing shows every write that has ended. A mark expires after MARK_LIFETIME, which is
longer than the slowest delete that follows it.
"""

import io
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from minio.commonconfig import ENABLED, Filter
from minio.deleteobjects import DeleteObject
from minio.error import MinioException
from minio.lifecycleconfig import AbortIncompleteMultipartUpload, Expiration, LifecycleConfig, Rule
from opentelemetry import trace
from urllib3.exceptions import ProtocolError, TimeoutError

from omnivideo.errors import ArtifactNotFound, InvalidInput, StoreError
from omnivideo.storage.objects.local import (
    DAY_SECONDS,
    KEY_PATTERN,
    compute_file_key,
    compute_object_key,
    ignore_key,
)
from omnivideo.storage.objects.s3_client import create_s3_client, get_error_code, translate_errors

TRACER = trace.get_tracer("omnivideo.store")
PART_SIZE_BYTES = 16 << 20  # held in memory at a time; S3 allows 10,000 parts, so 160 GB
PROBE_BYTES = 16 << 10  # servers keep smaller objects with their metadata, which may be on another disk
MARK_LIFETIME = timedelta(seconds=90)
DELETE_DEADLINE_SECONDS = 20.0  # after the mark; with the slowest delete (51 s) it stays below MARK_LIFETIME
MAX_DELETES_PER_REQUEST = 1000  # S3's limit
LIFECYCLE_RULE_ID = "omnivideo-lifetime"
NO_LIFECYCLE_MESSAGE = "it does not support lifecycle rules; use the sweep"
CONTENT_TYPES = {"mp4": "video/mp4", "webm": "video/webm", "png": "image/png", "jpg": "image/jpeg", "gif": "image/gif",
         "webp": "image/webp", "json": "application/json", "jsonl": "application/jsonl"}  # fmt: skip


class S3ObjectStore:
    """A store in a bucket, as `<prefix>/ab/abcd….mp4`. The first put creates the bucket.

    Threads may share a store; forked processes may not. `public_address` is the server's address in download links.
    `announce` is called with the key of each object before it is written.
    """

    def __init__(
        self, address: str, bucket: str, access_key: str, secret_key: str,
        region: str = "us-east-1", prefix: str = "", public_address: str = "",
        announce: Callable[[str], None] = ignore_key,
    ):  # fmt: skip
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
            raise InvalidInput("S3 bucket", "3 to 63 lowercase letters, digits, dots and hyphens")
        self.client = create_s3_client(address, access_key, secret_key, region)
        self.public_client = create_s3_client(public_address or address, access_key, secret_key, region)
        self.translate_errors, self.announce = partial(translate_errors, address), announce
        self.bucket, self.region, self.prefix = bucket, region, f"{prefix.strip('/')}/".lstrip("/")

    def object_name(self, key: str) -> str:
        if not KEY_PATTERN.fullmatch(key):
            raise ArtifactNotFound(
                "store: that is not an artifact key; a key is 64 hexadecimal digits, a dot and a file type"
            )
        return f"{self.prefix}{key[:2]}/{key}"

    def put(self, data: bytes, suffix: str) -> str:
        return self.upload_until_present(compute_object_key(data, suffix), io.BytesIO(data), len(data))

    def put_file(self, path: Path, suffix: str) -> str:
        """Store a file with no more than two parts of it in memory. The file must not change meanwhile."""
        try:
            with path.open("rb") as file:
                return self.put_stream(file, suffix)
        except OSError as error:
            raise StoreError(f"store: {path.name} cannot be read: {error.strerror or 'it was cut short'}") from None

    def put_stream(self, file: BinaryIO, suffix: str) -> str:
        """Store a file with no more than two parts of it in memory. The file must not change meanwhile."""
        key = compute_file_key(file, suffix)
        return self.upload_until_present(key, file, file.tell())

    def upload_until_present(self, key: str, file: BinaryIO, size_bytes: int) -> str:
        """Upload an object until no sweep has deleted it. Raises StoreError after five attempts."""
        self.announce(key)
        for _ in range(5):
            try:
                self.upload_object(key, file, size_bytes)
            except ArtifactNotFound:
                self.ensure_bucket()
                self.upload_object(key, file, size_bytes)
            while any(self.is_mark_active(mark) for mark, _ in self.list_objects(f".sweep/{key[:2]}-")):
                time.sleep(0.05)
            if self.has(key):
                return key
        raise StoreError(f"store: sweeps remove {key} as fast as it is written: their lifetime is too short")

    def upload_object(self, key: str, file: BinaryIO, size_bytes: int) -> None:
        file.seek(0)
        where, kind = self.object_name(key), CONTENT_TYPES.get(key.rpartition(".")[2], "application/octet-stream")
        with TRACER.start_as_current_span("store put", attributes={"key": key}), self.translate_errors(key):
            self.client.put_object(
                self.bucket, where, file, size_bytes, kind, part_size=PART_SIZE_BYTES, num_parallel_uploads=1
            )

    def ensure_bucket(self) -> None:
        with self.translate_errors():
            try:
                self.client.make_bucket(self.bucket, self.region)
            except MinioException as error:
                if get_error_code(error) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

    def check_writable(self) -> None:
        """Raise StoreError if nothing can be written to the bucket, which is created if it does not exist."""
        name, data = f"{self.prefix}.ready/{secrets.token_hex(8)}", secrets.token_bytes(PROBE_BYTES)
        with self.translate_errors():
            try:
                self.client.put_object(self.bucket, name, io.BytesIO(data), len(data))
            except MinioException as error:
                if get_error_code(error) != "NoSuchBucket":
                    raise
                self.ensure_bucket()
                self.client.put_object(self.bucket, name, io.BytesIO(data), len(data))
            self.client.remove_object(self.bucket, name)

    def get(self, key: str) -> bytes:
        """Return an object. Raises StoreError if the server sends other bytes than were stored, twice."""
        for _ in range(2):
            data = self.read_object(key, 0, 0)
            if compute_object_key(data, key.rpartition(".")[2]) == key:
                return data
        raise StoreError(f"store: the S3 server sends other bytes for {key} than were stored")

    def read_range(self, key: str, first_byte: int, last_byte: int) -> bytes:
        """Return the bytes from `first_byte` to `last_byte`, both included, or fewer if the object ends before."""
        if not 0 <= first_byte <= last_byte:
            raise InvalidInput("range", "0 <= first <= last")
        return self.read_object(key, first_byte, last_byte - first_byte + 1)

    def read_object(self, key: str, offset: int, length: int) -> bytes:
        # The connection pool retries requests, but not once it has received a part of the body.
        name, attempts_left = self.object_name(key), 2
        while True:
            attempts_left -= 1
            span = TRACER.start_as_current_span("store get", attributes={"key": key})
            request = partial(self.client.get_object, self.bucket, name, offset, length)
            with span, self.translate_errors(key), request() as response:
                try:
                    return bytes(response.read())
                except (ProtocolError, TimeoutError):
                    if not attempts_left:
                        raise

    def get_size(self, key: str) -> int:
        name = self.object_name(key)
        with self.translate_errors(key):
            return self.client.stat_object(self.bucket, name).size or 0

    def has(self, key: str) -> bool:
        name = self.object_name(key)
        with suppress(ArtifactNotFound), self.translate_errors():
            return bool(self.client.stat_object(self.bucket, name))
        return False

    def delete(self, key: str) -> None:
        name = self.object_name(key)
        with suppress(ArtifactNotFound), self.translate_errors(key):
            self.client.remove_object(self.bucket, name)

    def presign_url(self, key: str, expires_in_seconds: int) -> str:
        """Return a link that anybody can download the object from until it expires.

        No request is sent to the server, so the link to a missing object answers 404.
        """
        if not 1 <= expires_in_seconds <= 7 * DAY_SECONDS:
            raise InvalidInput("seconds", "1 to 604800 (7 days)")
        return self.public_client.presigned_get_object(
            self.bucket, self.object_name(key), timedelta(seconds=expires_in_seconds)
        )

    def list_objects(self, subfolder: str = "") -> Iterator[tuple[str, datetime]]:
        with suppress(ArtifactNotFound), self.translate_errors():
            for item in self.client.list_objects(self.bucket, self.prefix + subfolder, recursive=True):
                if item.object_name and item.last_modified:
                    yield item.object_name, item.last_modified

    def list_keys_with_times(self, subfolder: str = "") -> Iterator[tuple[str, datetime]]:
        for name, written_at in self.list_objects(subfolder):
            key = name.rpartition("/")[2]
            if KEY_PATTERN.fullmatch(key) and name == self.object_name(key):
                yield key, written_at

    def iter_keys(self) -> Iterator[str]:
        return (key for key, _ in self.list_keys_with_times())

    def sweep(
        self,
        referenced_keys: Collection[str],
        lifetime_seconds: float = 7 * DAY_SECONDS,
        candidates: Collection[str] | None = None,
    ) -> list[str]:
        """Remove the unreferenced objects that were not written within `lifetime_seconds`. Return their keys.

        If `candidates` is given, only these are removed. Ages are by the server's clock. The lifetime must exceed the
        longest upload, whose age counts from its start, and the time from a put to the first reference. Leftovers of
        killed processes are removed after a day.
        """
        all_removed_keys, min_age = list[str](), timedelta(seconds=lifetime_seconds)
        keys = self.iter_keys() if candidates is None else candidates
        for shard in sorted({key[:2] for key in keys if key not in referenced_keys}):
            removed_keys: list[str] | None = None
            while removed_keys is None or len(removed_keys) == MAX_DELETES_PER_REQUEST:
                removed_keys = self.sweep_shard_once(shard, referenced_keys, min_age, candidates)
                all_removed_keys += removed_keys
        if candidates is not None:
            return all_removed_keys
        yesterday = datetime.now(UTC) - timedelta(seconds=DAY_SECONDS)
        self.remove_objects([mark for mark, written_at in self.list_objects(".sweep/") if written_at < yesterday])
        self.abort_stale_uploads(max(lifetime_seconds, DAY_SECONDS))
        return all_removed_keys

    def sweep_shard_once(
        self, shard: str, referred: Collection[str], min_age: timedelta, candidates: Collection[str] | None = None
    ) -> list[str]:
        """Delete up to MAX_DELETES_PER_REQUEST old objects of a shard under a mark, and return their keys."""
        mark, started_at = f"{self.prefix}.sweep/{shard}-{secrets.token_hex(8)}", time.monotonic()
        with self.translate_errors():
            self.client.put_object(self.bucket, mark, io.BytesIO(), 0)
        now = dict(self.list_objects(f".sweep/{shard}-")).get(mark)  # None if a put may not see the mark either
        old = [
            key
            for key, written_at in self.list_keys_with_times(f"{shard}/")
            if now and key not in referred and now - written_at >= min_age and (not candidates or key in candidates)
        ]
        is_late = time.monotonic() - started_at > DELETE_DEADLINE_SECONDS
        old = [] if is_late else old[:MAX_DELETES_PER_REQUEST]
        self.remove_objects([self.object_name(key) for key in old])
        # Not reached if a delete failed: the server may still execute it, so the mark stays until it expires.
        self.remove_objects([mark])
        return old

    def is_mark_active(self, mark: str) -> bool:
        with suppress(ArtifactNotFound), self.translate_errors():
            head = self.client.stat_object(self.bucket, mark)
            now = parsedate_to_datetime(cast(dict[str, str], head.metadata)["date"])  # by the clock of last_modified
            return now - cast(datetime, head.last_modified) < MARK_LIFETIME
        return False

    def remove_objects(self, names: list[str]) -> None:
        with self.translate_errors():
            for error in self.client.remove_objects(self.bucket, [DeleteObject(name) for name in names]):
                raise StoreError(f"store: {error.name or 'an artifact'} cannot be removed: {error.code}")

    def abort_stale_uploads(self, min_age_seconds: float = DAY_SECONDS) -> int:
        """Abort up to 1,000 multipart uploads that began `min_age_seconds` ago or earlier. Return their number."""
        before = datetime.now(UTC) - timedelta(seconds=min_age_seconds)
        stale_uploads = []
        with suppress(ArtifactNotFound), self.translate_errors():
            # The client has no public methods for this; tests/storage/test_objects_lifecycle.py checks these two.
            page = self.client._list_multipart_uploads(self.bucket, prefix=self.prefix)
            stale_uploads = [
                upload for upload in page.uploads if upload.initiated_time and upload.initiated_time <= before
            ]
            for upload in stale_uploads:
                self.client._abort_multipart_upload(self.bucket, upload.object_name, cast(str, upload.upload_id))
        return len(stale_uploads)

    def set_lifecycle_expiration(self, days: int) -> None:
        """Let the server remove every object older than `days`, whether it is referenced or not.

        The bucket's other rules do not change. Raises StoreError if the server supports no such rules.
        """
        if not 1 <= days <= 36_500:
            raise InvalidInput("days", "1 to 36500")
        unfinished = AbortIncompleteMultipartUpload(days_after_initiation=1)
        ours = Rule(ENABLED, Filter(prefix=self.prefix), LIFECYCLE_RULE_ID, unfinished, Expiration(days=days))
        self.ensure_bucket()
        with self.translate_errors(fallback_message=NO_LIFECYCLE_MESSAGE):
            lifecycle = self.client.get_bucket_lifecycle(self.bucket)
            others = [rule for rule in (lifecycle.rules if lifecycle else []) if rule.rule_id != LIFECYCLE_RULE_ID]
            self.client.set_bucket_lifecycle(self.bucket, LifecycleConfig([*others, ours]))
            lifecycle = self.client.get_bucket_lifecycle(self.bucket)  # some servers accept a rule without storing it
            if LIFECYCLE_RULE_ID not in [rule.rule_id for rule in (lifecycle.rules if lifecycle else [])]:
                raise StoreError(f"store: the S3 server: {NO_LIFECYCLE_MESSAGE}")

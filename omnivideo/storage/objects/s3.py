"""The object store on an S3 server (MinIO, Garage, SeaweedFS, RustFS, AWS ...): keys and sweep as in a folder.

S3 cannot delete "only if nobody has put it again", so put and sweep raise a flag each before they look:
  sweep  marks a shard (`ab`), then reads its ages, deletes what is old, and takes the mark away
  put    uploads, which makes young, then waits until the shard has no mark, then asks whether the object is there
A put that sees no mark has uploaded before any later sweep looks, and that one finds it young; an earlier sweep is
over, and what it took is missed and uploaded again.  This needs what S3 promises since 2020: a listing shows every
write that has ended.  A mark is void after MARK_LIVES seconds, more than the slowest delete after it can take.
"""

import hashlib
import io
import re
import secrets
import time
from collections.abc import Collection, Iterator
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
from urllib3.exceptions import ProtocolError, TimeoutError

from omnivideo.errors import ArtifactNotFound, InvalidInput, StoreError
from omnivideo.storage.objects.local import DAY_SECONDS, KEY_PATTERN, compute_object_key
from omnivideo.storage.objects.s3_client import create_s3_client, get_error_code, translate_errors

PART_SIZE_BYTES = 16 << 20  # bytes of an upload held at a time; S3 takes 10,000 parts, 160 GB
MARK_LIFETIME = timedelta(seconds=90)
DELETE_DEADLINE_SECONDS = (
    20.0  # seconds after the mark: with the 51 s that the slowest delete takes, less than MARK_LIVES
)
MAX_DELETES_PER_REQUEST = 1000  # S3 deletes so many in one request
LIFECYCLE_RULE_ID = "omnivideo-lifetime"
NO_LIFECYCLE_MESSAGE = "it keeps no lifecycle rules; use the sweep"
CONTENT_TYPES = {"mp4": "video/mp4", "webm": "video/webm", "png": "image/png", "jpg": "image/jpeg", "gif": "image/gif",
         "webp": "image/webp", "json": "application/json", "jsonl": "application/jsonl"}  # fmt: skip


class S3ObjectStore:
    """`<prefix>/ab/abcd….mp4` in a bucket, which the first put makes.  Threads may share one, forked children not."""

    def __init__(
        self, address: str, bucket: str, access_key: str, secret_key: str,
        region: str = "us-east-1", prefix: str = "", public_address: str = "",
    ):  # fmt: skip
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
            raise InvalidInput("S3 bucket", "3 to 63 small letters, digits, dots and hyphens")
        self.client = create_s3_client(address, access_key, secret_key, region)
        self.public_client = create_s3_client(public_address or address, access_key, secret_key, region)
        self.translate_errors = partial(translate_errors, address)
        self.bucket, self.region, self.prefix = bucket, region, f"{prefix.strip('/')}/".lstrip("/")

    def object_name(self, key: str) -> str:
        if not KEY_PATTERN.fullmatch(key):
            raise ArtifactNotFound(
                "store: that is no artifact key; a key is 64 hexadecimal digits, a dot and a file type"
            )
        return f"{self.prefix}{key[:2]}/{key}"

    def put(self, data: bytes, suffix: str) -> str:
        return self.upload_until_present(compute_object_key(data, suffix), io.BytesIO(data), len(data))

    def put_file(self, path: Path, suffix: str) -> str:
        """As `put`, with a part or two of the file in memory at a time.  Nobody may change the file meanwhile."""
        try:
            with path.open("rb") as file:
                key = f"{hashlib.file_digest(file, 'sha256').hexdigest()}.{suffix}"
                return self.upload_until_present(key, file, file.tell())
        except OSError as error:
            raise StoreError(f"store: {path.name} cannot be read: {error.strerror or 'it was cut short'}") from None

    def upload_until_present(self, key: str, file: BinaryIO, size_bytes: int) -> str:
        for _ in range(5):  # twice where a sweep has just taken it
            try:
                self.upload_object(key, file, size_bytes)
            except ArtifactNotFound:
                self.ensure_bucket()
                self.upload_object(key, file, size_bytes)
            while any(self.is_mark_active(mark) for mark, _ in self.list_objects(f".sweep/{key[:2]}-")):
                time.sleep(0.05)
            if self.has(key):
                return key
        raise StoreError(f"store: sweeps take {key} as fast as it is put: their lifetime is too short")

    def upload_object(self, key: str, file: BinaryIO, size_bytes: int) -> None:
        file.seek(0)
        where, kind = self.object_name(key), CONTENT_TYPES.get(key.rpartition(".")[2], "application/octet-stream")
        with self.translate_errors(key):
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

    def get(self, key: str) -> bytes:
        return self.read_object(key, 0, 0)

    def read_range(self, key: str, first_byte: int, last_byte: int) -> bytes:
        """Bytes `first` to `last`, both included, as in HTTP; fewer where the artifact ends before."""
        if not 0 <= first_byte <= last_byte:
            raise InvalidInput("range", "0 <= first <= last")
        return self.read_object(key, first_byte, last_byte - first_byte + 1)

    def read_object(self, key: str, offset: int, length: int) -> bytes:
        name, tries = self.object_name(key), 2  # the pool asks again by itself, but not once bytes have begun to come
        while True:
            tries -= 1
            with self.translate_errors(key), self.client.get_object(self.bucket, name, offset, length) as response:
                try:
                    return bytes(response.read())
                except (ProtocolError, TimeoutError):
                    if not tries:
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

    def presign_url(self, key: str, expires_in_seconds: int) -> str:
        """Where anybody may download it for so long.  No server is asked: what is not there is a 404 there."""
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
        for name, put in self.list_objects(subfolder):
            key = name.rpartition("/")[2]
            if KEY_PATTERN.fullmatch(key) and name == self.object_name(key):
                yield key, put

    def iter_keys(self) -> Iterator[str]:
        return (key for key, _ in self.list_keys_with_times())

    def sweep(self, referenced_keys: Collection[str], lifetime_seconds: float = 7 * DAY_SECONDS) -> list[str]:
        """Removes what nothing refers to and nobody has put for `lifetime` seconds; returns the removed keys.

        Ages are by the server's clock.  `lifetime` is to be longer than the longest upload, which is as old as its
        start, and than it takes from a put to the reference.  What killed processes left goes after a day.
        """
        gone: list[str] = []
        for shard in sorted({key[:2] for key in self.iter_keys() if key not in referenced_keys}):
            while (
                len(removed_keys := self.sweep_shard_once(shard, referenced_keys, timedelta(seconds=lifetime_seconds)))
                == MAX_DELETES_PER_REQUEST
            ):
                gone += removed_keys
            gone += removed_keys
        yesterday = datetime.now(UTC) - timedelta(seconds=DAY_SECONDS)
        self.remove_objects([mark for mark, raised in self.list_objects(".sweep/") if raised < yesterday])
        self.abort_stale_uploads(max(lifetime_seconds, DAY_SECONDS))
        return gone

    def sweep_shard_once(self, shard: str, referred: Collection[str], min_age: timedelta) -> list[str]:
        mark, began = f"{self.prefix}.sweep/{shard}-{secrets.token_hex(8)}", time.monotonic()
        with self.translate_errors():
            self.client.put_object(self.bucket, mark, io.BytesIO(), 0)
        now = dict(self.list_objects(f".sweep/{shard}-")).get(mark)  # None: a put might not see it either
        old = [
            key
            for key, put in self.list_keys_with_times(f"{shard}/")
            if now and key not in referred and now - put >= min_age
        ]
        late = time.monotonic() - began > DELETE_DEADLINE_SECONDS
        old = [] if late else old[:MAX_DELETES_PER_REQUEST]
        self.remove_objects([self.object_name(key) for key in old])
        self.remove_objects(
            [mark]
        )  # not reached where a delete failed: it may still come, so the mark stays until it is void
        return old

    def is_mark_active(self, mark: str) -> bool:
        with suppress(ArtifactNotFound), self.translate_errors():
            head = self.client.stat_object(self.bucket, mark)
            now = parsedate_to_datetime(cast(dict, head.metadata)["date"])  # by the clock that wrote last_modified
            return now - cast(datetime, head.last_modified) < MARK_LIFETIME
        return False

    def remove_objects(self, names: list[str]) -> None:
        with self.translate_errors():
            for error in self.client.remove_objects(self.bucket, [DeleteObject(name) for name in names]):
                raise StoreError(f"store: {error.name or 'an artifact'} cannot be removed: {error.code}")

    def abort_stale_uploads(self, min_age_seconds: float = DAY_SECONDS) -> int:
        """Ends multipart uploads that began so many seconds ago and never ended (1,000 at most); how many."""
        before = datetime.now(UTC) - timedelta(seconds=min_age_seconds)
        stale_uploads = []
        with suppress(ArtifactNotFound), self.translate_errors():
            # The client has no other way to list and end uploads; tests/storage/test_objects.py holds it to these.
            page = self.client._list_multipart_uploads(self.bucket, prefix=self.prefix)
            stale_uploads = [one for one in page.uploads if one.initiated_time and one.initiated_time <= before]
            for one in stale_uploads:
                self.client._abort_multipart_upload(self.bucket, one.object_name, cast(str, one.upload_id))
        return len(stale_uploads)

    def set_lifecycle_expiration(self, days: int) -> None:
        """Has the server itself remove whatever is older, referred to or not; StoreError where it keeps no such rule.

        Other rules of the bucket stay as they are.
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
            lifecycle = self.client.get_bucket_lifecycle(self.bucket)  # some servers say yes and keep nothing
            if LIFECYCLE_RULE_ID not in [rule.rule_id for rule in (lifecycle.rules if lifecycle else [])]:
                raise StoreError(f"store: the S3 server: {NO_LIFECYCLE_MESSAGE}")

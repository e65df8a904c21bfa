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

from omnivideo.errors import InvalidInput, NotStored, StoreError
from omnivideo.storage.local import DAY, KEY, key_of
from omnivideo.storage.s3 import asking, code_of, connect

PART = 16 << 20  # bytes of an upload held at a time; S3 takes 10,000 parts, 160 GB
MARK_LIVES = timedelta(seconds=90)
DELETE_WITHIN = 20.0  # seconds after the mark: with the 51 s that the slowest delete takes, less than MARK_LIVES
MOST = 1000  # S3 deletes so many in one request
RULE = "omnivideo-lifetime"
NO_RULES = "it keeps no lifecycle rules; use the sweep"
TYPES = {"mp4": "video/mp4", "webm": "video/webm", "png": "image/png", "jpg": "image/jpeg", "gif": "image/gif",
         "webp": "image/webp", "json": "application/json", "jsonl": "application/jsonl"}  # fmt: skip


class S3Store:
    """`<prefix>/ab/abcd….mp4` in a bucket, which the first put makes.  Threads may share one, forked children not."""

    def __init__(
        self, address: str, bucket: str, access_key: str, secret_key: str,
        region: str = "us-east-1", prefix: str = "", public_address: str = "",
    ):  # fmt: skip
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
            raise InvalidInput("S3 bucket", "3 to 63 small letters, digits, dots and hyphens")
        self.client = connect(address, access_key, secret_key, region)
        self.public = connect(public_address or address, access_key, secret_key, region)
        self.asking = partial(asking, address)
        self.bucket, self.region, self.prefix = bucket, region, f"{prefix.strip('/')}/".lstrip("/")

    def name(self, key: str) -> str:
        if not KEY.fullmatch(key):
            raise NotStored("store: that is no artifact key; a key is 64 hexadecimal digits, a dot and a file type")
        return f"{self.prefix}{key[:2]}/{key}"

    def put(self, data: bytes, suffix: str) -> str:
        return self.keep(key_of(data, suffix), io.BytesIO(data), len(data))

    def put_file(self, path: Path, suffix: str) -> str:
        """As `put`, with a part or two of the file in memory at a time.  Nobody may change the file meanwhile."""
        try:
            with path.open("rb") as file:
                key = f"{hashlib.file_digest(file, 'sha256').hexdigest()}.{suffix}"
                return self.keep(key, file, file.tell())
        except OSError as error:
            raise StoreError(f"store: {path.name} cannot be read: {error.strerror or 'it was cut short'}") from None

    def keep(self, key: str, file: BinaryIO, size: int) -> str:
        for _ in range(5):  # twice where a sweep has just taken it
            try:
                self.upload(key, file, size)
            except NotStored:
                self.make_bucket()
                self.upload(key, file, size)
            while any(self.is_up(mark) for mark, _ in self.listed(f".sweep/{key[:2]}-")):
                time.sleep(0.05)
            if self.has(key):
                return key
        raise StoreError(f"store: sweeps take {key} as fast as it is put: their lifetime is too short")

    def upload(self, key: str, file: BinaryIO, size: int) -> None:
        file.seek(0)
        where, kind = self.name(key), TYPES.get(key.rpartition(".")[2], "application/octet-stream")
        with self.asking(key):
            self.client.put_object(self.bucket, where, file, size, kind, part_size=PART, num_parallel_uploads=1)

    def make_bucket(self) -> None:
        with self.asking():
            try:
                self.client.make_bucket(self.bucket, self.region)
            except MinioException as error:
                if code_of(error) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

    def get(self, key: str) -> bytes:
        return self.read(key, 0, 0)

    def part(self, key: str, first: int, last: int) -> bytes:
        """Bytes `first` to `last`, both included, as in HTTP; fewer where the artifact ends before."""
        if not 0 <= first <= last:
            raise InvalidInput("range", "0 <= first <= last")
        return self.read(key, first, last - first + 1)

    def read(self, key: str, offset: int, length: int) -> bytes:
        name, tries = self.name(key), 2  # the pool asks again by itself, but not once bytes have begun to come
        while True:
            tries -= 1
            with self.asking(key), self.client.get_object(self.bucket, name, offset, length) as response:
                try:
                    return bytes(response.read())
                except (ProtocolError, TimeoutError):
                    if not tries:
                        raise

    def size(self, key: str) -> int:
        name = self.name(key)
        with self.asking(key):
            return self.client.stat_object(self.bucket, name).size or 0

    def has(self, key: str) -> bool:
        name = self.name(key)
        with suppress(NotStored), self.asking():
            return bool(self.client.stat_object(self.bucket, name))
        return False

    def signed(self, key: str, seconds: int) -> str:
        """Where anybody may download it for so long.  No server is asked: what is not there is a 404 there."""
        if not 1 <= seconds <= 7 * DAY:
            raise InvalidInput("seconds", "1 to 604800 (7 days)")
        return self.public.presigned_get_object(self.bucket, self.name(key), timedelta(seconds=seconds))

    def listed(self, folder: str = "") -> Iterator[tuple[str, datetime]]:
        with suppress(NotStored), self.asking():
            for item in self.client.list_objects(self.bucket, self.prefix + folder, recursive=True):
                if item.object_name and item.last_modified:
                    yield item.object_name, item.last_modified

    def dated(self, folder: str = "") -> Iterator[tuple[str, datetime]]:
        for name, put in self.listed(folder):
            key = name.rpartition("/")[2]
            if KEY.fullmatch(key) and name == self.name(key):
                yield key, put

    def keys(self) -> Iterator[str]:
        return (key for key, _ in self.dated())

    def sweep(self, referred: Collection[str], lifetime: float = 7 * DAY) -> list[str]:
        """Removes what nothing refers to and nobody has put for `lifetime` seconds; returns the removed keys.

        Ages are by the server's clock.  `lifetime` is to be longer than the longest upload, which is as old as its
        start, and than it takes from a put to the reference.  What killed processes left goes after a day.
        """
        gone: list[str] = []
        for shard in sorted({key[:2] for key in self.keys() if key not in referred}):
            while len(some := self.sweep_some(shard, referred, timedelta(seconds=lifetime))) == MOST:
                gone += some
            gone += some
        yesterday = datetime.now(UTC) - timedelta(seconds=DAY)
        self.remove([mark for mark, raised in self.listed(".sweep/") if raised < yesterday])
        self.clean_uploads(max(lifetime, DAY))
        return gone

    def sweep_some(self, shard: str, referred: Collection[str], lifetime: timedelta) -> list[str]:
        mark, began = f"{self.prefix}.sweep/{shard}-{secrets.token_hex(8)}", time.monotonic()
        with self.asking():
            self.client.put_object(self.bucket, mark, io.BytesIO(), 0)
        now = dict(self.listed(f".sweep/{shard}-")).get(mark)  # None: a put might not see it either
        old = [key for key, put in self.dated(f"{shard}/") if now and key not in referred and now - put >= lifetime]
        late = time.monotonic() - began > DELETE_WITHIN
        old = [] if late else old[:MOST]
        self.remove([self.name(key) for key in old])
        self.remove([mark])  # not reached where a delete failed: it may still come, so the mark stays until it is void
        return old

    def is_up(self, mark: str) -> bool:
        with suppress(NotStored), self.asking():
            head = self.client.stat_object(self.bucket, mark)
            now = parsedate_to_datetime(cast(dict, head.metadata)["date"])  # by the clock that wrote last_modified
            return now - cast(datetime, head.last_modified) < MARK_LIVES
        return False

    def remove(self, names: list[str]) -> None:
        with self.asking():
            for error in self.client.remove_objects(self.bucket, [DeleteObject(name) for name in names]):
                raise StoreError(f"store: {error.name or 'an artifact'} cannot be removed: {error.code}")

    def clean_uploads(self, older: float = DAY) -> int:
        """Ends multipart uploads that began so many seconds ago and never ended (1,000 at most); how many."""
        before = datetime.now(UTC) - timedelta(seconds=older)
        left = []
        with suppress(NotStored), self.asking():
            # The client has no other way to list and end uploads; tests/integration/test_stores.py holds it to these.
            page = self.client._list_multipart_uploads(self.bucket, prefix=self.prefix)
            left = [one for one in page.uploads if one.initiated_time and one.initiated_time <= before]
            for one in left:
                self.client._abort_multipart_upload(self.bucket, one.object_name, cast(str, one.upload_id))
        return len(left)

    def set_lifetime(self, days: int) -> None:
        """Has the server itself remove whatever is older, referred to or not; StoreError where it keeps no such rule.

        Other rules of the bucket stay as they are.
        """
        if not 1 <= days <= 36_500:
            raise InvalidInput("days", "1 to 36500")
        unfinished = AbortIncompleteMultipartUpload(days_after_initiation=1)
        ours = Rule(ENABLED, Filter(prefix=self.prefix), RULE, unfinished, Expiration(days=days))
        self.make_bucket()
        with self.asking(otherwise=NO_RULES):
            kept = self.client.get_bucket_lifecycle(self.bucket)
            others = [rule for rule in (kept.rules if kept else []) if rule.rule_id != RULE]
            self.client.set_bucket_lifecycle(self.bucket, LifecycleConfig([*others, ours]))
            kept = self.client.get_bucket_lifecycle(self.bucket)  # some servers say yes and keep nothing
            if RULE not in [rule.rule_id for rule in (kept.rules if kept else [])]:
                raise StoreError(f"store: the S3 server: {NO_RULES}")

"""Bound how many of the API's threads may be busy with one kind of work, and how many bytes large bodies may take.

A thread that waits for a slow S3 server or for a decoding process is one that no other request can use. Once a kind of
work has all threads that it may have, further requests for it are refused at once, with the time to try again. Large
bodies wait for a while, so that simultaneous uploads exhaust neither the memory nor /tmp.
"""

import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import BinaryIO, Concatenate, ParamSpec, TypeVar

from anyio import CancelScope, Condition, move_on_after
from starlette.types import ASGIApp, Receive, Scope, Send

from omnivideo.api.errors import to_api_error, to_json_response
from omnivideo.api.request_body import is_form
from omnivideo.errors import PoolBusy
from omnivideo.ports import SweepableObjectStore

MAX_THREADS = 112  # of the API; what the kinds below leave is for the database
MAX_DECODING_THREADS = 24  # fetch media, decode them, or render thumbnails
MAX_DECODING_THREADS_PER_OWNER = 16
MAX_STORE_THREADS = 32  # read or write the object store
RETRY_SECONDS = 2.0
MAX_REQUESTS_PER_ADDRESS = 256
FREE_UPLOAD_BYTES = 2**20  # of a body that needs no admission; forms keep that much in memory too
JSON_COPIES = 4  # of a JSON body in memory: its bytes, its text, its fields and the decoded media
MAX_UPLOAD_WAIT_SECONDS, UPLOAD_RETRY_SECONDS = 20.0, 5.0
LOCAL_ADDRESSES = ("", "127.0.0.1", "::1")
Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class Bulkhead:
    """Limits the threads that do one kind of work, in all and for one owner. `work` names it in messages."""

    def __init__(self, work: str, max_threads: int, max_threads_per_owner: int | None = None):
        self.work, self.max_threads = work, max_threads
        self.max_threads_per_owner = max_threads_per_owner or max_threads
        self.lock = threading.Lock()
        self.threads_by_owner = Counter[str]()

    @contextmanager
    def enter(self, owner: str = "") -> Iterator[None]:
        """Raise PoolBusy if all threads for this work are busy, or as many of one owner as may be."""
        with self.lock:
            is_full = self.threads_by_owner.total() >= self.max_threads
            if is_full or self.threads_by_owner[owner] >= self.max_threads_per_owner:
                raise PoolBusy(f"{self.work}: too many requests at once; try again in a moment", RETRY_SECONDS)
            self.threads_by_owner[owner] += 1
        try:
            yield
        finally:
            with self.lock:
                self.threads_by_owner[owner] -= 1
                self.threads_by_owner += Counter()  # it drops the owners that have none

    def wrap(self, function: Callable[Arguments, Answer]) -> Callable[Concatenate[str, Arguments], Answer]:
        """Return the function with this limit; its first argument is the owner."""

        def call(owner: str, /, *arguments: Arguments.args, **options: Arguments.kwargs) -> Answer:
            with self.enter(owner):
                return function(*arguments, **options)

        return call


class BoundedObjectStore:
    """An object store for requests, with a limit on the threads that use it at once."""

    def __init__(self, store: SweepableObjectStore, bulkhead: Bulkhead):
        self.store, self.bulkhead = store, bulkhead

    def put(self, data: bytes, suffix: str) -> str:
        with self.bulkhead.enter():
            return self.store.put(data, suffix)

    def put_stream(self, file: BinaryIO, suffix: str) -> str:
        with self.bulkhead.enter():
            return self.store.put_stream(file, suffix)

    def get(self, key: str) -> bytes:
        with self.bulkhead.enter():
            return self.store.get(key)

    def get_size(self, key: str) -> int:
        with self.bulkhead.enter():
            return self.store.get_size(key)

    def read_range(self, key: str, first_byte: int, last_byte: int) -> bytes:
        with self.bulkhead.enter():
            return self.store.read_range(key, first_byte, last_byte)

    def has(self, key: str) -> bool:
        with self.bulkhead.enter():
            return self.store.has(key)

    def delete(self, key: str) -> None:
        with self.bulkhead.enter():
            self.store.delete(key)

    def check_writable(self) -> None:
        with self.bulkhead.enter():
            self.store.check_writable()

    @property
    def presign_url(self) -> Callable[[str, int], str] | None:
        """Return what signs links of the store, or None if it cannot. It sends no request, so it has no limit."""
        return getattr(self.store, "presign_url", None)

    def iter_keys(self) -> Iterator[str]:
        return self.store.iter_keys()

    def sweep(
        self, referenced_keys: Collection[str], lifetime_seconds: float, candidates: Collection[str] | None = None
    ) -> list[str]:
        return self.store.sweep(referenced_keys, lifetime_seconds, candidates)


class ClientLimitMiddleware:
    """Refuses the requests of an address that already has MAX_REQUESTS_PER_ADDRESS; this machine is not limited.

    It runs after the trusted proxies' headers have been read, so the address is the client's.
    """

    def __init__(self, app: ASGIApp):
        self.app = app
        self.open_requests: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = scope["client"][0] if scope.get("client") else ""
        if scope["type"] != "http" or address in LOCAL_ADDRESSES:
            await self.app(scope, receive, send)
            return
        if self.open_requests[address] >= MAX_REQUESTS_PER_ADDRESS:
            error = PoolBusy("requests: too many of this address at once; try again in a moment", RETRY_SECONDS)
            await to_json_response(to_api_error(error))(scope, receive, send)
            return
        self.open_requests[address] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.open_requests[address] -= 1
            if not self.open_requests[address]:
                del self.open_requests[address]


class UploadBudget:
    """The bytes of the large bodies that this process holds at the same time; further ones wait unread.

    One that is larger than the whole budget is admitted alone.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.used_bytes = max_bytes, 0
        self.changed = Condition()

    @asynccontextmanager
    async def admit(self, body_bytes: int, content_type: bytes) -> AsyncIterator[None]:
        """Hold a body's bytes until its request has been answered. Raises PoolBusy if they are not free in time."""
        needed_bytes = body_bytes if is_form(content_type) else body_bytes * JSON_COPIES
        if body_bytes <= FREE_UPLOAD_BYTES:
            yield
            return
        await self.reserve(needed_bytes)
        try:
            yield
        finally:
            self.used_bytes -= needed_bytes
            with CancelScope(shield=True):  # others wait, even if this request was cancelled
                async with self.changed:
                    self.changed.notify_all()

    async def reserve(self, needed_bytes: int) -> None:
        with move_on_after(MAX_UPLOAD_WAIT_SECONDS):
            async with self.changed:
                while self.used_bytes and self.used_bytes + needed_bytes > self.max_bytes:
                    await self.changed.wait()
                self.used_bytes += needed_bytes
                return
        raise PoolBusy("body: too many large uploads at once; try again in a moment", UPLOAD_RETRY_SECONDS)

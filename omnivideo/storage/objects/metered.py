"""Count what is stored for an owner without a job or an upload, such as joined clips."""

from contextlib import AbstractContextManager
from typing import Protocol

from omnivideo.ports import ObjectStore
from omnivideo.storage.objects.local import compute_object_key


class ByteLimits(Protocol):
    """What counts an owner's bytes, such as `UsageRepository`."""

    def reserve_bytes(self, owner: str, size_bytes: int) -> AbstractContextManager[None]: ...


class MeteredObjectStore:
    """An object store whose new objects count as stored by an owner. Raises LimitReached if that is too much."""

    def __init__(self, store: ObjectStore, limits: ByteLimits, owner: str):
        self.store, self.limits, self.owner = store, limits, owner

    def put(self, data: bytes, suffix: str) -> str:
        if self.store.has(compute_object_key(data, suffix)):  # by a turn that is repeated after a failure, for example
            return self.store.put(data, suffix)
        with self.limits.reserve_bytes(self.owner, len(data)):
            return self.store.put(data, suffix)

    def get(self, key: str) -> bytes:
        return self.store.get(key)

    def has(self, key: str) -> bool:
        return self.store.has(key)

    def delete(self, key: str) -> None:
        self.store.delete(key)

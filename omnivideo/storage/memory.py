"""The object store in memory, for tests of other rooms."""

from omnivideo.errors import NotStored
from omnivideo.storage.local import key_of


class MemoryStore:
    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def put(self, data: bytes, suffix: str) -> str:
        key = key_of(data, suffix)
        self.held[key] = data
        return key

    def get(self, key: str) -> bytes:
        if key not in self.held:
            raise NotStored(f"store: there is no artifact {key}")
        return self.held[key]

    def has(self, key: str) -> bool:
        return key in self.held

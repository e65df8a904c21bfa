"""Store objects in memory, for tests."""

from typing import BinaryIO

from omnivideo.errors import ArtifactNotFound
from omnivideo.storage.objects.local import compute_object_key


class MemoryObjectStore:
    """An object store that is lost with its process."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def put(self, data: bytes, suffix: str) -> str:
        key = compute_object_key(data, suffix)
        self.objects[key] = data
        return key

    def get(self, key: str) -> bytes:
        if key not in self.objects:
            raise ArtifactNotFound("store: there is no such artifact; it may have expired")
        return self.objects[key]

    def put_stream(self, file: BinaryIO, suffix: str) -> str:
        file.seek(0)
        return self.put(file.read(), suffix)

    def get_size(self, key: str) -> int:
        return len(self.get(key))

    def read_range(self, key: str, first_byte: int, last_byte: int) -> bytes:
        return self.get(key)[first_byte : last_byte + 1]

    def has(self, key: str) -> bool:
        return key in self.objects

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

"""The object store in memory, for tests of other rooms."""

from omnivideo.errors import ArtifactNotFound
from omnivideo.storage.objects.local import compute_object_key


class MemoryObjectStore:
    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def put(self, data: bytes, suffix: str) -> str:
        key = compute_object_key(data, suffix)
        self.objects[key] = data
        return key

    def get(self, key: str) -> bytes:
        if key not in self.objects:
            raise ArtifactNotFound(f"store: there is no artifact {key}")
        return self.objects[key]

    def has(self, key: str) -> bool:
        return key in self.objects

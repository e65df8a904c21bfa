"""A cache that is bounded by the bytes of its values."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteBoundedCache(Generic[Key, Value]):
    """Keeps the values that were used last, at most `max_bytes` of them; a larger value is not kept at all."""

    def __init__(self, max_bytes: int, measure_bytes: Callable[[Value], int]):
        self.max_bytes, self.measure_bytes = max_bytes, measure_bytes
        self.held_bytes = 0
        self.hit_count = self.miss_count = 0
        self.values: OrderedDict[Key, Value] = OrderedDict()
        self.lock = threading.Lock()

    def get_or_compute(self, key: Key, compute: Callable[[], Value]) -> Value:
        """Return the value of a key; two threads that miss at once compute it twice, and neither waits."""
        with self.lock:
            if key in self.values:
                self.hit_count += 1
                self.values.move_to_end(key)
                return self.values[key]
            self.miss_count += 1
        value = compute()
        with self.lock:
            if key not in self.values:
                self.values[key] = value
                self.held_bytes += self.measure_bytes(value)
            while self.held_bytes > self.max_bytes:
                _, oldest = self.values.popitem(last=False)
                self.held_bytes -= self.measure_bytes(oldest)
        return value

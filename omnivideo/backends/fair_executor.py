"""Run blocking calls of several owners in a bounded number of threads; the owners are served in turn."""

import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class FairExecutor:
    """Runs calls in daemon threads, so that a call that hangs does not keep the process alive.

    At most `max_threads` calls run at once, and `max_threads_per_owner` of one owner.
    """

    def __init__(self, name: str, max_threads: int, max_threads_per_owner: int):
        self.name, self.max_threads, self.max_threads_per_owner = name, max_threads, max_threads_per_owner
        self.lock = threading.Lock()
        self.waiting_calls: dict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = {}  # the next owner is first
        self.running_by_owner: Counter[str] = Counter()
        self.num_threads = 0

    def submit(self, owner: str, call: Callable[[], Any]) -> Future[Any]:
        """Queue a call, and return a future with its result."""
        future: Future[Any] = Future()
        with self.lock:
            self.waiting_calls.setdefault(owner, deque()).append((future, call))
            if self.num_threads == self.max_threads:
                return future
            self.num_threads += 1
        threading.Thread(target=self.run, daemon=True, name=self.name).start()
        return future

    def run(self) -> None:
        """Run calls until no owner has one that may run."""
        while (next_call := self.take_call()) is not None:
            owner, future, call = next_call
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            with self.lock:
                self.running_by_owner[owner] -= 1

    def take_call(self) -> tuple[str, Future[Any], Callable[[], Any]] | None:
        """Take the next call; the owner then goes to the end of the line. Without one, the thread ends."""
        with self.lock:
            for owner, calls in self.waiting_calls.items():
                if self.running_by_owner[owner] < self.max_threads_per_owner:
                    future, call = calls.popleft()
                    del self.waiting_calls[owner]
                    if calls:
                        self.waiting_calls[owner] = calls
                    self.running_by_owner[owner] += 1
                    return owner, future, call
            self.num_threads -= 1
            return None

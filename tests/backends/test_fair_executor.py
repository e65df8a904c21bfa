"""Calls of several owners in a bounded number of threads."""

import threading

import pytest

from omnivideo.backends.fair_executor import FairExecutor
from tests.support.openai_service import wait_until


def test_one_owner_leaves_threads_to_others():
    executor, release = FairExecutor("calls", max_threads=4, max_threads_per_owner=3), threading.Event()
    bulk = [executor.submit("bulk", lambda: release.wait(20)) for _ in range(50)]
    assert [executor.submit("other", lambda n=n: n).result(5) for n in range(3)] == [0, 1, 2]
    assert executor.running_by_owner["bulk"] == 3 and not any(future.done() for future in bulk)
    release.set()
    assert all(future.result(20) for future in bulk)
    wait_until(lambda: executor.num_threads == 0)
    assert executor.submit("bulk", lambda: "again").result(5) == "again"


def test_owners_are_served_in_turn():
    executor, order, proceed = FairExecutor("calls", 1, 1), list[str](), threading.Event()
    executor.submit("first", lambda: proceed.wait(20))
    futures = [executor.submit(owner, lambda owner=owner: order.append(owner)) for owner in "aaabbc"]
    proceed.set()
    for future in futures:
        future.result(5)
    assert order == ["a", "b", "c", "a", "b", "a"]


def test_a_failing_call_does_not_end_its_thread():
    executor = FairExecutor("calls", 1, 1)

    def fail() -> None:
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        executor.submit("a", fail).result(5)
    assert executor.submit("a", lambda: 1).result(5) == 1

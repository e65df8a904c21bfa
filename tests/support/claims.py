"""Claim the rows of a database from several threads at once."""

import threading
from collections.abc import Callable

from omnivideo.contracts import ModelIdentity

MODEL = ModelIdentity(preset="tiny", weights="random", precision="float32")  # of the fixture `omni`


def claim_from_threads(claim: Callable[[], list[str]], thread_count: int = 4) -> list[str]:
    """Call `claim` in several threads until it returns no ids, and return the ids of all threads."""
    claimed_ids: list[str] = []

    def claim_all() -> None:
        while ids := claim():
            claimed_ids.extend(ids)

    threads = [threading.Thread(target=claim_all) for _ in range(thread_count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    claim_all()  # a thread that found every remaining row locked may have stopped early
    return claimed_ids

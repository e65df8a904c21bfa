"""Jobs that outlive their followers: submitted to the database, drawn by whichever worker comes."""

import base64
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from omnivideo.contracts import Artifact, Job, Lane, Preview, Step
from omnivideo.errors import NotStored, StoreError
from omnivideo.ports import ObjectStore
from omnivideo.storage.jobs import Jobs, outcome

LOOK = 0.05  # seconds between two looks at a job that is followed
PATIENCE = 120.0  # seconds that a database or a store that is away is waited for
Answer = TypeVar("Answer")


def patiently(act: Callable[[], Answer]) -> Answer:
    """Tries again while the database or the store is away."""
    pause, until = 0.05, time.monotonic() + PATIENCE
    while True:
        try:
            return act()
        except StoreError as error:
            if isinstance(error, NotStored) or time.monotonic() > until:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 2.0)


class DurableQueue:
    """The planner's job queue over the database.  `tell` lets workers know that there is work."""

    def __init__(
        self, jobs: Jobs, store: ObjectStore, tell: Callable[[], None], owner: str = "local", lane: Lane = "interactive"
    ):
        self.jobs = jobs
        self.store = store
        self.tell = tell
        self.owner = owner
        self.lane = lane

    def run(self, job: Job) -> Iterator[Step | Preview | Artifact]:
        if patiently(partial(self.jobs.submit, job, self.owner, self.lane)):
            self.tell()
        yield from self.follow(job.id)

    def follow(self, job_id: str) -> Iterator[Step | Preview | Artifact]:
        """Raises JobFailed or JobCancelled at its end."""
        step, preview = 0, None
        while True:
            status = patiently(partial(self.jobs.status, job_id))
            if status is None:
                raise StoreError(f"queue: there is no job {job_id}")
            if status.step != step:
                step = status.step
                yield Step(step=status.step, steps=status.steps, left=status.left)
            if status.preview and status.preview != preview:
                preview = status.preview
                yield Preview(png=base64.b64encode(self.store.get(preview)).decode())
            if (result := outcome(status)) is not None:
                yield result
                return
            time.sleep(LOOK)

    def cancel(self, job_id: str) -> None:
        self.jobs.cancel(job_id)

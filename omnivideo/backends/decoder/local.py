"""Clips drawn in this process while they are followed, behind the planner's job queue port."""

from collections.abc import Iterator

from omnivideo.backends.decoder.painter import Painter
from omnivideo.backends.decoder.pipeline import Clip
from omnivideo.contracts import Artifact, Job, Preview, Step
from omnivideo.errors import JobCancelled

PREVIEWS = (0.4, 0.7)  # shares of the steps after which a preview is shown


class LocalQueue:
    """A queue that keeps nothing: a job lives as long as its follower."""

    def __init__(self, painter: Painter):
        self.painter = painter
        self.cancelled: set[str] = set()

    def cancel(self, job_id: str) -> None:
        self.cancelled.add(job_id)

    def run(self, job: Job) -> Iterator[Step | Preview | Artifact]:
        job, chosen = self.painter.ready(job)
        preview_at = {round(share * chosen.steps) for share in PREVIEWS}
        for event in self.painter.drawn(job, chosen):
            if job.id in self.cancelled:
                self.cancelled.discard(job.id)
                raise JobCancelled("the clip was cancelled")
            if isinstance(event, Clip):
                yield self.painter.keep(job, chosen, event)
                return
            yield event.step
            if event.step.step in preview_at:
                yield self.painter.preview(event.guess)

"""Render jobs in this process while they are followed."""

from collections.abc import Iterator

from omnivideo.backends.decoder.pipeline import ClipDecoder, GeneratedClip
from omnivideo.contracts import Artifact, Job, Preview, StepProgress
from omnivideo.errors import JobCancelled

PREVIEW_FRACTIONS = (0.4, 0.7)  # fractions of the steps after which a preview is shown


class LocalQueue:
    """A queue without storage: a job runs as long as its follower iterates over it."""

    def __init__(self, renderer: ClipDecoder):
        self.renderer = renderer
        self.cancelled_job_ids: set[str] = set()

    def cancel(self, job_id: str) -> None:
        self.cancelled_job_ids.add(job_id)

    def run(self, job: Job) -> Iterator[StepProgress | Preview | Artifact]:
        job, params = self.renderer.prepare_job(job)
        preview_steps = {round(fraction * params.steps) for fraction in PREVIEW_FRACTIONS}
        for event in self.renderer.render_job(job, params):
            if job.id in self.cancelled_job_ids:
                self.cancelled_job_ids.discard(job.id)
                raise JobCancelled("the clip was cancelled")
            if isinstance(event, GeneratedClip):
                yield self.renderer.store_result(job, params, event)
                return
            yield event.step
            if event.step.step in preview_steps:
                yield self.renderer.render_preview(event.clean_latents)

"""Implement the Decoder port: a decoder that renders plain frames in a colour of the prompt, behind the stock queue.

python examples/custom_decoder.py out/decoder

The planner, the queues and the workers see a decoder only through `omnivideo.ports.Decoder`.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from omnivideo.backends.decoder.pipeline import DenoisingProgress, GeneratedClip
from omnivideo.backends.queue.local import LocalQueue
from omnivideo.contracts import Artifact, Job, Preview, SamplingParams, resolve_sampling_params
from omnivideo.media.artifacts import encode_clip
from omnivideo.models.sampling import DenoisingState
from omnivideo.presets import TINY
from omnivideo.storage.objects.local import LocalObjectStore

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 80, 220)}
GREY = (128, 128, 128)


class PlainColourDecoder:
    """Renders each job at once, without a model. It has no denoising steps to yield."""

    def __init__(self, store: LocalObjectStore):
        self.store = store

    def prepare_job(self, job: Job) -> tuple[Job, SamplingParams]:
        return job, job.params

    def compute_batch_key(self, job: Job) -> None:
        """Return None: every job is rendered alone."""

    def render_job(
        self, job: Job, params: SamplingParams, initial_state: DenoisingState | None = None
    ) -> Iterator[DenoisingProgress | GeneratedClip]:
        colour = next((rgb for name, rgb in COLOURS.items() if name in job.prompt), GREY)
        shape = params.delivered_shape
        frames = np.empty((shape.frames, shape.height, shape.width, 3), dtype=np.uint8)
        frames[:] = colour
        yield GeneratedClip(frames, latents=torch.zeros(0))

    def render_batch(
        self, prepared_jobs: Sequence[tuple[Job, SamplingParams]], initial_state: DenoisingState | None = None
    ) -> Iterator[DenoisingProgress | list[GeneratedClip]]:
        yield [clip for job, params in prepared_jobs for clip in self.render_job(job, params)]  # type: ignore[misc]

    def render_preview(self, clean_latents: torch.Tensor, /) -> Preview:
        raise AssertionError("there are no denoising steps to preview")

    def store_result(self, job: Job, params: SamplingParams, clip: GeneratedClip) -> Artifact:
        key = self.store.put(*encode_clip(clip.frames, params.fps))
        shape = params.delivered_shape
        return Artifact(
            key=key, medium="video" if params.frames > 1 else "image", width=shape.width, height=shape.height,
            frames=shape.frames, fps=params.fps, caption=job.prompt, created_by="plain colours",
        )  # fmt: skip


def main(folder: Path) -> None:
    store = LocalObjectStore(folder)
    queue = LocalQueue(PlainColourDecoder(store))
    params = resolve_sampling_params(TINY, "text-to-video")
    job = Job(id="first", prompt="a blue sky", visual_tokens=None, source=None, params=params)
    for event in queue.run(job):
        assert isinstance(event, Artifact)
        print(store.path_for_key(event.key))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/decoder"))

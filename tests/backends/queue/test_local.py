"""The queue of the Studio over a decoder without a model."""

import pytest

from omnivideo.backends.queue.local import LocalQueue
from omnivideo.contracts import Artifact, Job, Preview, StepProgress, resolve_sampling_params
from omnivideo.errors import JobCancelled
from omnivideo.presets import TINY
from tests.support.twins import InstantDecoder

JOB = Job(
    id="job", prompt="a red ball", visual_tokens=None, source=None,
    params=resolve_sampling_params(TINY, "text-to-video", seed=1, steps=10),
)  # fmt: skip


def test_a_job_yields_its_steps_two_previews_and_the_artifact():
    events = list(LocalQueue(InstantDecoder()).run(JOB))
    assert [event.step for event in events if isinstance(event, StepProgress)] == list(range(1, 11))
    previews = [index for index, event in enumerate(events) if isinstance(event, Preview)]
    assert previews == [4, 8]  # after steps 4 and 7
    assert isinstance(events[-1], Artifact) and events[-1].caption == "a red ball"


def test_cancelling_stops_a_job_at_its_next_step():
    queue = LocalQueue(InstantDecoder())
    events = queue.run(JOB)
    next(events)
    queue.cancel("job")
    with pytest.raises(JobCancelled):
        next(events)
    assert isinstance(next(queue.run(JOB)), StepProgress)  # the cancellation was for that run only

"""How many CPU threads a clip is denoised with, and that its bytes do not depend on it."""

import numpy as np
import pytest
import torch

from omnivideo.backends.decoder import pipeline
from omnivideo.backends.decoder.pipeline import GeneratedClip, generate_clip
from omnivideo.contracts import resolve_sampling_params
from omnivideo.presets import TINY


@pytest.fixture(autouse=True)
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def generate(omni) -> tuple[np.ndarray, set[int], set[int]]:
    """Return the frames of a clip, and the numbers of threads within its steps and between them."""
    within, between, events = set(), set(), []
    hook = omni.decoder.register_forward_pre_hook(lambda *_: within.add(torch.get_num_threads()))
    params = resolve_sampling_params(TINY, "text-to-video", seed=3, steps=2)
    try:
        for event in generate_clip(omni, "a red ball", params):
            between.add(torch.get_num_threads())
            events.append(event)
    finally:
        hook.remove()
    assert isinstance(events[-1], GeneratedClip)
    return events[-1].frames, within, between


def test_small_products_are_computed_on_one_thread_with_the_same_bytes(omni, monkeypatch):
    frames, within, between = generate(omni)
    assert within == {1} and between == {2}
    monkeypatch.setattr(pipeline, "MIN_MULTIPLICATIONS_PER_THREAD", 1)
    frames_of_two_threads, within, between = generate(omni)
    assert within == {2} and between == {2}
    assert np.array_equal(frames, frames_of_two_threads)


def test_the_threads_are_restored_after_an_error(omni):
    params = resolve_sampling_params(TINY, "text-to-video")
    with pytest.raises(ValueError, match="in a step"), pipeline.limit_cpu_threads(omni.preset, params):
        assert torch.get_num_threads() == 1
        raise ValueError("in a step")
    assert torch.get_num_threads() == 2

"""The adapter, the diffusion transformer and the VAE on a GPU generate the requested clips, reproducibly."""

import numpy as np

from omnivideo.backends.decoder.pipeline import GeneratedClip, generate_clip
from omnivideo.contracts import resolve_sampling_params
from omnivideo.synthetic.facts import ObjectSpec, SceneSpec
from omnivideo.synthetic.scorer import detect_scene

PROMPT = "a small red circle moving right"


def render(omni) -> np.ndarray:
    *_, clip = generate_clip(omni, PROMPT, resolve_sampling_params(omni.preset, "text-to-video", seed=1))
    assert isinstance(clip, GeneratedClip)
    return clip.frames


def test_a_clip_shows_what_the_prompt_asks_for(gpu_omni):
    frames = render(gpu_omni)
    assert SceneSpec((ObjectSpec("circle", "red", "small", "right"),)).is_met_by(detect_scene(frames))


def test_the_same_seed_gives_the_same_bytes(gpu_omni):
    assert np.array_equal(render(gpu_omni), render(gpu_omni))


def test_a_clip_is_close_to_that_of_the_cpu(gpu_omni, cpu_omni):
    difference = np.abs(render(gpu_omni).astype(int) - render(cpu_omni).astype(int))
    assert difference.mean() < 4

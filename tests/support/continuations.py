"""The tiny preset with the tasks whose clips begin with given frames, for tests of how they are rendered.

Its weights are those of the tiny preset, which were not trained on these tasks: what is tested is the lengths, the
given frames and the bytes, not what is drawn.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from omnivideo import presets
from omnivideo.contracts import Artifact
from omnivideo.media.artifacts import encode_clip
from omnivideo.models.omni import OmniVideoModel
from omnivideo.ports import SweepableObjectStore
from omnivideo.presets import TINY, ContinuationTask, SamplingDefaults, TrainedShapes

DEFAULTS: dict[ContinuationTask, SamplingDefaults] = {
    "image-to-video": SamplingDefaults(
        width=64, height=64, frames=9, fps=8, steps=40, guidance_scale=3.0, given_frames=1
    ),
    "video-extension": SamplingDefaults(
        width=64, height=64, frames=17, fps=8, steps=40, guidance_scale=3.0, given_frames=9
    ),
    "keyframes-to-video": SamplingDefaults(
        width=64, height=64, frames=9, fps=8, steps=40, guidance_scale=3.0, given_frames=1
    ),
}
PRESET = TINY.model_copy(
    update={
        "sampling": TINY.sampling | DEFAULTS,
        "trained": TINY.trained
        | {task: TrainedShapes(sizes=((64, 64),), frames=(shape.frames,)) for task, shape in DEFAULTS.items()},
    }
)


def declare_tasks(omni: OmniVideoModel) -> OmniVideoModel:
    """Return the model with the preset that declares the tasks."""
    return replace(omni, preset=PRESET)


@contextmanager
def declare_everywhere() -> Iterator[None]:
    """Let every part of this process take the tiny preset for one that declares the tasks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(presets.PRESETS, "tiny", PRESET)
        yield


def make_frames(count: int, width: int = 64, height: int = 64, seed: int = 0) -> np.ndarray:
    """Return smooth frames [count, height, width, 3] in which a square moves to the right."""
    y, x = np.mgrid[:height, :width]
    base = 90 + 60 * np.sin(x / 17 + seed) + 50 * np.cos(y / 13 + seed)
    frames = np.repeat(np.stack([base, base[::-1], base[:, ::-1]], axis=-1)[None], count, axis=0)
    for index, frame in enumerate(frames):
        frame[20:36, (4 + 3 * index) % width : (4 + 3 * index) % width + 12] = (240, 30, 60)
    return frames.clip(0, 255).astype(np.uint8)


def store_frames(store: SweepableObjectStore, frames: np.ndarray, fps: float = 8) -> Artifact:
    """Store frames as a user's file, without the process that decodes uploads, which takes seconds to start."""
    data, suffix = encode_clip(frames, fps)
    count, height, width, _ = frames.shape
    return Artifact(
        key=store.put(data, suffix), medium="video" if count > 1 else "image", width=width, height=height, frames=count,
        fps=fps if count > 1 else 1.0, caption="a file", created_by="upload",
    )  # fmt: skip

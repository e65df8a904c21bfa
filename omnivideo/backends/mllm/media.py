"""Read the frames of a medium that the MLLM sees, at the size at which it sees them."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from omnivideo.contracts import Medium
from omnivideo.media.cache import ByteBoundedCache
from omnivideo.media.read import read_chosen_frames
from omnivideo.models.mllm import MLLMMedia, fit_size, resize_frame, sample_frame_indices
from omnivideo.presets import VisionInputConfig

MAX_CACHED_BYTES = 128 * 2**20  # bytes of pixels; one turn reads the same clip several times (route, answer, tokens)


class SampledFrames:
    """Some frames of a clip, addressed by their positions in the whole clip, as an array [F, H, W, 3] would be."""

    def __init__(self, count: int, frame_by_index: dict[int, np.ndarray]):
        self.count, self.frame_by_index = count, frame_by_index

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: Sequence[int]) -> np.ndarray:
        return np.stack([self.frame_by_index[index] for index in indices])

    @property
    def nbytes(self) -> int:
        return sum(frame.nbytes for frame in self.frame_by_index.values())


def read_mllm_media(
    source: str | Path | bytes, vision_config: VisionInputConfig, fps: float | None = None, medium: Medium | None = None
) -> MLLMMedia:
    """Return a medium for the MLLM, which gets the same patches from it as from all frames at their full size.

    `fps` and `medium` are the source's own if they are None.
    """
    indices: list[int] = []

    def choose(count: int, source_fps: float | None) -> list[int]:
        is_video = source_fps is not None if medium is None else medium == "video"
        # sample_frame_indices looks at the number of frames only; this array takes one byte.
        counted = MLLMMedia(np.broadcast_to(np.uint8(0), (count, 1, 1, 3)), fps or source_fps or 1.0)
        indices[:] = sample_frame_indices(counted, vision_config) if is_video else [0]
        return indices

    def fit(frame: np.ndarray) -> np.ndarray:
        height, width = frame.shape[:2]
        return resize_frame(frame, fit_size(height, width, vision_config))

    frames, grid = read_chosen_frames(source, choose, fit)
    sampled = SampledFrames(len(grid.order), dict(zip(indices, frames, strict=True)))
    kind = medium or grid.kind
    return MLLMMedia(cast(np.ndarray, sampled), fps or grid.fps or 1.0, kind == "video", is_fitted=True)


def create_media_cache() -> ByteBoundedCache[object, MLLMMedia]:
    """Return a cache of media, bounded by the bytes of their frames."""
    return ByteBoundedCache(MAX_CACHED_BYTES, lambda media: media.frames.nbytes)

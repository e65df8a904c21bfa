"""Read the frames of a medium that the MLLM sees, at the size at which it sees them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from omnivideo.contracts import Medium
from omnivideo.media.cache import ByteBoundedCache
from omnivideo.media.read import FrameSelection, read_frame_selections
from omnivideo.models.mllm import FittedFrames, MLLMMedia, VisualInput

MAX_CACHED_BYTES = 128 * 2**20  # bytes of pixels; one turn reads the same clip several times (route, answer, tokens)


class InputReader:
    """Selects and fits the frames of one medium for one visual input."""

    def __init__(self, visual_input: VisualInput, fps: float | None, medium: Medium | None):
        self.visual_input, self.fps, self.medium = visual_input, fps, medium
        self.indices: list[int] = []

    def choose(self, count: int, source_fps: float | None) -> list[int]:
        is_video = source_fps is not None if self.medium is None else self.medium == "video"
        counted = MLLMMedia(FittedFrames(count, {}), self.fps or source_fps or 1.0, is_video)
        self.indices = self.visual_input.list_seen_frames(counted)
        return self.indices

    def fit(self, frame: np.ndarray) -> np.ndarray:
        return self.visual_input.fit_frame(frame, len(self.indices))

    def index_frames(self, frames: Sequence[np.ndarray]) -> Mapping[int, np.ndarray]:
        """Return the selected frames by their indices in the whole clip."""
        return dict(zip(self.indices, frames, strict=True))


def read_mllm_media(
    source: str | Path | bytes,
    visual_inputs: Sequence[VisualInput],
    fps: float | None = None,
    medium: Medium | None = None,
) -> MLLMMedia:
    """Return a medium for an MLLM with these inputs, which sees the same in it as in all frames at their full size.

    `fps` and `medium` are the source's own if they are None.
    """
    readers = [InputReader(visual_input, fps, medium) for visual_input in visual_inputs]
    frames, grid = read_frame_selections(source, [FrameSelection(reader.choose, reader.fit) for reader in readers])
    frames_by_input = {
        reader.visual_input: reader.index_frames(fitted) for reader, fitted in zip(readers, frames, strict=True)
    }
    kind = medium or grid.kind
    return MLLMMedia(FittedFrames(len(grid.order), frames_by_input), fps or grid.fps or 1.0, kind == "video")


def create_media_cache() -> ByteBoundedCache[object, MLLMMedia]:
    """Return a cache of media, bounded by the bytes of their frames."""
    return ByteBoundedCache(MAX_CACHED_BYTES, lambda media: media.frames.nbytes)

"""Read the end of a clip that is continued, and join the clip with the frames that continue it."""

import numpy as np

from omnivideo.media.read import read_chosen_frames
from omnivideo.media.resample import fit_source_frame
from omnivideo.presets import SourceConfig
from omnivideo.presets.shapes import Delivery


def read_last_frames(
    source: bytes, count: int, width: int, height: int, config: SourceConfig, delivery: Delivery | None
) -> np.ndarray:
    """Return the last `count` frames of a clip as the model gets them, uint8 [count, height, width, 3]."""

    def choose(total: int, fps: float | None) -> range:
        return range(total - count, total)

    def fit(pixels: np.ndarray) -> np.ndarray:
        return fit_source_frame(pixels, width, height, config, delivery)

    return np.stack(read_chosen_frames(source, choose, fit)[0])


def join_extension(source_FHW3: np.ndarray, generated_FHW3: np.ndarray, given_frames: int) -> np.ndarray:
    """Return a clip with its continuation, uint8 [F, H, W, 3].

    The first `given_frames` of the generated frames show the source's last ones, as the model reproduces them. The
    source's frames turn into these one by one, so that the first new frame differs from the one before it only by what
    moves, and not by the model's rendering. A source with odd sides loses its last row or column.
    """
    height, width = generated_FHW3.shape[1:3]
    source = source_FHW3[:, :height, :width]
    kept, overlap = source[:-given_frames], source[-given_frames:].astype(np.float32)
    weights = (np.arange(given_frames, dtype=np.float32) + 1)[:, None, None, None] / given_frames
    blended = np.rint(overlap + weights * (generated_FHW3[:given_frames] - overlap)).astype(np.uint8)
    return np.concatenate([kept, blended, generated_FHW3[given_frames:]])

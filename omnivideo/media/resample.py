"""The rules for picking frames and for cropping, shared by serving, training and curation.

A model generates what it was trained on only if both sides pick the same frames and crop the same box.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from omnivideo.errors import InvalidInput
from omnivideo.media.limits import MediaGuard
from omnivideo.presets import SourceConfig
from omnivideo.presets.shapes import Delivery


def build_even_grid(starts: np.ndarray, end: float, guard: MediaGuard) -> tuple[Sequence[int], float]:
    """Return the index of the frame to show at each step of an even grid, and the grid's frames per second.

    `starts` are rising times from 0 in s. Times within a quarter of a step of even ones count as even; otherwise the
    grid has the median step, and frames are repeated.
    """
    if len(starts) == 1:
        return [0], 1 / end
    steps = np.arange(len(starts))
    fps = steps[-1] / starts[-1]
    if np.abs(starts * fps - steps).max() <= 0.25 and end * fps < len(starts) + 0.5:  # and the last frame is not longer
        return range(len(starts)), round(float(fps), 4)
    step = float(np.median(np.diff(starts)))
    guard.check_at_most("frames", end // step, guard.limits.max_frames)  # a step of a nanosecond would exhaust memory
    middles = (np.arange(round(end / step)) + 0.5) * step
    return [int(index) for index in np.searchsorted(starts, middles, side="right") - 1], round(1 / step, 4)


def select_nearest_frames(source_count: int, source_fps: float | None, count: int, fps: float) -> np.ndarray:
    """Return the indices [count] of the source's frames nearest to the times 0, 1 / fps, 2 / fps ...

    A longer source is cut, a shorter one repeats its last frame. A still has no `source_fps` and is repeated.
    """
    indices = np.floor(np.arange(count) * (source_fps or 0) / fps + 0.5).astype(int)
    nearest: np.ndarray = np.minimum(indices, source_count - 1)
    return nearest


def select_strided_frames(source_count: int, count: int, config: SourceConfig) -> list[int]:
    """Return the indices of `count` frames of a clip: every `stride`-th after the skipped ones.

    The stride shrinks until the clip is long enough. Raises InvalidInput for a clip that is too short for any.
    """
    available = source_count - config.skip
    if available < count:
        text = f"it has {source_count} frames; an edit of {count} frames takes at least {config.skip + count}"
        raise InvalidInput("source", text)
    stride = min(config.stride, available // count)
    return [config.skip + index * stride for index in range(count)]


def spread_frame_indices(source_count: int, max_count: int) -> list[int]:
    """Return the indices of up to `max_count` frames, evenly spaced from the first to the last."""
    return [int(index) for index in np.linspace(0, source_count - 1, min(max_count, source_count)).round()]


def center_crop_resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return [height, width, 3]: the largest centred box of that aspect ratio, resized with a Lanczos filter."""
    full_height, full_width = pixels.shape[:2]
    scale = min(full_width / width, full_height / height)
    left = max(0.0, (full_width - width * scale) / 2)
    top = max(0.0, (full_height - height * scale) / 2)
    box = (left, top, full_width - left, full_height - top)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box))


def crop_whole_box_resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return [height, width, 3]: the largest centred box of that aspect ratio with whole sides, resized bilinearly."""
    full_height, full_width = pixels.shape[:2]
    ratio = width / height
    box_width, box_height = min(full_width, int(full_height * ratio)), full_height
    if full_width < full_height * ratio:
        box_width, box_height = full_width, int(full_width / ratio)
    left, top = round((full_width - box_width) / 2), round((full_height - box_height) / 2)
    box = np.ascontiguousarray(pixels[top : top + box_height, left : left + box_width])
    return np.asarray(Image.fromarray(box).resize((width, height), Image.Resampling.BILINEAR))


CROPS = {"exact": center_crop_resize, "whole": crop_whole_box_resize}

# ---------------------------------------------------------------- the size of a file and that of the model


def deliver_frames(frames_FHW3: np.ndarray, delivery: Delivery) -> np.ndarray:
    """Return the first frames of a generated clip, scaled to cover the delivered size and cropped centrally."""
    size = (delivery.width, delivery.height)
    return np.stack([center_crop_resize(frame, *size) for frame in frames_FHW3[: delivery.frames]])


def fit_source_frame(
    pixels: np.ndarray, width: int, height: int, config: SourceConfig, delivery: Delivery | None
) -> np.ndarray:
    """Return a source's frame as the model gets it [height, width, 3]: the largest centred box of that aspect ratio.

    For an edit that is delivered at another size, the box has the delivered aspect ratio and is scaled to fit inside;
    the rest repeats its edge. So what `deliver_frames` delivers shows all of the box.
    """
    crop_resize = CROPS[config.crop]
    if delivery is None:
        return crop_resize(pixels, width, height)
    scale = min(width / delivery.width, height / delivery.height)
    inner_width, inner_height = (max(1, round(side * scale)) for side in (delivery.width, delivery.height))
    inner = crop_resize(pixels, inner_width, inner_height)
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    pads = ((top, height - inner_height - top), (left, width - inner_width - left), (0, 0))
    return np.pad(inner, pads, mode="edge")

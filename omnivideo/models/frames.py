"""Crop and resize the frames that a language model sees."""

import numpy as np
from PIL import Image


def crop_to_square(frame_HW3: np.ndarray) -> np.ndarray:
    """Return the largest centred square of a frame."""
    height, width = frame_HW3.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return np.ascontiguousarray(frame_HW3[top : top + side, left : left + side])


def resize_frame(frame_HW3: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the frame at a height and width, by bicubic interpolation."""
    if frame_HW3.shape[:2] == size:
        return frame_HW3
    return np.asarray(Image.fromarray(frame_HW3).resize((size[1], size[0]), Image.Resampling.BICUBIC))

"""Masks of edits, as in OpenAI's API: only where a mask is fully transparent may the picture change."""

import io

import numpy as np
from PIL import Image

from omnivideo.errors import InvalidInput


def read_mask(data: bytes, width: int, height: int) -> np.ndarray:
    """Return where a picture may change, bool [H, W], from a file that has been decoded in the sandbox before.

    Raises InvalidInput for a mask of another size, or without alpha.
    """
    with Image.open(io.BytesIO(data)) as mask:
        if mask.size != (width, height):
            text = f"it has {mask.width}x{mask.height} pixels and the image {width}x{height}"
            raise InvalidInput("mask", f"{text}; allowed: the same size")
        if not mask.has_transparency_data:
            raise InvalidInput("mask", "it has no alpha; make it transparent where the image may change")
        alpha = np.asarray(mask.convert("RGBA").getchannel("A"))
    return np.asarray(alpha == 0)


def keep_masked_pixels(edited_HW3: np.ndarray, source_HW3: np.ndarray, may_change_HW: np.ndarray) -> np.ndarray:
    """Return the edited picture where it may change, and the source's own pixels elsewhere."""
    return np.where(may_change_HW[..., None], edited_HW3, source_HW3)

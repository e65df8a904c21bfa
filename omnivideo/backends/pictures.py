"""Pictures of a clip: one of its middle, and one of all its course.  Nothing here needs torch."""

import functools
import io
import math
import threading
from collections.abc import Callable

import numpy as np
from PIL import Image

from omnivideo.backends.media import frames_of
from omnivideo.contracts import Artifact
from omnivideo.ports import ObjectStore

SHEET = 16  # frames of a spritesheet at most
SIDE = 512  # px of a thumbnail's longer side at most; a frame of a spritesheet has half of that
KEPT = 64  # pictures that a process remembers
AT_ONCE = threading.BoundedSemaphore(2)  # clips that are decoded at the same time: each may take gigabytes


def pictures(store: ObjectStore) -> Callable[[Artifact, str], tuple[bytes, str]]:
    """A way to a clip's "thumbnail" (webp) or "spritesheet" (jpg): the picture, and its type."""

    @functools.lru_cache(maxsize=KEPT)
    def pictured(artifact: Artifact, variant: str) -> tuple[bytes, str]:
        with AT_ONCE:
            frames = frames_of(store, artifact)
        if variant == "thumbnail":
            return encoded(small(frames[len(frames) // 2], SIDE), "WEBP"), "webp"
        return encoded(spritesheet(frames), "JPEG"), "jpg"

    return pictured


def small(frame: np.ndarray, side: int) -> Image.Image:
    image = Image.fromarray(frame)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def spritesheet(frames: np.ndarray) -> Image.Image:
    """Up to 16 frames, evenly chosen, in reading order on a grid that is about square."""
    chosen = np.linspace(0, len(frames) - 1, min(SHEET, len(frames))).round().astype(int)
    tiles = [small(frames[at], SIDE // 2) for at in chosen]
    columns, (width, height) = math.ceil(math.sqrt(len(tiles))), tiles[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height))
    for at, tile in enumerate(tiles):
        sheet.paste(tile, (at % columns * width, at // columns * height))
    return sheet


def encoded(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, quality=85)
    return out.getvalue()

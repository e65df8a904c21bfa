"""Pictures of a clip: one of its middle, and one of all its course.  Nothing here needs torch."""

import functools
import io
import math
import threading
from collections.abc import Callable

import numpy as np
from PIL import Image

from omnivideo.contracts import Artifact
from omnivideo.media.artifacts import load_frames
from omnivideo.ports import ObjectStore

MAX_SPRITESHEET_FRAMES = 16  # frames of a spritesheet at most
MAX_THUMBNAIL_SIDE = 512  # px of a thumbnail's longer side at most; a frame of a spritesheet has half of that
PICTURE_CACHE_SIZE = 64  # pictures that a process remembers
DECODE_SLOTS = threading.BoundedSemaphore(2)  # clips that are decoded at the same time: each may take gigabytes


def create_picture_renderer(store: ObjectStore) -> Callable[[Artifact, str], tuple[bytes, str]]:
    """A way to a clip's "thumbnail" (webp) or "spritesheet" (jpg): the picture, and its type."""

    @functools.lru_cache(maxsize=PICTURE_CACHE_SIZE)
    def render_picture(artifact: Artifact, variant: str) -> tuple[bytes, str]:
        with DECODE_SLOTS:
            frames = load_frames(store, artifact)
        if variant == "thumbnail":
            return encode_image(make_thumbnail(frames[len(frames) // 2], MAX_THUMBNAIL_SIDE), "WEBP"), "webp"
        return encode_image(make_spritesheet(frames), "JPEG"), "jpg"

    return render_picture


def make_thumbnail(frame: np.ndarray, side: int) -> Image.Image:
    image = Image.fromarray(frame)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def make_spritesheet(frames: np.ndarray) -> Image.Image:
    """Up to 16 frames, evenly chosen, in reading order on a grid that is about square."""
    frame_indices = np.linspace(0, len(frames) - 1, min(MAX_SPRITESHEET_FRAMES, len(frames))).round().astype(int)
    tiles = [make_thumbnail(frames[index], MAX_THUMBNAIL_SIDE // 2) for index in frame_indices]
    columns, (width, height) = math.ceil(math.sqrt(len(tiles))), tiles[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    return sheet


def encode_image(image: Image.Image, image_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, quality=85)
    return buffer.getvalue()

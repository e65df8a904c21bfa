"""Render still previews of a clip: a thumbnail and a spritesheet. This module does not need torch."""

import functools
import io
import math
import threading
from collections.abc import Callable

import numpy as np
from PIL import Image

from omnivideo.contracts import Artifact
from omnivideo.media.artifacts import load_frames
from omnivideo.media.resample import spread_frame_indices
from omnivideo.ports import ObjectStore

MAX_SPRITESHEET_FRAMES = 16  # in one spritesheet
MAX_THUMBNAIL_SIDE = 512  # px, of the longer side; a frame of a spritesheet has half of that
PICTURE_CACHE_SIZE = 64  # pictures cached by each process
DECODE_SLOTS = threading.BoundedSemaphore(2)  # clips decoded at the same time: each may take gigabytes


def create_picture_renderer(store: ObjectStore) -> Callable[[Artifact, str], tuple[bytes, str]]:
    """Return a function that maps an artifact and "thumbnail" or "spritesheet" to a picture's bytes and suffix.

    A thumbnail is a webp of the middle frame, a spritesheet a jpg. The function caches its results.
    """

    @functools.lru_cache(maxsize=PICTURE_CACHE_SIZE)
    def render_picture(artifact: Artifact, variant: str) -> tuple[bytes, str]:
        with DECODE_SLOTS:
            frames = load_frames(store, artifact)
        if variant == "thumbnail":
            return encode_image(make_thumbnail(frames[len(frames) // 2], MAX_THUMBNAIL_SIDE), "WEBP"), "webp"
        return encode_image(make_spritesheet(frames), "JPEG"), "jpg"

    return render_picture


def make_thumbnail(frame: np.ndarray, side: int) -> Image.Image:
    """Return the frame, reduced to at most `side` px on its longer side."""
    image = Image.fromarray(frame)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def make_spritesheet(frames: np.ndarray) -> Image.Image:
    """Return up to 16 evenly spaced frames in reading order, on a grid that is about square."""
    frame_indices = spread_frame_indices(len(frames), MAX_SPRITESHEET_FRAMES)
    tiles = [make_thumbnail(frames[index], MAX_THUMBNAIL_SIDE // 2) for index in frame_indices]
    columns, (width, height) = math.ceil(math.sqrt(len(tiles))), tiles[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    return sheet


def encode_image(image: Image.Image, image_format: str) -> bytes:
    """Return a picture encoded in one of Pillow's formats."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, quality=85)
    return buffer.getvalue()

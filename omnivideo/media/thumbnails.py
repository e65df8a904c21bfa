"""Render still previews of a clip: a thumbnail and a spritesheet. This module does not need torch."""

import io
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image

from omnivideo.contracts import Artifact
from omnivideo.media.cache import ByteBoundedCache
from omnivideo.media.read import read_chosen_frames
from omnivideo.media.resample import spread_frame_indices
from omnivideo.ports import ObjectStore

MAX_SPRITESHEET_FRAMES = 16  # in one spritesheet
MAX_THUMBNAIL_SIDE = 512  # px, of the longer side; a frame of a spritesheet has half of that
MAX_CACHED_BYTES = 16 * 2**20  # bytes of pictures cached by each process
DECODE_SLOTS = threading.BoundedSemaphore(2)  # clips decoded at the same time


def create_picture_renderer(store: ObjectStore) -> Callable[[Artifact, str], tuple[bytes, str]]:
    """Return a function that maps an artifact and "thumbnail" or "spritesheet" to a picture's bytes and suffix.

    A thumbnail is a webp of the middle frame, a spritesheet a jpg. The function caches its results.
    """

    cache = ByteBoundedCache[tuple[Artifact, str], tuple[bytes, str]](MAX_CACHED_BYTES, lambda picture: len(picture[0]))

    def render_picture(artifact: Artifact, variant: str) -> tuple[bytes, str]:
        return cache.get_or_compute((artifact, variant), lambda: draw_picture(store.get(artifact.key), variant))

    return render_picture


def draw_picture(data: bytes, variant: str) -> tuple[bytes, str]:
    """Return a picture of the media in `data`. Each frame that it shows is reduced before the next one is decoded."""
    if variant == "thumbnail":
        with DECODE_SLOTS:
            frames, _ = read_chosen_frames(
                data, lambda count, fps: [count // 2], partial(reduce_frame, side=MAX_THUMBNAIL_SIDE)
            )
        return encode_image(Image.fromarray(frames[0]), "WEBP"), "webp"
    with DECODE_SLOTS:
        frames, _ = read_chosen_frames(
            data,
            lambda count, fps: spread_frame_indices(count, MAX_SPRITESHEET_FRAMES),
            partial(reduce_frame, side=MAX_THUMBNAIL_SIDE // 2),
        )
    return encode_image(make_spritesheet(frames), "JPEG"), "jpg"


def reduce_frame(frame: np.ndarray, side: int) -> np.ndarray:
    """Return the frame, reduced to at most `side` px on its longer side."""
    image = Image.fromarray(frame)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def make_spritesheet(tiles: Sequence[np.ndarray]) -> Image.Image:
    """Return the tiles in reading order, on a grid that is about square."""
    columns, (height, width, _) = math.ceil(math.sqrt(len(tiles))), tiles[0].shape
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height))
    for index, tile in enumerate(tiles):
        sheet.paste(Image.fromarray(tile), (index % columns * width, index // columns * height))
    return sheet


def encode_image(image: Image.Image, image_format: str) -> bytes:
    """Return a picture encoded in one of Pillow's formats."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, quality=85)
    return buffer.getvalue()

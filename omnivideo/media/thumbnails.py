"""Render previews of a clip: a thumbnail, a spritesheet and an animation. This module does not need torch."""

import io
import itertools
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
MAX_ANIMATION_BYTES, MAX_ANIMATION_FRAMES = 2**20, 60
# Longer sides in px with WebP's qualities, tried in order until the animation is small enough.
ANIMATION_SIZES = ((480, 70), (320, 60), (240, 40), (160, 30), (96, 20))
MAX_CACHED_BYTES = 16 * 2**20  # bytes of pictures cached by each process
DECODE_SLOTS = threading.BoundedSemaphore(2)  # clips decoded at the same time


def create_picture_renderer(store: ObjectStore) -> Callable[[Artifact, str], tuple[bytes, str]]:
    """Return a function that maps an artifact and a variant to a picture's bytes and suffix.

    A "thumbnail" is a webp of the middle frame, a "spritesheet" a jpg, an "animation" a webp of the whole clip. An
    animation that was stored with its clip is read; the function caches what it renders.
    """

    cache = ByteBoundedCache[tuple[Artifact, str], tuple[bytes, str]](MAX_CACHED_BYTES, lambda picture: len(picture[0]))

    def render_picture(artifact: Artifact, variant: str) -> tuple[bytes, str]:
        if variant == "animation" and artifact.preview and store.has(artifact.preview):
            return store.get(artifact.preview), "webp"
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
    if variant == "animation":
        with DECODE_SLOTS:
            frames, grid = read_chosen_frames(
                data,
                lambda count, fps: spread_frame_indices(count, MAX_ANIMATION_FRAMES),
                partial(reduce_frame, side=ANIMATION_SIZES[0][0]),
            )
        duration_seconds = len(grid.order) / (grid.fps or 1.0)
        return encode_animation(frames, len(frames) / duration_seconds), "webp"
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


def encode_animation(frames: Sequence[np.ndarray] | np.ndarray, fps: float) -> bytes:
    """Return frames, uint8 [F, H, W, 3], as an animated webp that repeats forever, of at most MAX_ANIMATION_BYTES.

    It has at most MAX_ANIMATION_FRAMES, spread over the whole clip, and lasts as long as `frames` at `fps`.
    """
    indices = spread_frame_indices(len(frames), MAX_ANIMATION_FRAMES)
    starts_ms = [round(1000 * index / fps) for index in (*indices, len(frames))]
    durations_ms = [max(1, end - start) for start, end in itertools.pairwise(starts_ms)]
    for side, quality in ANIMATION_SIZES:
        first, *others = [Image.fromarray(reduce_frame(frames[index], side)) for index in indices]
        buffer = io.BytesIO()
        first.save(
            buffer,
            "WEBP",
            save_all=True,
            append_images=others,
            duration=durations_ms,
            loop=0,
            quality=quality,
            method=2,
        )
        if buffer.tell() <= MAX_ANIMATION_BYTES:
            break
    return buffer.getvalue()

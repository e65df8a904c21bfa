"""Read files as pixels uint8 [F, H, W, 3], RGB.

No file is trusted: the content decides the format, and every limit is checked on the header before anything is
decoded, and again on the decoded frames.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np

from omnivideo.media.containers import read_stated_size, sniff_format
from omnivideo.media.decode import (
    CLIP_DEMUXERS,
    MediaFile,
    TimedFrame,
    iterate_clip_frames,
    iterate_image_frames,
    read_frame_times,
)
from omnivideo.media.limits import READABLE_FORMATS, MediaGuard, MediaLimits, printable_name
from omnivideo.media.resample import (
    build_even_grid,
    center_crop_resize,
    crop_whole_box_resize,
    select_nearest_frames,
    select_strided_frames,
)
from omnivideo.presets import SourceConfig

MediaKind = Literal["image", "video"]
DEFAULT_LIMITS = MediaLimits()
DEFAULT_SOURCE = SourceConfig()


@dataclass(frozen=True)
class DecodedMedia:
    """A source's pixels, uint8 [F, H, W, 3], evenly spaced at `fps`; a still has one frame and no fps."""

    frames: np.ndarray
    fps: float | None
    kind: MediaKind


@dataclass(frozen=True)
class MediaInfo:
    """The shape of a source's DecodedMedia without its pixels; `frames` is their number."""

    width: int
    height: int
    frames: int
    fps: float | None
    kind: MediaKind


def read_media(
    source: str | Path | bytes, limits: MediaLimits = DEFAULT_LIMITS, *, field: str = "source"
) -> DecodedMedia:
    """Return every frame of a still, an animation or a clip, upright, with alpha composited on white.

    `source` is a path or the bytes of a file. A clip with uneven frame times is resampled to an even grid by repeating
    frames. An animation of one frame is an image. Raises UnreadableMedia, whose text starts with `field`.
    """
    frames: list[np.ndarray] = []
    file, guard = open_source(source, limits, field)
    with guard.translate_decoder_errors():
        order, fps, kind = decode_frames(file, guard, frames.append)
        return DecodedMedia(np.stack([frames[index] for index in order]), fps, kind)


def measure_media(
    source: str | Path | bytes, limits: MediaLimits = DEFAULT_LIMITS, *, field: str = "source"
) -> MediaInfo:
    """Return the shape that `read_media` would give, or raise what it would raise.

    The whole source is decoded, with one frame in memory at a time.
    """
    shapes: list[tuple[int, ...]] = []
    file, guard = open_source(source, limits, field)
    with guard.translate_decoder_errors():
        order, fps, kind = decode_frames(file, guard, lambda pixels: shapes.append(pixels.shape))
    height, width, _ = shapes[0]
    return MediaInfo(width, height, len(order), fps, kind)


def fit_media(
    media: DecodedMedia, width: int, height: int, frames: int, fps: float, config: SourceConfig = DEFAULT_SOURCE
) -> np.ndarray:
    """Return the source in the shape that the model requires: uint8 [frames, height, width, 3].

    It is cropped at the centre to the aspect ratio, resized, and resampled in time, as `config` says. Raises
    InvalidInput for a clip that is too short for a model that repeats no frames.
    """
    indices = select_nearest_frames(len(media.frames), media.fps, frames, fps).tolist()
    if config.frames == "stride" and media.kind == "video" and frames > 1:
        indices = select_strided_frames(len(media.frames), frames, config)
    crop_resize = center_crop_resize if config.crop == "exact" else crop_whole_box_resize
    resized = {index: crop_resize(media.frames[index], width, height) for index in set(indices)}
    return np.stack([resized[index] for index in indices])


def read_fitted_media(
    source: str | Path | bytes, width: int, height: int, frames: int, fps: float,
    limits: MediaLimits = DEFAULT_LIMITS, *, frame_indices: Sequence[int] | None = None, field: str = "source",
) -> np.ndarray:  # fmt: skip
    """Return `fit_media(read_media(source), ...)`, or only its frames `frame_indices`, in their order.

    A clip is decoded no further than the last frame that is needed, so damage after it is found only if the packets
    show it.
    """
    file, guard = open_source(source, limits, field)
    with guard.translate_decoder_errors():
        demuxer = check_format(file, guard)
        if demuxer in CLIP_DEMUXERS:
            fitted = fit_clip_prefix(file, demuxer, guard, (width, height), frames, fps, frame_indices)
            if fitted is not None:
                return fitted
    fitted = fit_media(read_media(source, limits, field=field), width, height, frames, fps)
    return fitted if frame_indices is None else fitted[list(frame_indices)]


def fit_clip_prefix(
    file: MediaFile, demuxer: str, guard: MediaGuard, size: tuple[int, int], count: int, fps: float,
    frame_indices: Sequence[int] | None,
) -> np.ndarray | None:  # fmt: skip
    """Return the fitted frames of a clip, planned from its packets' times and decoded up to the last one needed.

    Return None if the packets do not give the times of the frames, so that the whole clip has to be decoded.
    """
    times = read_frame_times(file, demuxer, guard)
    if not times:
        return None
    starts = np.array([start for start, _ in times])
    end = float(starts[-1] + times[-1][1] - starts[0])
    order, source_fps = build_even_grid(starts - starts[0], end, guard)
    guard.check_at_most("frames per second", source_fps, guard.limits.max_fps)
    positions = select_nearest_frames(len(order), source_fps, count, fps)
    indices = [order[position] for position in (positions if frame_indices is None else positions[list(frame_indices)])]
    needed, last_needed = set(indices), max(indices)
    resized: dict[int, np.ndarray] = {}
    for index, (pixels, *time) in enumerate(iterate_clip_frames(file, demuxer, guard)):
        if index >= len(times) or not np.allclose(time, times[index], rtol=0, atol=1e-6):
            return None  # a packet contained no frame, or two
        if index in needed:
            resized[index] = center_crop_resize(pixels, *size)
        if index == last_needed:
            return np.stack([resized[index] for index in indices])
    return None


# ---------------------------------------------------------------- decoding


def open_source(source: str | Path | bytes, limits: MediaLimits, field: str) -> tuple[MediaFile, MediaGuard]:
    """Return the source as a path or a buffer, and the guard that names it in refusals."""
    if isinstance(source, bytes):
        return source, MediaGuard("the file", limits, field)
    return Path(source), MediaGuard(printable_name(Path(source)), limits, field)


def decode_frames(
    file: MediaFile, guard: MediaGuard, on_frame: Callable[[np.ndarray], object]
) -> tuple[Sequence[int], float | None, MediaKind]:
    """Pass every frame to `on_frame`; return the frame to show at each step of an even grid, its fps, and the kind."""
    kind = check_format(file, guard)
    if kind in CLIP_DEMUXERS:
        return *collect_frames(iterate_clip_frames(file, kind, guard), guard, on_frame), "video"
    order, fps = collect_frames(iterate_image_frames(file, kind, guard), guard, on_frame)
    return (order, fps, "video") if len(order) > 1 else (order, None, "image")


def check_format(file: MediaFile, guard: MediaGuard) -> str:
    """Return the format by content; raise UnreadableMedia if it is not readable, or the file is cut short."""
    size = check_file_size(file, guard)
    with BytesIO(file) if isinstance(file, bytes) else file.open("rb") as opened:
        kind = sniff_format(opened.read(16))
        if kind is None:
            guard.refuse_media(f"is not an image or video; allowed: {READABLE_FORMATS}")
        if size < read_stated_size(opened, kind, size):
            guard.refuse_media(f"is cut short: it ends after {size} bytes; allowed: a complete file")
    return kind


def check_file_size(file: MediaFile, guard: MediaGuard) -> int:
    """Return the file's size in bytes without opening it; raise UnreadableMedia if it cannot be read."""
    size = len(file) if isinstance(file, bytes) else check_path(file, guard)
    if size == 0:
        guard.refuse_media(f"is empty; allowed: 1 to {guard.limits.max_bytes} bytes")
    guard.check_at_most("bytes", size, guard.limits.max_bytes)
    return size


def check_path(path: Path, guard: MediaGuard) -> int:
    """Return the size of a regular, readable file; raise UnreadableMedia for anything else."""
    try:
        file_stat = path.stat()
    except (OSError, ValueError) as error:
        guard.refuse_media(f"cannot be read: {getattr(error, 'strerror', None) or 'not a file name'}")
    if not path.is_file():  # a folder, a pipe or a device
        guard.refuse_media("is not a file" if not path.is_dir() else "is a folder, not a file")
    if not os.access(path, os.R_OK):
        guard.refuse_media("cannot be read: permission denied")
    return file_stat.st_size


def collect_frames(
    timed_frames: Iterator[TimedFrame], guard: MediaGuard, on_frame: Callable[[np.ndarray], object]
) -> tuple[Sequence[int], float]:
    """Pass every frame's pixels to `on_frame`; return their order on an even grid, and its frames per second."""
    starts: list[float] = []
    end, shape = 0.0, None
    for pixels, start, seconds in timed_frames:
        starts.append(start)
        end = start + seconds - starts[0]
        guard.check_dimensions(pixels.shape[1], pixels.shape[0], len(starts), end)
        if shape not in (None, pixels.shape):
            guard.refuse_media("changes its frame size midway; allowed: one size")
        shape = pixels.shape
        on_frame(pixels)
    if shape is None:
        guard.refuse_media("has no frame; allowed: 1 or more")
    order, fps = build_even_grid(np.array(starts) - starts[0], end, guard)
    guard.check_dimensions(shape[1], shape[0], len(order), 0)
    guard.check_at_most("frames per second", fps, guard.limits.max_fps)
    return order, fps

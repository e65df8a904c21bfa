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

from omnivideo.media.containers import is_heic, read_stated_size, sniff_format
from omnivideo.media.decode import (
    CLIP_DEMUXERS,
    DecodedFrame,
    MediaFile,
    iterate_clip_frames,
    iterate_image_frames,
    read_frame_times,
)
from omnivideo.media.limits import READABLE_FORMATS, MediaGuard, MediaLimits, printable_name
from omnivideo.media.resample import (
    CROPS,
    build_even_grid,
    fit_source_frame,
    select_nearest_frames,
    select_strided_frames,
)
from omnivideo.presets import SourceConfig
from omnivideo.presets.shapes import Delivery

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


@dataclass(frozen=True)
class FrameGrid:
    """How a source's frames are shown on an even grid: the frame at each step, by its position in the file.

    `fps` is None for a still.
    """

    order: Sequence[int]
    fps: float | None
    kind: MediaKind


ChooseFrames = Callable[[int, float | None], Sequence[int]]  # from the number of frames and their fps to indices


@dataclass(frozen=True)
class FrameSelection:
    """The frames that a consumer uses, and what it makes of each of them as soon as it is decoded.

    `choose` gets the number of frames and the frames per second that `read_media` would give, and returns indices,
    which may repeat.
    """

    choose: ChooseFrames
    transform: Callable[[np.ndarray], np.ndarray]


def read_media(
    source: str | Path | bytes, limits: MediaLimits = DEFAULT_LIMITS, *, field: str = "source"
) -> DecodedMedia:
    """Return every frame of a still, an animation or a clip, upright, with alpha composited on white.

    `source` is a path or the bytes of a file. A clip with uneven frame times is resampled to an even grid by repeating
    frames. An animation of one frame is an image. Raises UnreadableMedia, whose text starts with `field`. A consumer
    that uses some of the frames, or uses them smaller, calls `read_chosen_frames`, which holds no others.
    """
    frames: list[np.ndarray] = []
    file, guard = open_source(source, limits, field)
    with guard.translate_decoder_errors():
        grid = decode_frames(file, guard, lambda frame: frames.append(frame.convert()))
        return DecodedMedia(np.stack([frames[index] for index in grid.order]), grid.fps, grid.kind)


def measure_media(
    source: str | Path | bytes, limits: MediaLimits = DEFAULT_LIMITS, *, field: str = "source"
) -> MediaInfo:
    """Return the shape that `read_media` would give, or raise what it would raise.

    The whole source is decoded, one frame in memory at a time. Only frames of a new format are converted to pixels.
    """
    file, guard = open_source(source, limits, field)
    with guard.translate_decoder_errors():
        grid, first_frame = survey_frames(file, guard)
    height, width, _ = first_frame.shape
    return MediaInfo(width, height, len(grid.order), grid.fps, grid.kind)


def fit_media(
    media: DecodedMedia, width: int, height: int, frames: int, fps: float, config: SourceConfig = DEFAULT_SOURCE
) -> np.ndarray:
    """Return the source in the shape that the model requires: uint8 [frames, height, width, 3].

    It is cropped at the centre to the aspect ratio, resized, and resampled in time, as `config` says. Raises
    InvalidInput for a clip that is too short for a model that repeats no frames.
    """
    indices = select_source_frames(len(media.frames), media.fps, frames, fps, config)
    crop_resize = CROPS[config.crop]
    resized = {index: crop_resize(media.frames[index], width, height) for index in set(indices)}
    return np.stack([resized[index] for index in indices])


def select_source_frames(
    source_count: int, source_fps: float | None, count: int, fps: float, config: SourceConfig
) -> list[int]:
    """Return the indices of the `count` frames of a source that the model gets; `source_fps` is None for a still."""
    if config.frames == "stride" and source_fps is not None and count > 1:
        return select_strided_frames(source_count, count, config)
    return [int(index) for index in select_nearest_frames(source_count, source_fps, count, fps)]


def read_fitted_media(
    source: str | Path | bytes, width: int, height: int, frames: int, fps: float,
    limits: MediaLimits = DEFAULT_LIMITS, *, config: SourceConfig = DEFAULT_SOURCE,
    frame_indices: Sequence[int] | None = None, delivery: Delivery | None = None, field: str = "source",
) -> np.ndarray:  # fmt: skip
    """Return `fit_media(read_media(source), ...)`, or only its frames `frame_indices`, in their order.

    Frames are fitted for a `delivery` at another size than the model's, if there is one.
    A clip is decoded no further than the last frame that is needed, so damage after it is found only if the packets
    show it.
    """

    def choose(count: int, source_fps: float | None) -> Sequence[int]:
        positions = select_source_frames(count, source_fps, frames, fps, config)
        return positions if frame_indices is None else [positions[index] for index in frame_indices]

    def fit(pixels: np.ndarray) -> np.ndarray:
        return fit_source_frame(pixels, width, height, config, delivery)

    return np.stack(read_chosen_frames(source, choose, fit, limits, field=field)[0])


def read_chosen_frames(
    source: str | Path | bytes, choose: ChooseFrames, transform: Callable[[np.ndarray], np.ndarray],
    limits: MediaLimits = DEFAULT_LIMITS, *, field: str = "source",
) -> tuple[list[np.ndarray], FrameGrid]:  # fmt: skip
    """Return the frames of one selection, and the grid; see `read_frame_selections`."""
    (frames,), grid = read_frame_selections(source, [FrameSelection(choose, transform)], limits, field=field)
    return frames, grid


def read_frame_selections(
    source: str | Path | bytes, selections: Sequence[FrameSelection], limits: MediaLimits = DEFAULT_LIMITS,
    *, field: str = "source",
) -> tuple[list[list[np.ndarray]], FrameGrid]:  # fmt: skip
    """Return the frames of each selection, from one decoding, and the grid.

    Only transformed frames are held. A clip is decoded no further than the last chosen frame.
    """
    file, guard = open_source(source, limits, field)
    with guard.translate_decoder_errors():
        kind = check_format(file, guard)
        if kind in CLIP_DEMUXERS and (times := read_frame_times(file, kind, guard)):
            grid = build_clip_grid(times, guard)
            frames = pick_frames(file, kind, guard, grid, selections, times)
            if frames is not None:
                return frames, grid
        grid, first_frame = survey_frames(file, guard)
        if len(grid.order) == 1:  # a still is not decoded again
            counts = [len(selection.choose(1, grid.fps)) for selection in selections]
            return [[each.transform(first_frame)] * n for each, n in zip(selections, counts, strict=True)], grid
        frames = pick_frames(file, kind, guard, grid, selections)
    if frames is None:
        guard.refuse_media("changed while it was read; allowed: a complete file")
    return frames, grid


# ---------------------------------------------------------------- chosen frames


def build_clip_grid(times: Sequence[tuple[float, float]], guard: MediaGuard) -> FrameGrid:
    """Return the even grid of a clip, from its frames' starts and durations in s."""
    starts = np.array([start for start, _ in times])
    end = float(starts[-1] + times[-1][1] - starts[0])
    order, fps = build_even_grid(starts - starts[0], end, guard)
    guard.check_at_most("frames per second", fps, guard.limits.max_fps)
    return FrameGrid(order, fps, "video")


def pick_frames(
    file: MediaFile, kind: str, guard: MediaGuard, grid: FrameGrid, selections: Sequence[FrameSelection],
    times: Sequence[tuple[float, float]] | None = None,
) -> list[list[np.ndarray]] | None:  # fmt: skip
    """Decode up to the last chosen frame; return the chosen ones of each selection, transformed.

    Return None if the frames are not at `times`, which come from the packets: a packet contained no frame, or two.
    """
    chosen = [
        [grid.order[position] for position in selection.choose(len(grid.order), grid.fps)] for selection in selections
    ]
    last_needed = max(max(indices) for indices in chosen)
    transformed: list[dict[int, np.ndarray]] = [{} for _ in selections]
    for index, frame in enumerate(iterate_frames(file, kind, guard)):
        time = (frame.start, frame.seconds)
        if times is not None and (index >= len(times) or not np.allclose(time, times[index], rtol=0, atol=1e-6)):
            return None
        users = [number for number, indices in enumerate(chosen) if index in indices]
        for number, result in zip(users, transform_frame(frame, [selections[n] for n in users]), strict=True):
            transformed[number][index] = result
        if index == last_needed:
            return [[found[index] for index in indices] for found, indices in zip(transformed, chosen, strict=True)]
    return None


def transform_frame(frame: DecodedFrame, selections: Sequence[FrameSelection]) -> list[np.ndarray]:
    """Return what each selection makes of a frame. Its pixels are freed before the next is decoded."""
    if not selections:
        return []
    pixels = frame.convert()
    return [selection.transform(pixels) for selection in selections]


def survey_frames(file: MediaFile, guard: MediaGuard) -> tuple[FrameGrid, np.ndarray]:
    """Decode a whole source with one frame in memory; return its grid and its first frame.

    Frames of a new format are converted as well, so that what is accepted here can also be read.
    """
    first_frames: list[np.ndarray] = []
    layouts: set[str] = set()

    def check_frame(frame: DecodedFrame) -> None:
        if frame.layout not in layouts:
            layouts.add(frame.layout)
            pixels = frame.convert()
            first_frames[:] = first_frames or [pixels]

    grid = decode_frames(file, guard, check_frame)
    return grid, first_frames[0]


# ---------------------------------------------------------------- decoding


def open_source(source: str | Path | bytes, limits: MediaLimits, field: str) -> tuple[MediaFile, MediaGuard]:
    """Return the source as a path or a buffer, and the guard that names it in refusals."""
    if isinstance(source, bytes):
        return source, MediaGuard("the file", limits, field)
    return Path(source), MediaGuard(printable_name(Path(source)), limits, field)


def decode_frames(file: MediaFile, guard: MediaGuard, on_frame: Callable[[DecodedFrame], object]) -> FrameGrid:
    """Pass every frame to `on_frame`; return the grid on which they are shown."""
    kind = check_format(file, guard)
    order, fps = collect_frames(iterate_frames(file, kind, guard), guard, on_frame)
    if kind in CLIP_DEMUXERS or len(order) > 1:
        return FrameGrid(order, fps, "video")
    return FrameGrid(order, None, "image")


def iterate_frames(file: MediaFile, kind: str, guard: MediaGuard) -> Iterator[DecodedFrame]:
    """Yield the frames of a source of a format that `check_format` found."""
    return (iterate_clip_frames if kind in CLIP_DEMUXERS else iterate_image_frames)(file, kind, guard)


def check_format(file: MediaFile, guard: MediaGuard) -> str:
    """Return the format by content; raise UnreadableMedia if it is not readable, or the file is cut short."""
    size = check_file_size(file, guard)
    with BytesIO(file) if isinstance(file, bytes) else file.open("rb") as opened:
        head = opened.read(16)
        kind = sniff_format(head)
        if kind is None and is_heic(head):
            guard.refuse_media(f"is a HEIC picture, which cannot be read; allowed: {READABLE_FORMATS}")
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
    frames: Iterator[DecodedFrame], guard: MediaGuard, on_frame: Callable[[DecodedFrame], object]
) -> tuple[Sequence[int], float]:
    """Pass every frame to `on_frame`; return their order on an even grid, and its frames per second."""
    starts: list[float] = []
    end, size = 0.0, None
    for frame in frames:
        starts.append(frame.start)
        end = frame.start + frame.seconds - starts[0]
        guard.check_dimensions(*frame.size, len(starts), end)
        if size not in (None, frame.size):
            guard.refuse_media("changes its frame size midway; allowed: one size")
        size = frame.size
        on_frame(frame)
    if size is None:
        guard.refuse_media("has no frame; allowed: 1 or more")
    order, fps = build_even_grid(np.array(starts) - starts[0], end, guard)
    guard.check_dimensions(*size, len(order), 0)
    guard.check_at_most("frames per second", fps, guard.limits.max_fps)
    return order, fps

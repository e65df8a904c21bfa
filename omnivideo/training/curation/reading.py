"""Split files into scenes, sample frames of scenes, and write scenes as files. Pixels are uint8 [F, H, W, 3], RGB.

A scene is a span of presentation times in seconds, so a file with uneven frame times is cut at the right moments.
"""

import importlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from omnivideo.errors import MissingDependency, UnreadableMedia
from omnivideo.media.containers import sniff_format
from omnivideo.media.decode import (
    CLIP_DEMUXERS,
    count_declared_frames,
    decode_stream,
    open_container,
    read_display_matrix,
    select_video_stream,
    to_upright_pixels,
)
from omnivideo.media.limits import MediaGuard
from omnivideo.media.write import add_h264_stream, rgb_to_yuv
from omnivideo.training.data.sample import TRAINING_LIMITS

VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi")
SAMPLED_FPS = 8  # rate of the frames on which motion is measured
SMALL_FRAME_SIDE = 192  # px, their longer side
MAX_FULL_FRAMES = 8  # full frames of a clip, evenly spaced, for measurements of single frames
CUT_DETECTION_SIDE = 256  # px, the longer side of the frames on which cuts are detected
CLIP_TIME_BASE = Fraction(1, 90_000)  # s, the unit of frame times in written clips
MIN_SCENE_SECONDS = 0.3  # s; two cuts closer than this are a flash
DEFAULT_FPS = 25.0  # for a file that declares no rate

TimeSpan = tuple[float, float]
GUARD = MediaGuard("", TRAINING_LIMITS)  # the report names the file


def import_optional(module: str, package: str | None = None) -> Any:
    """Return an optional module; raise MissingDependency if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingDependency(f"curation needs {package or module}: pip install 'omnivideo[curate]'") from None


@dataclass(frozen=True)
class VideoSurvey:
    """A file's header and the result of decoding it once; `spans` are its scenes."""

    width: int
    height: int
    fps: float
    seconds: float
    spans: tuple[TimeSpan, ...]


@dataclass(frozen=True)
class SampledClip:
    """The frames that stages measure.

    `small_frames` [F, h, w, 3] are at SAMPLED_FPS; `full_frames` are up to MAX_FULL_FRAMES frames [H, W, 3].
    """

    small_frames: np.ndarray
    full_frames: list[np.ndarray]


class ClipShape(TypedDict):
    """The shape of a written clip."""

    width: int
    height: int
    fps: float
    frames: int


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file's container and video stream; raise UnreadableMedia for anything that a decoder raises."""
    try:
        with open_container(path, sniff_demuxer(path), TRAINING_LIMITS) as container:
            stream = select_video_stream(container, GUARD)
            stream.codec_context.thread_count = 1  # each core already has a process
            yield container, stream
    except av.FFmpegError as error:
        GUARD.refuse_media(f"is damaged or cut short ({error.strerror}); allowed: a complete file")


def sniff_demuxer(path: Path) -> str:
    """Return FFmpeg's name of the file's format; raise UnreadableMedia if it is not a clip."""
    try:
        with path.open("rb") as file:
            demuxer = sniff_format(file.read(16))
    except OSError as error:
        GUARD.refuse_media(f"is damaged or cut short ({error.strerror}); allowed: a complete file")
    if demuxer not in CLIP_DEMUXERS:
        GUARD.refuse_media(f"is not a video; allowed: {', '.join(VIDEO_SUFFIXES)}")
    return demuxer


def read_fps(stream: VideoStream) -> float:
    """Return the mean frames per second that the header declares."""
    return float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)


def decode_frames(
    container: InputContainer, stream: VideoStream, start: float = 0.0
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield times in s since the file's first frame, and frames, starting with the frame at `start`."""
    time_base = stream.time_base or Fraction(1)
    origin = float((stream.start_time or 0) * time_base)
    if start:
        container.seek(int((start + origin) / time_base), stream=stream, backward=True)
    for frame, frame_start, _ in decode_stream(container, stream, GUARD):
        time = frame_start - origin
        if time >= start - 0.25 / read_fps(stream):
            yield time, frame


def read_frame_size(path: Path) -> tuple[int, int]:
    """Return width and height without decoding."""
    with open_video(path) as (_, stream):
        if not (stream.width and stream.height):
            raise UnreadableMedia("source", "has no frame size; allowed: a complete file")
        return stream.width, stream.height


def survey_video(path: Path, max_scene_seconds: float) -> VideoSurvey:
    """Decode the file once to check that it is complete and to find its cuts; longer scenes are split evenly.

    Raises UnreadableMedia for a damaged file.
    """
    detectors = import_optional("scenedetect.detectors", "scenedetect-headless")
    scenedetect = import_optional("scenedetect")
    with open_video(path) as (container, stream):
        fps = read_fps(stream)
        detector = detectors.AdaptiveDetector(min_scene_len=MIN_SCENE_SECONDS)
        times: list[float] = []
        cuts: list[int] = []
        is_rotated = False
        for time, frame in decode_frames(container, stream):
            timecode = scenedetect.FrameTimecode(len(times), fps)
            bgr_pixels = to_upright_pixels(frame, CUT_DETECTION_SIDE)[..., ::-1].copy()
            cuts += [cut.frame_num for cut in detector.process_frame(timecode, bgr_pixels)]
            times.append(time)
            is_rotated = read_display_matrix(frame)[0] == 0
        check_complete(len(times), stream, container.duration, fps)
        end = times[-1] + 1 / fps
        size = (stream.height, stream.width) if is_rotated else (stream.width, stream.height)
    boundaries = [0.0, *(times[cut] for cut in sorted(set(cuts)) if 0 < cut < len(times)), end]
    return VideoSurvey(*size, round(fps, 4), end, tuple(split_scenes(boundaries, max_scene_seconds)))


def check_complete(frames: int, stream: VideoStream, duration: int | None, fps: float) -> None:
    """Raise UnreadableMedia if frames are missing: FFmpeg reads a truncated file to its end without an error."""
    expected = count_declared_frames(stream) or int((duration or 0) / av.time_base * fps)
    if frames == 0 or frames < 0.98 * expected - 2:
        raise UnreadableMedia("source", f"is cut short: it has {frames} frames of {expected}; allowed: a complete file")


def split_scenes(boundaries: list[float], max_scene_seconds: float) -> Iterator[TimeSpan]:
    """Yield the spans between boundaries, with longer ones split into equal parts."""
    for start, stop in itertools.pairwise(boundaries):
        part_count = max(1, int(np.ceil((stop - start) / max_scene_seconds)))
        edges = [round(float(edge), 4) for edge in np.linspace(start, stop, part_count + 1)]
        yield from itertools.pairwise(edges)


def decode_span(
    container: InputContainer, stream: VideoStream, span: TimeSpan
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield the times and frames of a scene."""
    slack = 0.25 / read_fps(stream)
    for time, frame in decode_frames(container, stream, span[0]):
        if time >= span[1] - slack:
            return
        yield time, frame


def sample_clip(path: Path, span: TimeSpan) -> SampledClip:
    """Return the frames of a scene that stages measure.

    Raises UnreadableMedia for a span without a frame; a file with uneven frame times may have one.
    """
    start, stop = span
    last_frame, next_small_time = None, start
    small_frames: list[np.ndarray] = []
    full_frames: list[np.ndarray] = []
    full_times = list(start + (stop - start) * (np.arange(MAX_FULL_FRAMES) + 0.5) / MAX_FULL_FRAMES)
    with open_video(path) as (container, stream):
        for time, frame in decode_span(container, stream, span):
            if time >= next_small_time - 1e-3:
                small_frames.append(to_upright_pixels(frame, SMALL_FRAME_SIDE))
                next_small_time += 1 / SAMPLED_FPS
            if full_times and time >= full_times[0] - 1e-3:
                full_frames.append(to_upright_pixels(frame))
                full_times = [full_time for full_time in full_times if full_time - 1e-3 > time]
            last_frame = frame
        if last_frame is None:
            raise UnreadableMedia("source", f"has no frame from {start:.2f} to {stop:.2f} s; allowed: one or more")
        small_frames = small_frames or [to_upright_pixels(last_frame, SMALL_FRAME_SIDE)]
        full_frames = full_frames or [to_upright_pixels(last_frame)]
    return SampledClip(np.stack(small_frames), full_frames)


def write_clip(path: Path, span: TimeSpan, target: Path) -> ClipShape:
    """Write the scene as H.264 without sound, atomically and with the same bytes every time; return its shape."""
    partial_path = target.with_suffix(".part")
    with open_video(path) as (container, stream):
        rate = Fraction(stream.average_rate or stream.guessed_rate or DEFAULT_FPS).limit_denominator(1001)
        frames = ((time, to_upright_pixels(frame)) for time, frame in decode_span(container, stream, span))
        with partial_path.open("wb") as file:
            height, width, count = encode_into(file, frames, rate)
    os.replace(partial_path, target)
    return {"width": width, "height": height, "fps": round(float(rate), 4), "frames": count}


def encode_into(file: BinaryIO, frames: Iterator[tuple[float, np.ndarray]], rate: Fraction) -> tuple[int, int, int]:
    """Encode frames with their times in s, which may be uneven; `rate` is the mean rate that the header declares.

    Return the height, the width and the number of frames. An odd last row or column is dropped.
    """
    count, height, width, first_time, tick = 0, 0, 0, 0.0, -1
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = add_h264_stream(container, rate, crf=16)
        stream.codec_context.time_base = CLIP_TIME_BASE
        for time, pixels in frames:
            if not count:
                first_time, height, width = time, pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
                stream.height, stream.width = height, width
            frame = rgb_to_yuv(pixels[:height, :width])
            tick = max(tick + 1, round((time - first_time) / CLIP_TIME_BASE))
            frame.pts, frame.time_base, count = tick, CLIP_TIME_BASE, count + 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return height, width, count

"""Files into scenes, scenes into sampled frames, frames into files.  Pixels are uint8 [F, H, W, 3], RGB.

A scene is a span of presentation times in seconds, so that a file of uneven frame times is cut where it was seen.
"""

import importlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from omnivideo.errors import MissingDependency, UnreadableMedia

VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi")
SAMPLED_FPS = 8  # of the frames that motion is measured on
SMALL_FRAME_SIDE = 192  # px, their longer side
MAX_FULL_FRAMES = 8  # full frames of a clip, evenly spread, for all that is measured on single frames
CUT_DETECTION_SIDE = 256  # px, the longer side on which cuts are looked for
CLIP_TIME_BASE = Fraction(1, 90_000)  # s, in which kept clips have their frames' times
MIN_SCENE_SECONDS = 0.3  # s: two cuts nearer than this are a flash

TimeSpan = tuple[float, float]


def import_optional(module: str, package: str | None = None) -> Any:
    """An optional module; NotInstalled where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingDependency(f"curation needs {package or module}: pip install 'omnivideo[curate]'") from None


@dataclass(frozen=True)
class VideoSurvey:
    """A file as its header and its first decoding tell; `spans` are its scenes."""

    width: int
    height: int
    fps: float
    seconds: float
    spans: tuple[TimeSpan, ...]


@dataclass(frozen=True)
class SampledClip:
    """A clip as the stages see it: `small` [F, h, w, 3] at SAMPLED_FPS, and at most LOOKS whole frames [H, W, 3]."""

    small_frames: np.ndarray
    full_frames: list[np.ndarray]


@contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; whatever a decoder raises on bad bytes becomes UnreadableMedia."""
    try:
        with av.open(f"file:{path}") as container:
            if not container.streams.video:
                raise UnreadableMedia("source", "has no video stream; allowed: a video")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # one process a core already
            yield container, stream
    except av.FFmpegError as error:
        raise UnreadableMedia("source", f"is damaged or cut short ({error.strerror}); allowed: a whole file") from error


def decode_frames(container: Any, stream: Any, start: float = 0.0) -> Iterator[tuple[float, Any]]:
    """Times (from the first frame of the file) and frames, from the frame at `start` on."""
    origin = float((stream.start_time or 0) * stream.time_base)
    rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
    if start:
        container.seek(int((start + origin) / stream.time_base), stream=stream, backward=True)
    next_time = 0.0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise UnreadableMedia("source", "is cut short or damaged midway; allowed: a whole file")
        for frame in packet.decode():
            time = next_time if frame.time is None else frame.time - origin
            next_time = time + 1 / rate
            if time >= start - 0.25 / rate:
                yield time, frame


def to_upright_pixels(frame: Any, max_side: int | None = None) -> np.ndarray:
    """Pixels [H, W, 3] as the display matrix turns them; the longer side is at most `longest`."""
    scale = min(1.0, max_side / max(frame.width, frame.height)) if max_side else 1.0
    width, height = (max(2, round(side * scale)) for side in (frame.width, frame.height))
    return np.rot90(frame.to_ndarray(format="rgb24", width=width, height=height), round(frame.rotation / 90))


def read_frame_size(path: Path) -> tuple[int, int]:
    """Width and height, without decoding."""
    with open_video(path) as (_, stream):
        if not (stream.width and stream.height):
            raise UnreadableMedia("source", "has no frame size; allowed: a whole file")
        return stream.width, stream.height


def survey_video(path: Path, max_scene_seconds: float) -> VideoSurvey:
    """Decodes the whole file once: is it whole, and where are its cuts?  Scenes above `longest` s are parted evenly."""
    detectors, scenedetect = (
        import_optional("scenedetect.detectors", "scenedetect-headless"),
        import_optional("scenedetect"),
    )
    with open_video(path) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
        detector = detectors.AdaptiveDetector(min_scene_len=MIN_SCENE_SECONDS)
        times: list[float] = []
        cuts: list[int] = []
        is_rotated = False
        for time, frame in decode_frames(container, stream):
            timecode = scenedetect.FrameTimecode(len(times), fps)
            cuts += [
                cut.frame_num
                for cut in detector.process_frame(
                    timecode, to_upright_pixels(frame, CUT_DETECTION_SIDE)[..., ::-1].copy()
                )
            ]
            times.append(time)
            is_rotated = round(frame.rotation / 90) % 2 == 1
        check_complete(len(times), stream, container.duration, fps)
        end = times[-1] + 1 / fps
        size = (stream.height, stream.width) if is_rotated else (stream.width, stream.height)
    marks = [0.0, *(times[cut] for cut in sorted(set(cuts)) if 0 < cut < len(times)), end]
    return VideoSurvey(*size, round(fps, 4), end, tuple(split_scenes(marks, max_scene_seconds)))


def check_complete(frames: int, stream: Any, duration: int | None, fps: float) -> None:
    """FFmpeg ends a file that was cut without a word: what the header promises must have come."""
    expected = stream.frames or int((duration or 0) / av.time_base * fps)
    if frames == 0 or frames < 0.98 * expected - 2:
        raise UnreadableMedia("source", f"is cut short: it has {frames} frames of {expected}; allowed: a whole file")


def split_scenes(marks: list[float], max_scene_seconds: float) -> Iterator[TimeSpan]:
    for start, stop in itertools.pairwise(marks):
        edges = np.linspace(start, stop, max(1, int(np.ceil((stop - start) / max_scene_seconds))) + 1)
        yield from ((round(float(a), 4), round(float(b), 4)) for a, b in itertools.pairwise(edges))


def decode_span(container: Any, stream: Any, span: TimeSpan) -> Iterator[tuple[float, Any]]:
    """The frames of a scene, with their times."""
    slack = 0.25 / (float(stream.average_rate or stream.guessed_rate or 0) or 25.0)
    for time, frame in decode_frames(container, stream, span[0]):
        if time >= span[1] - slack:
            return
        yield time, frame


def sample_clip(path: Path, span: TimeSpan) -> SampledClip:
    """Raises UnreadableMedia for a span without a frame: a file of uneven frame times may jump over it."""
    start, stop = span
    last, due_small, small_frames = None, start, []
    moments, full_frames = list(start + (stop - start) * (np.arange(MAX_FULL_FRAMES) + 0.5) / MAX_FULL_FRAMES), []
    with open_video(path) as (container, stream):
        for time, frame in decode_span(container, stream, span):
            if time >= due_small - 1e-3:
                small_frames.append(to_upright_pixels(frame, SMALL_FRAME_SIDE))
                due_small += 1 / SAMPLED_FPS
            if moments and time >= moments[0] - 1e-3:
                full_frames.append(to_upright_pixels(frame))
                moments = [moment for moment in moments if moment - 1e-3 > time]
            last = frame
        if last is None:
            raise UnreadableMedia("source", f"has no frame from {start:.2f} to {stop:.2f} s; allowed: one or more")
        small_frames, full_frames = (
            small_frames or [to_upright_pixels(last, SMALL_FRAME_SIDE)],
            full_frames or [to_upright_pixels(last)],
        )
    return SampledClip(np.stack(small_frames), full_frames)


def write_clip(path: Path, span: TimeSpan, target: Path) -> dict:
    """The scene as H.264 without sound, whole or not at all, the same bytes every time; returns what it holds."""
    partial_path = target.with_suffix(".part")
    with open_video(path) as (container, stream):
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25).limit_denominator(1001)
        frames = ((time, to_upright_pixels(frame)) for time, frame in decode_span(container, stream, span))
        with partial_path.open("wb") as file:
            height, width, count = encode_into(file, frames, rate)
    os.replace(partial_path, target)
    return {"width": width, "height": height, "fps": round(float(rate), 4), "frames": count}


def encode_into(file: BinaryIO, frames: Iterator[tuple[float, np.ndarray]], rate: Fraction) -> tuple[int, int, int]:
    """Frames at their times, in s and counted from the first; `rate` is that of the stream.

    Returns height and width (even: an odd last row or column is left out), and the number of frames.
    """
    count, height, width, first_time, tick = 0, 0, 0, 0.0, -1
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as out:
        output_stream = out.add_stream(
            "libx264", rate=rate, options={"crf": "16", "flags": "+bitexact", "x264-params": "mbtree=0"}
        )
        output_stream.pix_fmt, output_stream.codec_context.thread_count = "yuv420p", 1
        output_stream.codec_context.time_base = CLIP_TIME_BASE
        for time, pixels in frames:
            if not count:
                first_time, height, width = time, pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
                output_stream.height, output_stream.width = height, width
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
            tick = max(tick + 1, round((time - first_time) / CLIP_TIME_BASE))
            frame.pts, frame.time_base, count = tick, CLIP_TIME_BASE, count + 1
            out.mux(output_stream.encode(frame))
        out.mux(output_stream.encode())
    return height, width, count

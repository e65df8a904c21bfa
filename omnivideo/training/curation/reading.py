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

from omnivideo.errors import NotInstalled, UnreadableMedia

SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi")
SAMPLED_FPS = 8  # of the frames that motion is measured on
SMALL = 192  # px, their longer side
LOOKS = 8  # full frames of a clip, evenly spread, for all that is measured on single frames
DETECTED = 256  # px, the longer side on which cuts are looked for
TICK = Fraction(1, 90_000)  # s, in which kept clips have their frames' times
SHORTEST_SCENE = 0.3  # s: two cuts nearer than this are a flash

Span = tuple[float, float]


def needed(module: str, package: str | None = None) -> Any:
    """An optional module; NotInstalled where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise NotInstalled(f"curation needs {package or module}: pip install 'omnivideo[curate]'") from None


@dataclass(frozen=True)
class Source:
    """A file as its header and its first decoding tell; `spans` are its scenes."""

    width: int
    height: int
    fps: float
    seconds: float
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Sampled:
    """A clip as the stages see it: `small` [F, h, w, 3] at SAMPLED_FPS, and at most LOOKS whole frames [H, W, 3]."""

    small: np.ndarray
    looks: list[np.ndarray]


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
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


def decoded(container: Any, stream: Any, start: float = 0.0) -> Iterator[tuple[float, Any]]:
    """Times (from the first frame of the file) and frames, from the frame at `start` on."""
    origin = float((stream.start_time or 0) * stream.time_base)
    rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
    if start:
        container.seek(int((start + origin) / stream.time_base), stream=stream, backward=True)
    following = 0.0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise UnreadableMedia("source", "is cut short or damaged midway; allowed: a whole file")
        for frame in packet.decode():
            time = following if frame.time is None else frame.time - origin
            following = time + 1 / rate
            if time >= start - 0.25 / rate:
                yield time, frame


def upright(frame: Any, longest: int | None = None) -> np.ndarray:
    """Pixels [H, W, 3] as the display matrix turns them; the longer side is at most `longest`."""
    scale = min(1.0, longest / max(frame.width, frame.height)) if longest else 1.0
    width, height = (max(2, round(side * scale)) for side in (frame.width, frame.height))
    return np.rot90(frame.to_ndarray(format="rgb24", width=width, height=height), round(frame.rotation / 90))


def header(path: Path) -> tuple[int, int]:
    """Width and height, without decoding."""
    with opened(path) as (_, stream):
        if not (stream.width and stream.height):
            raise UnreadableMedia("source", "has no frame size; allowed: a whole file")
        return stream.width, stream.height


def survey(path: Path, longest: float) -> Source:
    """Decodes the whole file once: is it whole, and where are its cuts?  Scenes above `longest` s are parted evenly."""
    detectors, scenedetect = needed("scenedetect.detectors", "scenedetect-headless"), needed("scenedetect")
    with opened(path) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
        detector = detectors.AdaptiveDetector(min_scene_len=SHORTEST_SCENE)
        times: list[float] = []
        cuts: list[int] = []
        turned = False
        for time, frame in decoded(container, stream):
            at = scenedetect.FrameTimecode(len(times), fps)
            cuts += [cut.frame_num for cut in detector.process_frame(at, upright(frame, DETECTED)[..., ::-1].copy())]
            times.append(time)
            turned = round(frame.rotation / 90) % 2 == 1
        check_whole(len(times), stream, container.duration, fps)
        end = times[-1] + 1 / fps
        size = (stream.height, stream.width) if turned else (stream.width, stream.height)
    marks = [0.0, *(times[cut] for cut in sorted(set(cuts)) if 0 < cut < len(times)), end]
    return Source(*size, round(fps, 4), end, tuple(parted(marks, longest)))


def check_whole(frames: int, stream: Any, duration: int | None, fps: float) -> None:
    """FFmpeg ends a file that was cut without a word: what the header promises must have come."""
    promised = stream.frames or int((duration or 0) / av.time_base * fps)
    if frames == 0 or frames < 0.98 * promised - 2:
        raise UnreadableMedia("source", f"is cut short: it has {frames} frames of {promised}; allowed: a whole file")


def parted(marks: list[float], longest: float) -> Iterator[Span]:
    for start, stop in itertools.pairwise(marks):
        edges = np.linspace(start, stop, max(1, int(np.ceil((stop - start) / longest))) + 1)
        yield from ((round(float(a), 4), round(float(b), 4)) for a, b in itertools.pairwise(edges))


def within(container: Any, stream: Any, span: Span) -> Iterator[tuple[float, Any]]:
    """The frames of a scene, with their times."""
    slack = 0.25 / (float(stream.average_rate or stream.guessed_rate or 0) or 25.0)
    for time, frame in decoded(container, stream, span[0]):
        if time >= span[1] - slack:
            return
        yield time, frame


def sample(path: Path, span: Span) -> Sampled:
    """Raises UnreadableMedia for a span without a frame: a file of uneven frame times may jump over it."""
    start, stop = span
    last, due_small, small = None, start, []
    moments, looks = list(start + (stop - start) * (np.arange(LOOKS) + 0.5) / LOOKS), []
    with opened(path) as (container, stream):
        for time, frame in within(container, stream, span):
            if time >= due_small - 1e-3:
                small.append(upright(frame, SMALL))
                due_small += 1 / SAMPLED_FPS
            if moments and time >= moments[0] - 1e-3:
                looks.append(upright(frame))
                moments = [moment for moment in moments if moment - 1e-3 > time]
            last = frame
        if last is None:
            raise UnreadableMedia("source", f"has no frame from {start:.2f} to {stop:.2f} s; allowed: one or more")
        small, looks = small or [upright(last, SMALL)], looks or [upright(last)]
    return Sampled(np.stack(small), looks)


def write_clip(path: Path, span: Span, target: Path) -> dict:
    """The scene as H.264 without sound, whole or not at all, the same bytes every time; returns what it holds."""
    part = target.with_suffix(".part")
    with opened(path) as (container, stream):
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25).limit_denominator(1001)
        frames = ((time, upright(frame)) for time, frame in within(container, stream, span))
        with part.open("wb") as file:
            height, width, count = encode_into(file, frames, rate)
    os.replace(part, target)
    return {"width": width, "height": height, "fps": round(float(rate), 4), "frames": count}


def encode_into(file: BinaryIO, frames: Iterator[tuple[float, np.ndarray]], rate: Fraction) -> tuple[int, int, int]:
    """Frames at their times, in s and counted from the first; `rate` is that of the stream.

    Returns height and width (even: an odd last row or column is left out), and the number of frames.
    """
    count, height, width, first, place = 0, 0, 0, 0.0, -1
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as out:
        made = out.add_stream(
            "libx264", rate=rate, options={"crf": "16", "flags": "+bitexact", "x264-params": "mbtree=0"}
        )
        made.pix_fmt, made.codec_context.thread_count = "yuv420p", 1
        made.codec_context.time_base = TICK
        for time, pixels in frames:
            if not count:
                first, height, width = time, pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
                made.height, made.width = height, width
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
            place = max(place + 1, round((time - first) / TICK))
            frame.pts, frame.time_base, count = place, TICK, count + 1
            out.mux(made.encode(frame))
        out.mux(made.encode())
    return height, width, count

"""Files into pixels and back.  Pixels are uint8 [F, H, W, 3], RGB.

Reading trusts nothing: the file's content decides what it is, and every limit is checked on the header, before
anything is decoded, and again on what comes out.  Stills and animations (png, jpeg, webp, gif) are read by Pillow,
because FFmpeg takes a gif that is cut short without a word; clips (mp4, mov, webm, mkv, avi) by PyAV.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal, NoReturn

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Colorspace, Interpolation
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from omnivideo.errors import UnreadableMedia
from omnivideo.media.containers import read_stated_size, sniff_format

READABLE_FORMATS = "mp4, mov, webm, mkv, avi, gif, png, jpeg or webp"
WRITABLE_SUFFIXES = (".mp4", ".gif", ".png")
CLIP_DEMUXERS = ("mov", "matroska", "avi")  # FFmpeg's names of the demuxers we let it use: no playlists, no network
MIN_HD_HEIGHT = 720  # px; untagged video of this height or more is BT.709, below it BT.601
# FFmpeg's own default rounds down, which darkens a clip by one level at every save and load.
EXACT_INTERPOLATION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

TimedFrame = tuple[np.ndarray, float, float]  # pixels [H, W, 3], and from when and for how long it is shown, in s
ClipFrames = Sequence[np.ndarray] | np.ndarray  # frames [H, W, 3] of one size, or one array [F, H, W, 3]


@dataclass(frozen=True)
class MediaLimits:
    """What a source may be at most.  `max_decoded` is the memory that its pixels take, in bytes.

    `codecs` are FFmpeg's names of the decoders that may run; None leaves all.
    """

    max_bytes: int = 512 * 2**20
    max_frame_pixels: int = 4096 * 2304
    max_frames: int = 2000
    max_seconds: float = 120
    max_fps: float = 240
    max_streams: int = 32
    max_decoded_bytes: int = 4 * 2**30
    codecs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class DecodedMedia:
    """A source's pixels, uint8 [F, H, W, 3], frames evenly spaced at `fps`; a still has one frame and no fps."""

    frames: np.ndarray
    fps: float | None
    kind: Literal["image", "video"]


@dataclass(frozen=True)
class MediaInfo:
    """What a source comes to as Media, without its pixels: `frames` is their number."""

    width: int
    height: int
    frames: int
    fps: float | None
    kind: Literal["image", "video"]


@dataclass(frozen=True)
class MediaGuard:
    """Refuses what cannot be read: one line with the file's name, what is wrong and the allowed range."""

    path: Path
    limits: MediaLimits

    def refuse_media(self, problem: str) -> NoReturn:
        raise UnreadableMedia("source", f"{printable_name(self.path)} {problem}")

    def check_at_most(self, quantity: str, value: float, limit: float) -> None:
        if value > limit:
            self.refuse_media(f"has {value:.12g} {quantity}; allowed: 1 to {limit:.12g}")

    def check_dimensions(self, width: int, height: int, frames: int, seconds: float) -> None:
        self.check_at_most("pixels a frame", width * height, self.limits.max_frame_pixels)
        self.check_at_most("frames", frames, self.limits.max_frames)
        self.check_at_most("seconds", seconds, self.limits.max_seconds)
        self.check_at_most("bytes of pixels", width * height * frames * 3, self.limits.max_decoded_bytes)

    @contextmanager
    def translate_decoder_errors(self) -> Iterator[None]:
        """Turns whatever a decoder raises on hostile bytes into one refusal."""
        try:
            yield
        except UnreadableMedia:
            raise
        except Image.DecompressionBombError:
            self.refuse_media(f"has too many pixels a frame; allowed: 1 to {self.limits.max_frame_pixels}")
        except MemoryError as error:  # FFmpeg's answer to many a damaged header, too
            problem = "is damaged, or needs more memory than there is; allowed: a shorter or smaller source"
            raise UnreadableMedia("source", f"{printable_name(self.path)} {problem}") from error
        except Exception as error:
            problem = f"is damaged, cut short or of an unknown codec; allowed: a whole {READABLE_FORMATS}"
            raise UnreadableMedia("source", f"{printable_name(self.path)} {problem}") from error


def printable_name(path: Path) -> str:
    """The file's name for a message: no folder, and on one line whatever it holds."""
    return "'" + "".join(char if char.isprintable() else "?" for char in path.name or str(path)) + "'"


# ---------------------------------------------------------------- reading


def read_media(path: str | Path, limits: MediaLimits = MediaLimits()) -> DecodedMedia:
    """Every frame of a still, an animation or a clip, upright, alpha on white; UnreadableMedia where it cannot be.

    A clip with uneven frame times is laid on an even grid by repeating frames.  An animation of one frame is an image.
    """
    frames: list[np.ndarray] = []
    guard = MediaGuard(Path(path), limits)
    with guard.translate_decoder_errors():
        order, fps, kind = decode_frames(guard, frames.append)
        return DecodedMedia(np.stack([frames[index] for index in order]), fps, kind)


def measure_media(path: str | Path, limits: MediaLimits = MediaLimits()) -> MediaInfo:
    """What read_media would give or refuse, by decoding all the same; one frame at a time is in memory."""
    shapes: list[tuple[int, ...]] = []
    guard = MediaGuard(Path(path), limits)
    with guard.translate_decoder_errors():
        order, fps, kind = decode_frames(guard, lambda pixels: shapes.append(pixels.shape))
    height, width, _ = shapes[0]
    return MediaInfo(width, height, len(order), fps, kind)


def decode_frames(
    guard: MediaGuard, on_frame: Callable[[np.ndarray], object]
) -> tuple[Sequence[int], float | None, Literal["image", "video"]]:
    """Hands every frame to `take`; returns which of them to show at each step, at which fps, and the kind."""
    path, size = guard.path, check_file_size(guard.path, guard)
    with path.open("rb") as file:
        kind = sniff_format(file.read(16))
        if kind is None:
            guard.refuse_media(f"is no image or video; allowed: {READABLE_FORMATS}")
        if size < read_stated_size(file, kind, size):
            guard.refuse_media(f"is cut short: it ends after {size} bytes; allowed: a whole file")
    if kind in CLIP_DEMUXERS:
        return *collect_frames(iterate_clip_frames(path, kind, guard), guard, on_frame), "video"
    order, fps = collect_frames(iterate_image_frames(path, kind, guard), guard, on_frame)
    return (order, fps, "video") if len(order) > 1 else (order, None, "image")


def check_file_size(path: Path, guard: MediaGuard) -> int:
    """The file's bytes, without opening it."""
    try:
        file_stat = path.stat()
    except (OSError, ValueError) as error:
        guard.refuse_media(f"cannot be read: {getattr(error, 'strerror', None) or 'not a file name'}")
    if not path.is_file():  # a folder, a pipe or a device
        guard.refuse_media("is not a file" if not path.is_dir() else "is a folder, not a file")
    if not os.access(path, os.R_OK):
        guard.refuse_media("cannot be read: permission denied")
    if file_stat.st_size == 0:
        guard.refuse_media(f"is empty; allowed: 1 to {guard.limits.max_bytes} bytes")
    guard.check_at_most("bytes", file_stat.st_size, guard.limits.max_bytes)
    return file_stat.st_size


def collect_frames(
    timed_frames: Iterator[TimedFrame], guard: MediaGuard, on_frame: Callable[[np.ndarray], object]
) -> tuple[Sequence[int], float]:
    """Hands every picture's pixels to `take`; returns their order on an even grid, and its fps."""
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
    guard.check_at_most("frames a second", fps, guard.limits.max_fps)
    return order, fps


def build_even_grid(starts: np.ndarray, end: float, guard: MediaGuard) -> tuple[Sequence[int], float]:
    """Which frame to show at each step of an even grid, and its steps a second.

    `starts` are rising times from 0, in s.  Times that are even to within a quarter of a step are taken as they are.
    """
    if len(starts) == 1:
        return [0], 1 / end
    steps = np.arange(len(starts))
    fps = steps[-1] / starts[-1]
    if np.abs(starts * fps - steps).max() <= 0.25 and end * fps < len(starts) + 0.5:  # and no long hold at the end
        return range(len(starts)), round(float(fps), 4)
    step = float(np.median(np.diff(starts)))
    guard.check_at_most("frames", end // step, guard.limits.max_frames)  # a step of a nanosecond would fill the memory
    middles = (np.arange(round(end / step)) + 0.5) * step
    return [int(index) for index in np.searchsorted(starts, middles, side="right") - 1], round(1 / step, 4)


def iterate_image_frames(path: Path, kind: str, guard: MediaGuard) -> Iterator[TimedFrame]:
    """The pictures of a png, jpeg, webp or gif."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's hints at odd metadata and at sizes that we check ourselves
        with Image.open(path, formats=(kind,)) as image:
            promised_frames = (
                getattr(image, "n_frames", 1) if kind in ("png", "webp") else 1
            )  # a gif must be read to know
            guard.check_dimensions(*image.size, promised_frames, 0)
            start = 0.0
            for index in count(1):
                image.load()
                seconds = read_frame_seconds(image)
                yield composite_on_white(ImageOps.exif_transpose(image)), start, seconds
                start += seconds
                if kind == "jpeg" or not seek_frame(image, index):  # a phone's jpeg may hide a second view: not a clip
                    break
            if index < promised_frames:
                guard.refuse_media(f"is cut short: it has {index} frames of {promised_frames}; allowed: a whole file")


def seek_frame(image: Image.Image, index: int) -> bool:
    """Goes to picture `index` of an animation; False at its end."""
    try:
        image.seek(index)
    except EOFError:
        return False
    return True


def read_frame_seconds(image: Image.Image) -> float:
    """Seconds that a picture of an animation is shown: as in browsers, 10 ms and less mean 100 ms."""
    duration_ms = image.info.get("duration")  # a png's text may hold anything under this name
    return duration_ms / 1000 if isinstance(duration_ms, int | float) and duration_ms > 10 else 0.1


def composite_on_white(image: Image.Image) -> np.ndarray:
    """Pixels uint8 [H, W, 3], alpha composited on white."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.asarray(image, dtype=np.int64) >> 8
        return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return np.asarray(image.convert("RGB"))


def iterate_clip_frames(path: Path, kind: str, guard: MediaGuard) -> Iterator[TimedFrame]:
    """The pictures of an mp4, mov, webm, mkv or avi."""
    with av.open(f"file:{path}", format=kind, options=build_container_options(guard.limits)) as container:
        guard.check_at_most("streams", len(container.streams), guard.limits.max_streams)
        video_streams = [
            s for s in container.streams.video if not s.disposition & Disposition.attached_pic
        ]  # cover art
        if not video_streams:
            guard.refuse_media("has no video stream; allowed: 1 or more")
        stream = video_streams[0]
        codec, allowed_codecs = stream.codec_context.name, guard.limits.codecs
        if allowed_codecs is not None and codec not in allowed_codecs:
            guard.refuse_media(f"is coded as {codec}; allowed: {', '.join(allowed_codecs)}")
        seconds = (stream.duration or 0) * float(stream.time_base or 0) or (container.duration or 0) / av.time_base
        promised_frames = count_promised_frames(stream)
        guard.check_dimensions(stream.width, stream.height, promised_frames, seconds)
        stream.codec_context.options = {"max_pixels": str(guard.limits.max_frame_pixels)}  # for a header that lies
        frame_count = 0
        for timed_frame in decode_stream(container, stream, guard):
            frame_count += 1
            yield timed_frame
        if frame_count < promised_frames:
            guard.refuse_media(f"is cut short: it has {frame_count} frames of {promised_frames}; allowed: a whole file")


def build_container_options(limits: MediaLimits) -> dict[str, str]:
    """FFmpeg's options for a container of which nothing is known: no other file, no network, few streams.

    One stream above the limit is let in, so that it is we who refuse.
    """
    options = {"protocol_whitelist": "file", "max_streams": str(limits.max_streams + 1)}
    return options | ({"codec_whitelist": ",".join(limits.codecs)} if limits.codecs is not None else {})


def count_promised_frames(stream: VideoStream) -> int:
    """Frames that the header promises, less those that its edit list cuts away; 0 where it does not say."""
    indexed = sum(not entry.is_discard for entry in stream.index_entries) if stream.frames else 0
    return min(stream.frames, indexed)


def decode_stream(
    container: av.container.InputContainer, stream: VideoStream, guard: MediaGuard
) -> Iterator[TimedFrame]:
    """The frames of a stream in the order of their times, which rise even where the file's do not."""
    default_seconds = 1 / float(stream.average_rate or stream.guessed_rate or 1)
    expected_start = 0.0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            guard.refuse_media("is cut short or damaged midway; allowed: a whole file")
        for frame in packet.decode():
            seconds = float((frame.duration or 0) * (frame.time_base or 0)) or default_seconds
            start = (
                frame.time
                if frame.time is not None and frame.time > expected_start - default_seconds
                else expected_start
            )
            expected_start = start + default_seconds
            yield to_upright_pixels(frame), start, seconds


def to_upright_pixels(frame: av.VideoFrame) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of a frame, turned as its display matrix says."""
    alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    untagged_hd = frame.colorspace == Colorspace.DEFAULT and frame.height >= MIN_HD_HEIGHT and not frame.format.is_rgb
    space = Colorspace.ITU709 if untagged_hd else None
    pixels = frame.to_ndarray(
        format="rgba" if alpha else "rgb24", src_colorspace=space, interpolation=EXACT_INTERPOLATION
    )
    if alpha:
        pixels = composite_on_white(Image.fromarray(pixels))
    return np.rot90(pixels, round(frame.rotation / 90))


# ---------------------------------------------------------------- fitting


def fit_media(media: DecodedMedia, width: int, height: int, frames: int, fps: float) -> np.ndarray:
    """The source as the model wants it: uint8 [frames, height, width, 3].

    Cropped at the centre to the aspect ratio, resized, and resampled in time by nearest frame.  A longer source is
    cut, a shorter one repeats its last frame, a still gives copies.
    """
    frame_indices = np.floor(np.arange(frames) * (media.fps or 0) / fps + 0.5).astype(int)
    frame_indices = frame_indices.clip(max=len(media.frames) - 1)
    resized = {
        moment: center_crop_resize(media.frames[moment], width, height) for moment in set(frame_indices.tolist())
    }
    return np.stack([resized[moment] for moment in frame_indices.tolist()])


def center_crop_resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """The largest centred box of the wanted aspect ratio, resized to [height, width, 3]."""
    full_height, full_width = pixels.shape[:2]
    scale = min(full_width / width, full_height / height)
    left = max(0.0, (full_width - width * scale) / 2)
    top = max(0.0, (full_height - height * scale) / 2)
    box = (left, top, full_width - left, full_height - top)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box))


# ---------------------------------------------------------------- writing


# ---------------------------------------------------------------- looking

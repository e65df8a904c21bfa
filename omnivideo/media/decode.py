"""Decode sources into timed frames: stills and animations with Pillow, clips with PyAV.

Pillow reads png, jpeg, webp, avif and gif because FFmpeg accepts a truncated gif without an error. This is the
only code that decodes clips; serving, training and curation all build on it, so they see the same pixels at the same
times.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av import CodecContext
from av.container import InputContainer
from av.sidedata.sidedata import SideDataContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorPrimaries, Colorspace, Interpolation
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from omnivideo.media.limits import MediaGuard, MediaLimits
from omnivideo.media.tone_mapping import HDR_TRANSFERS, tone_map

CLIP_DEMUXERS = ("mov", "matroska", "avi")  # FFmpeg's names of the allowed demuxers: no playlists, no network
ALPHA_DECODERS = {"vp8": "libvpx", "libvpx": "libvpx", "vp9": "libvpx-vp9", "libvpx-vp9": "libvpx-vp9"}
MIN_HD_HEIGHT = 720  # px; untagged video of this height or more is BT.709, below it BT.601
# FFmpeg's own default rounds down, which darkens a clip by one level at every save and load.
EXACT_INTERPOLATION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

MATRIX_BY_QUARTER_TURNS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))  # counter-clockwise
MediaFile = Path | bytes  # a path, or a file's content
TimedVideoFrame = tuple[av.VideoFrame, float, float]  # a frame, and the start and duration of its display in s


@dataclass(frozen=True)
class DecodedFrame:
    """A frame that is shown from `start` for `seconds`; `size` is its upright width and height, `layout` its format.

    `convert` returns its pixels uint8 [H, W, 3], and has to be called before the next frame is decoded. A frame that is
    only measured or skipped is not converted.
    """

    size: tuple[int, int]
    layout: str
    start: float
    seconds: float
    convert: Callable[[], np.ndarray]


# ---------------------------------------------------------------- stills and animations


def iterate_image_frames(file: MediaFile, kind: str, guard: MediaGuard) -> Iterator[DecodedFrame]:
    """Yield the pictures of a png, jpeg, webp, gif, avif or HEIC, reduced if they are larger than a frame may be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata, and about sizes that the guard checks
        declared_frames = count_pictures(file, kind, guard)
        with open_image(file, kind) as image:
            factor = compute_reduction(image.size, guard.limits.max_frame_pixels)
            if kind == "jpeg" and factor > 1:  # the decoder itself reduces: less time, and memory for the result only
                image.draft("RGB", (-(-image.width // factor), -(-image.height // factor)))
            start = 0.0
            for index in count(1):
                image.load()
                seconds = read_frame_seconds(image)
                upright = ImageOps.exif_transpose(reduce_to_pixels(image, guard.limits.max_frame_pixels))
                yield DecodedFrame(upright.size, upright.mode, start, seconds, partial(composite_on_white, upright))
                start += seconds
                # Some phones store a second view in a jpeg or a HEIC; that does not make it a clip.
                if kind in ("jpeg", "heif") or not seek_frame(image, index):
                    break
            if index < declared_frames:
                guard.refuse_media(
                    f"is cut short: it has {index} frames of {declared_frames}; allowed: a complete file"
                )


def count_pictures(file: MediaFile, kind: str, guard: MediaGuard) -> int:
    """Check the size and the number of pictures against the limits before any is decoded; return their number."""
    with open_image(file, kind) as image:
        width, height = image.size
        guard.check_at_most("pixels per frame", width * height, guard.limits.max_still_pixels)
        # A gif is read, but not decoded, for its number of pictures.
        picture_count = 1 if kind in ("jpeg", "heif") else getattr(image, "n_frames", 1)
        factor = compute_reduction(image.size, guard.limits.max_frame_pixels)
        guard.check_dimensions(-(-width // factor), -(-height // factor), picture_count, 0)
    return picture_count


def open_image(file: MediaFile, kind: str) -> Image.Image:
    """Open a picture of unknown origin with one of Pillow's readers."""
    if kind == "heif":
        import pillow_heif

        pillow_heif.register_heif_opener()
    return Image.open(BytesIO(file) if isinstance(file, bytes) else file, formats=(kind,))


def seek_frame(image: Image.Image, index: int) -> bool:
    """Move to picture `index` of an animation; return False at its end."""
    try:
        image.seek(index)
    except EOFError:
        return False
    return True


def read_frame_seconds(image: Image.Image) -> float:
    """Return how many seconds a picture of an animation is shown; 10 ms or less means 100 ms, as in browsers."""
    duration_ms = image.info.get("duration")  # the text chunks of a png may hold anything under this name
    return duration_ms / 1000 if isinstance(duration_ms, int | float) and duration_ms > 10 else 0.1


def composite_on_white(image: Image.Image) -> np.ndarray:
    """Return pixels uint8 [H, W, 3] with alpha composited on white."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.asarray(image, dtype=np.int64) >> 8
        return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return np.asarray(image.convert("RGB"))


def reduce_to_pixels(image: Image.Image, max_pixels: int) -> Image.Image:
    """Return the picture, reduced by the mean of 2, 4 or 8 px along each side, until it has at most `max_pixels`."""
    factor = compute_reduction(image.size, max_pixels)
    if factor == 1:
        return image
    if image.mode.startswith("I"):  # Pillow reduces no 16-bit grey
        image = Image.fromarray(composite_on_white(image)[..., 0])
    elif image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.reduce(factor)


def compute_reduction(size: tuple[int, int], max_pixels: int) -> int:
    """Return the factor by which a picture of this width and height is reduced: 1, 2, 4 or 8."""
    factor = 1
    while factor < 8 and -(-size[0] // factor) * -(-size[1] // factor) > max_pixels:
        factor *= 2
    return factor


# ---------------------------------------------------------------- clips


def iterate_clip_frames(file: MediaFile, demuxer: str, guard: MediaGuard) -> Iterator[DecodedFrame]:
    """Yield the frames of an mp4, mov, webm, mkv or avi; refuse a clip with fewer frames than its header declares."""
    with open_container(file, demuxer, guard.limits) as container:
        stream = select_video_stream(container, guard)
        declared_frames = check_clip_header(container, stream, guard)
        frame_count = 0
        for frame, start, seconds in decode_stream(container, stream, guard):
            frame_count += 1
            size = (frame.width, frame.height)
            upright_size = size if read_display_matrix(frame)[0] else size[::-1]
            yield DecodedFrame(upright_size, frame.format.name, start, seconds, partial(to_upright_pixels, frame))
        check_frame_count(frame_count, declared_frames, guard)


def read_frame_times(file: MediaFile, demuxer: str, guard: MediaGuard) -> list[tuple[float, float]] | None:
    """Return the start and duration of each frame in s, from the packets alone, without decoding.

    Return None if a packet has no time. The times are those of `iterate_clip_frames` as long as every packet holds
    one frame; the caller has to check that.
    """
    packet_times: list[tuple[int, int]] = []
    with open_container(file, demuxer, guard.limits) as container:
        stream = select_video_stream(container, guard)
        declared_frames = check_clip_header(container, stream, guard)
        for packet in container.demux(stream):
            if packet.is_corrupt:
                guard.refuse_media("is cut short or damaged midway; allowed: a complete file")
            if packet.size == 0 or packet.is_discard:  # the last packet flushes the decoder
                continue
            if packet.pts is None or packet.time_base is None:
                return None
            packet_times.append((packet.pts, packet.duration or 0))
        check_frame_count(len(packet_times), declared_frames, guard)
        clock = FrameClock.for_stream(stream)
        time_base = stream.time_base or 0
        return [
            clock.place_frame(float(pts * time_base), float(duration * time_base))
            for pts, duration in sorted(packet_times)
        ]


def open_container(file: MediaFile, demuxer: str, limits: MediaLimits) -> InputContainer:
    """Open a clip of unknown origin with one demuxer, which cannot access other files or the network."""
    source = BytesIO(file) if isinstance(file, bytes) else f"file:{file}"
    return av.open(source, "r", format=demuxer, options=build_container_options(limits))


def build_container_options(limits: MediaLimits) -> dict[str, str]:
    """Return FFmpeg's options for a container of unknown origin.

    One stream above the limit is allowed, so that the guard refuses it with its own message.
    """
    options = {"protocol_whitelist": "file", "max_streams": str(limits.max_streams + 1)}
    return options | ({"codec_whitelist": ",".join(limits.codecs)} if limits.codecs is not None else {})


def select_video_stream(container: InputContainer, guard: MediaGuard) -> VideoStream:
    """Return the first video stream that is not cover art; raise UnreadableMedia if none may be decoded."""
    guard.check_at_most("streams", len(container.streams), guard.limits.max_streams)
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        guard.refuse_media("has no video stream; allowed: 1 or more")
    codec, allowed_codecs = streams[0].codec_context.name, guard.limits.codecs
    if allowed_codecs is not None and codec not in allowed_codecs:
        guard.refuse_media(f"is coded as {codec}; allowed: {', '.join(allowed_codecs)}")
    # The header may be wrong, so the decoder checks the size again.
    streams[0].codec_context.options = {"max_pixels": str(guard.limits.max_frame_pixels)}
    return streams[0]


def check_clip_header(container: InputContainer, stream: VideoStream, guard: MediaGuard) -> int:
    """Check the header's dimensions against the limits; return the number of frames that it declares."""
    seconds = (stream.duration or 0) * float(stream.time_base or 0) or (container.duration or 0) / av.time_base
    declared_frames = count_declared_frames(stream)
    guard.check_dimensions(stream.width, stream.height, declared_frames, seconds)
    return declared_frames


def count_declared_frames(stream: VideoStream) -> int:
    """Return how many frames the header declares, without those that its edit list removes; 0 if it declares none."""
    indexed = sum(not entry.is_discard for entry in stream.index_entries) if stream.frames else 0
    return min(stream.frames, indexed)


def check_frame_count(frame_count: int, declared_frames: int, guard: MediaGuard) -> None:
    """Raise UnreadableMedia if the header declares more frames."""
    if frame_count < declared_frames:
        guard.refuse_media(f"is cut short: it has {frame_count} frames of {declared_frames}; allowed: a complete file")


@dataclass
class FrameClock:
    """Gives frames strictly increasing start times in s, even if the file's times are missing or decrease."""

    default_seconds: float
    expected_start: float = 0.0

    @classmethod
    def for_stream(cls, stream: VideoStream) -> "FrameClock":
        """Return a clock whose default step is the stream's mean frame time."""
        return cls(1 / float(stream.average_rate or stream.guessed_rate or 1))

    def place_frame(self, time: float | None, duration: float) -> tuple[float, float]:
        """Return the start and duration of the next frame, from those in the file."""
        is_rising = time is not None and time > self.expected_start - self.default_seconds
        start = time if time is not None and is_rising else self.expected_start
        self.expected_start = start + self.default_seconds
        return start, duration or self.default_seconds


def decode_stream(container: InputContainer, stream: VideoStream, guard: MediaGuard) -> Iterator[TimedVideoFrame]:
    """Yield a stream's frames in display order, from the container's current position on."""
    clock, decoder = FrameClock.for_stream(stream), choose_decoder(stream, guard)
    for packet in container.demux(stream):
        if packet.is_corrupt:
            guard.refuse_media("is cut short or damaged midway; allowed: a complete file")
        for frame in decoder.decode(packet):
            duration = float((frame.duration or 0) * (frame.time_base or 0))
            yield frame, *clock.place_frame(frame.time, duration)


def choose_decoder(stream: VideoStream, guard: MediaGuard) -> VideoCodecContext:
    """Return the stream's decoder, or for VP8 and VP9 with alpha libvpx's: FFmpeg's own ones drop the alpha."""
    name = ALPHA_DECODERS.get(stream.codec_context.name)
    if name is None or stream.metadata.get("alpha_mode") != "1":
        return stream.codec_context
    decoder = cast(VideoCodecContext, CodecContext.create(name, "r"))
    decoder.extradata = stream.codec_context.extradata
    decoder.thread_count = stream.codec_context.thread_count
    decoder.options = {"max_pixels": str(guard.limits.max_frame_pixels)}
    return decoder


# ---------------------------------------------------------------- pixels of clips


def to_upright_pixels(frame: av.VideoFrame, max_side: int | None = None) -> np.ndarray:
    """Return pixels uint8 [H, W, 3], turned and mirrored by the display matrix; the longer side is at most `max_side`.

    Alpha is composited on white, and HDR is converted to BT.709.
    """
    is_hdr = frame.color_trc in HDR_TRANSFERS and not frame.format.is_rgb
    alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    scale = min(1.0, max_side / max(frame.width, frame.height)) if max_side else 1.0
    pixels = frame.to_ndarray(
        width=max(2, round(frame.width * scale)) if scale < 1 else None,
        height=max(2, round(frame.height * scale)) if scale < 1 else None,
        format=("rgba64le" if alpha else "rgb48le") if is_hdr else "rgba" if alpha else "rgb24",
        src_colorspace=find_colorspace(frame, is_hdr),
        interpolation=EXACT_INTERPOLATION,
    )
    if is_hdr:
        is_bt2020 = frame.color_primaries in (ColorPrimaries.BT2020, ColorPrimaries.UNSPECIFIED)
        colors = tone_map(pixels[..., :3], frame.color_trc, is_bt2020)
        pixels = np.dstack([colors, (pixels[..., 3:] // 257).astype(np.uint8)]) if alpha else colors
    if alpha:
        pixels = composite_on_white(Image.fromarray(pixels))
    return turn_upright(pixels, read_display_matrix(frame))


def find_colorspace(frame: av.VideoFrame, is_hdr: bool) -> Colorspace | None:
    """Return the matrix of a frame whose own one is not used; None for all others."""
    if frame.format.is_rgb:
        return None
    if is_hdr:  # BT.2100 has no other matrix, and many files leave it out
        return Colorspace.BT2020
    is_untagged_hd = frame.colorspace == Colorspace.DEFAULT and frame.height >= MIN_HD_HEIGHT
    return Colorspace.ITU709 if is_untagged_hd else None


def read_display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Return a, b, c and d of the display matrix, as signs: a pixel at (x, y) is shown at (ax + cy, bx + dy).

    An angle that is not a multiple of 90 degrees is rounded to one, as far as that is unambiguous.
    """
    try:
        # frame.side_data would refer to its frame, and keep it in memory until the next garbage collection.
        side_data = cast(Any, SideDataContainer)(frame).get("DISPLAYMATRIX")
    except ValueError:  # PyAV knows no side data newer than itself, and then lists none
        return MATRIX_BY_QUARTER_TURNS[round(frame.rotation / 90) % 4]
    if side_data is None:
        return MATRIX_BY_QUARTER_TURNS[0]
    a, b, _, c, d = np.frombuffer(bytes(side_data), "<i4")[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (-1 if a < 0 else 1), 0, 0, (-1 if d < 0 else 1)
    return 0, (-1 if b < 0 else 1), (-1 if c < 0 else 1), 0


def turn_upright(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Return the pixels in one of the eight orientations."""
    a, b, c, d = matrix
    if a == 0:  # x is shown along y
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: b + d, :: a + c]

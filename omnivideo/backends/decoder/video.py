"""Files into pixels and back.  Pixels are uint8 [F, H, W, 3], RGB.

Reading trusts nothing: the file's content decides what it is, and every limit is checked on the header, before
anything is decoded, and again on what comes out.  Stills and animations (png, jpeg, webp, gif) are read by Pillow,
because FFmpeg takes a gif that is cut short without a word; clips (mp4, mov, webm, mkv, avi) by PyAV.
"""

import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont, ImageOps

from omnivideo.errors import InvalidInput, UnreadableMedia

READABLE_FORMATS = "mp4, mov, webm, mkv, avi, gif, png, jpeg or webp"
WRITABLE_SUFFIXES = (".mp4", ".gif", ".png")
CLIP_DEMUXERS = ("mov", "matroska", "avi")  # FFmpeg's names of the demuxers we let it use: no playlists, no network
STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")  # pictures in an mp4's clothes
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


def sniff_format(head: bytes) -> str | None:
    """The kind of a file from its first 16 bytes: png, jpeg, gif, webp, or one of CLIPS; None for anything else."""
    starts = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"\x1a\x45\xdf\xa3": "matroska"}
    for start, kind in starts.items():
        if head.startswith(start):
            return kind
    if head.startswith(b"RIFF"):
        return {b"WEBP": "webp", b"AVI ": "avi"}.get(head[8:12])
    boxes = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    return "mov" if head[4:8] in boxes and head[8:12] not in STILL_BRANDS else None


def read_stated_size(file: BinaryIO, kind: str, size: int) -> int:
    """The bytes a file says it has, more than `size` where it was cut short; `size` where it does not say."""
    if kind in ("png", "gif"):
        file.seek(max(0, size - 2**16))
        tail = file.read()
        is_complete = b"IEND\xaeB`\x82" in tail if kind == "png" else tail.rstrip(b"\0\r\n").endswith(b";")
        return size if is_complete else size + 1
    if kind == "mov":
        return find_boxes_end(file, size)
    if kind == "matroska":
        return find_segment_end(file, size)
    if kind == "avi":
        file.seek(4)
        return 8 + int.from_bytes(file.read(4), "little")
    return size


def find_boxes_end(file: BinaryIO, size: int) -> int:
    """Where the last top-level box of an mp4 ends (ISO/IEC 14496-12, 4.2)."""
    offset = 0
    for _ in range(10_000):  # two a frame at most, when fragmented
        file.seek(offset)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length == 0 and len(head) >= 8:  # up to the end of the file
            return size
        offset += max(8, length)
        if offset >= size:
            return offset
    return size


def find_segment_end(file: BinaryIO, size: int) -> int:
    """Where the segment of a webm or mkv ends; `size` where it is of unknown length, as in a live recording."""
    file.seek(4)
    file.seek(read_vint(file) or 0, os.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return size
    length = read_vint(file)
    return size if length is None else file.tell() + length


def read_vint(file: BinaryIO) -> int | None:
    """A variable-size integer (RFC 8794, section 4); None for the reserved value that means unknown."""
    first = file.read(1)[0]
    width = 9 - first.bit_length()
    value = int.from_bytes(bytes([first & (0xFF >> width)]) + file.read(width - 1), "big")
    return None if value == 2 ** (7 * width) - 1 else value


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
            promised_frames = getattr(image, "n_frames", 1) if kind in ("png", "webp") else 1  # a gif must be read to know
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
        video_streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]  # cover art
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


def decode_stream(container: av.container.InputContainer, stream: VideoStream, guard: MediaGuard) -> Iterator[TimedFrame]:
    """The frames of a stream in the order of their times, which rise even where the file's do not."""
    default_seconds = 1 / float(stream.average_rate or stream.guessed_rate or 1)
    expected_start = 0.0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            guard.refuse_media("is cut short or damaged midway; allowed: a whole file")
        for frame in packet.decode():
            seconds = float((frame.duration or 0) * (frame.time_base or 0)) or default_seconds
            start = frame.time if frame.time is not None and frame.time > expected_start - default_seconds else expected_start
            expected_start = start + default_seconds
            yield to_upright_pixels(frame), start, seconds


def to_upright_pixels(frame: av.VideoFrame) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of a frame, turned as its display matrix says."""
    alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    untagged_hd = frame.colorspace == Colorspace.DEFAULT and frame.height >= MIN_HD_HEIGHT and not frame.format.is_rgb
    space = Colorspace.ITU709 if untagged_hd else None
    pixels = frame.to_ndarray(format="rgba" if alpha else "rgb24", src_colorspace=space, interpolation=EXACT_INTERPOLATION)
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
    resized = {moment: center_crop_resize(media.frames[moment], width, height) for moment in set(frame_indices.tolist())}
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


def check_output(path: str | Path, frames: int) -> None:
    """The cheap check before any compute: InvalidInput where `frames` frames could not be written to `path`."""
    path = Path(path)
    allowed = f"allowed: {', '.join(WRITABLE_SUFFIXES)}"
    ending = path.suffix.lower()
    if ending not in WRITABLE_SUFFIXES:
        raise InvalidInput("output", f"{printable_name(path)} has no ending that can be written; {allowed}")
    if ending == ".png" and frames > 1:
        raise InvalidInput("output", f"{printable_name(path)} holds one frame, not {frames}; allowed: .mp4, .gif")
    if path.is_dir():
        raise InvalidInput("output", f"{printable_name(path)} is a folder; allowed: a file, {', '.join(WRITABLE_SUFFIXES)}")
    if not path.parent.is_dir():
        raise InvalidInput("output", f"the folder of {printable_name(path)} does not exist; allowed: an existing folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InvalidInput("output", f"the folder of {printable_name(path)} is read-only; allowed: a writable folder")


def write_media(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Writes uint8 [F, H, W, 3] as the ending says, whole or not at all; the same input gives the same bytes.

    An mp4 of odd width or height is padded to even by its edge.  A gif keeps times in 1/100 s, and players stretch
    what is faster than 50 fps.
    """
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3 and frames.size
    path = Path(path)
    check_output(path, len(frames))
    if not 0.1 <= fps <= 240:
        raise InvalidInput("fps", f"{fps} cannot be written; allowed: 0.1 to 240")
    encode_frames = {".mp4": encode_mp4, ".gif": encode_gif, ".png": encode_png}[path.suffix.lower()]
    partial_path = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        encode_frames(partial_path, frames, fps)
        os.replace(partial_path, path)
    except OSError as error:
        raise InvalidInput(
            "output", f"{printable_name(path)} cannot be written: {error.strerror or 'the encoder failed'}"
        ) from error
    finally:
        partial_path.unlink(missing_ok=True)


def encode_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """H.264 that browsers play: yuv420p, tagged BT.709, index at the front; nothing in it names a time or a machine."""
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1001)
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(f"file:{path}", "w", format="mp4", options=options) as container:
        # Without x264's macroblock tree: with it a clip in twenty came out a few bytes different, one thread or not.
        options = {"crf": "12", "flags": "+bitexact", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        context = stream.codec_context
        context.thread_count = 1  # x264's output depends on it, and the default is the machine's
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for index, pixels in enumerate(frames):
            frame = rgb_to_yuv(pixels)
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def rgb_to_yuv(pixels: np.ndarray) -> av.VideoFrame:
    """BT.709 yuv420p in video range, from uint8 [H, W, 3] of even size."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return frame.reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, interpolation=EXACT_INTERPOLATION
    )


def encode_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    """Endless, 256 colours chosen for each frame.  Pillow joins equal neighbours into one longer frame."""
    images = [Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE) for pixels in frames]
    ticks = np.rint(np.arange(len(images) + 1) * 100 / fps).astype(int)  # rounding the times keeps the mean rate
    durations = [10 * max(2, int(ticks_shown)) for ticks_shown in np.diff(ticks)]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


def encode_png(path: Path, frames: np.ndarray, fps: float) -> None:
    """The one frame, without loss."""
    Image.fromarray(frames[0]).save(path, format="PNG")


# ---------------------------------------------------------------- looking

MAX_SHEET_FRAMES = 9  # frames of a clip that a sheet shows
MARGIN_PIXELS, GAP_PIXELS, MIN_SHEET_WIDTH = 20, 6, 480  # px
PAPER_COLOR, INK_COLOR, RULE_COLOR = (248, 248, 246), (40, 40, 44), (190, 190, 188)


def make_contact_sheet(rows: Sequence[ClipFrames], captions: Sequence[str], scale: int = 2) -> Image.Image:
    """One row a clip: its caption above up to 9 of its frames, evenly chosen, enlarged without smoothing."""
    font = ImageFont.load_default(size=15)
    strips = [make_film_strip(row, scale) for row in rows]
    width = max([MIN_SHEET_WIDTH, *(strip.width for strip in strips)])
    texts = [wrap_text(caption, font, width) for caption in captions]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    tops = [int(measure.multiline_textbbox((0, 0), text, font=font)[3]) + GAP_PIXELS for text in texts]
    row_heights = [top + strip.height + MARGIN_PIXELS for top, strip in zip(tops, strips, strict=True)]
    sheet = Image.new("RGB", (width + 2 * MARGIN_PIXELS, sum(row_heights) + MARGIN_PIXELS), PAPER_COLOR)
    draw = ImageDraw.Draw(sheet)
    y = MARGIN_PIXELS
    for text, top, strip, row_height in zip(texts, tops, strips, row_heights, strict=True):
        draw.multiline_text((MARGIN_PIXELS, y), text, fill=INK_COLOR, font=font)
        sheet.paste(strip, (MARGIN_PIXELS, y + top))
        y += row_height
    return sheet


def make_film_strip(frames: ClipFrames, scale: int) -> Image.Image:
    """Up to 9 frames side by side, each with a hairline, so that a white frame does not melt into the paper."""
    frame_indices = np.rint(np.linspace(0, len(frames) - 1, min(MAX_SHEET_FRAMES, len(frames)))).astype(int)
    images = [ImageOps.scale(Image.fromarray(frames[index]), scale, Image.Resampling.NEAREST) for index in frame_indices]
    images = [ImageOps.expand(image, border=1, fill=RULE_COLOR) for image in images]
    width = sum(image.width for image in images) + GAP_PIXELS * (len(images) - 1)
    strip = Image.new("RGB", (width, max(image.height for image in images)), PAPER_COLOR)
    x = 0
    for image in images:
        strip.paste(image, (x, 0))
        x += image.width + GAP_PIXELS
    return strip


def wrap_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, max_width: int) -> str:
    """The text in lines of at most `width` px, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > max_width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)

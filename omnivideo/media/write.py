"""Write pixels uint8 [F, H, W, 3] as mp4, gif or png; the same pixels give the same bytes on any machine."""

import os
import secrets
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream
from PIL import Image

from omnivideo.errors import InvalidInput
from omnivideo.media.decode import EXACT_INTERPOLATION
from omnivideo.media.limits import printable_name
from omnivideo.media.sound import SoundSource, keep_sound

WRITABLE_SUFFIXES = (".mp4", ".gif", ".png")


def check_output(path: str | Path, frames: int) -> None:
    """Raise InvalidInput if `frames` frames cannot be written to `path`; this check comes before any compute."""
    path = Path(path)
    allowed = f"allowed: {', '.join(WRITABLE_SUFFIXES)}"
    suffix = path.suffix.lower()
    if suffix not in WRITABLE_SUFFIXES:
        raise InvalidInput("output", f"{printable_name(path)} does not have a suffix that can be written; {allowed}")
    if suffix == ".png" and frames > 1:
        raise InvalidInput("output", f"{printable_name(path)} holds one frame, not {frames}; allowed: .mp4, .gif")
    if path.is_dir():
        raise InvalidInput(
            "output", f"{printable_name(path)} is a folder; allowed: a file, {', '.join(WRITABLE_SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise InvalidInput(
            "output", f"the folder of {printable_name(path)} does not exist; allowed: an existing folder"
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InvalidInput("output", f"the folder of {printable_name(path)} is read-only; allowed: a writable folder")


def write_media(path: str | Path, frames: np.ndarray, fps: float, sound: SoundSource | None = None) -> str | None:
    """Write uint8 [F, H, W, 3] atomically, in the format of the path's suffix.

    The sound of `sound` is kept where possible; the note of `keep_sound` about it is returned.
    An mp4 of odd width or height is padded to an even size by repeating its edge. A gif stores times in 1/100 s, and
    players slow down a gif faster than 50 fps. Raises InvalidInput if the file cannot be written.
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
        note = None if sound is None else add_sound(partial_path, path.suffix.lower(), sound, len(frames) / fps, fps)
        os.replace(partial_path, path)
    except OSError as error:
        raise InvalidInput(
            "output", f"{printable_name(path)} cannot be written: {error.strerror or 'the encoder failed'}"
        ) from error
    finally:
        partial_path.unlink(missing_ok=True)
    return note


def add_sound(path: Path, suffix: str, sound: SoundSource, seconds: float, fps: float) -> str | None:
    """Put the source's sound into a written clip, if its format holds sound."""
    data, note = keep_sound(path.read_bytes(), sound, seconds, fps)
    if suffix == ".mp4":
        path.write_bytes(data)
        return note
    return None if note is None else f"left out: a {suffix[1:]} holds no sound"


def encode_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write H.264 that browsers play, with the index at the front and no date or machine name in it."""
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1001)
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(f"file:{path}", "w", format="mp4", options=options) as container:
        stream = add_h264_stream(container, rate, crf=12)
        stream.height, stream.width = frames.shape[1:3]
        for index, pixels in enumerate(frames):
            frame = rgb_to_yuv(pixels)
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def add_h264_stream(container: OutputContainer, rate: Fraction, crf: int) -> VideoStream:
    """Return a new yuv420p stream, tagged BT.709, whose bytes depend on the frames alone."""
    # With x264's macroblock tree one clip in twenty differed by a few bytes between runs, even with one thread.
    options = {"crf": str(crf), "flags": "+bitexact", "x264-params": "mbtree=0"}
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.thread_count = 1  # x264's output depends on it, and the default is the machine's number of cores
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    return stream


def rgb_to_yuv(pixels: np.ndarray) -> av.VideoFrame:
    """Return BT.709 yuv420p in video range, from uint8 [H, W, 3] of even size."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return frame.reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=EXACT_INTERPOLATION,
    )


def encode_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write an endless loop with 256 colours for each frame. Pillow merges equal neighbours into one longer frame."""
    images = [Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE) for pixels in frames]
    ticks = np.rint(np.arange(len(images) + 1) * 100 / fps).astype(int)  # rounding the times keeps the mean rate
    durations = [10 * max(2, int(ticks_shown)) for ticks_shown in np.diff(ticks)]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


def encode_png(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write the only frame, without loss."""
    Image.fromarray(frames[0]).save(path, format="PNG")

"""Make media as people have them, in one folder, with what each should show; see tests/media/test_odd_media.py."""

import io
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from omnivideo.media.tone_mapping import tabulate_hlg, tabulate_pq

FPS = 8
UNIT_MATRIX = (1, 0, 0, 1)
# The eight orientations, as EXIF numbers them, and the display matrix a, b, c, d of each.
ORIENTATION_MATRICES = {
    1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),
    5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0),
}  # fmt: skip
UPRIGHT_BY_ORIENTATION: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, 1),
}


def make_gradient(width: int, height: int, shift: int = 0) -> np.ndarray:
    """Return a smooth picture without symmetry, uint8 [H, W, 3], so that codecs and reduction keep its levels."""
    y, x = np.mgrid[:height, :width]
    red = 40 + 160 * x / width
    green = 60 + 120 * y / height
    blue = 90 + 40 * np.sin(x / width * 3 + shift / 3) + 30 * y / height
    return np.stack([red, green, blue], axis=-1).round().astype(np.uint8)


def enlarge_gradient(width: int, height: int) -> np.ndarray:
    """Return `make_gradient` at a large size, quickly."""
    small = Image.fromarray(make_gradient(width // 10, height // 10))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def add_alpha(pixels: np.ndarray) -> np.ndarray:
    """Return RGBA: transparent black above, then alpha that rises from left to right."""
    height, width, _ = pixels.shape
    alpha = np.broadcast_to(np.linspace(0, 255, width).round().astype(np.uint8), (height, width)).copy()
    colors = pixels.copy()
    alpha[: height // 4], colors[: height // 4] = 0, 0
    return np.dstack([colors, alpha])


def encode_video(
    path: Path, frames: Iterable[av.VideoFrame], codec: str, pix_fmt: str, *, options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None, times: Sequence[int] | None = None, rate: int = FPS,
    tags: dict[str, int] | None = None,
) -> Path:  # fmt: skip
    """Write frames with any codec of FFmpeg; `times` are in 1/1000 s, and `tags` are attributes of the encoder."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.pix_fmt = pix_fmt
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, frame in enumerate(frames):
            if not index:
                stream.width, stream.height = frame.width, frame.height
            frame.pts, frame.time_base = (
                (index, Fraction(1, rate)) if times is None else (times[index], Fraction(1, 1000))
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def video_frames(clip: Iterable[np.ndarray], pixel_format: str = "rgb24") -> Iterable[av.VideoFrame]:
    return (av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=pixel_format) for pixels in clip)


# ---------------------------------------------------------------- alpha, HDR, orientation


def write_alpha_clip(path: Path, codec: str, pix_fmt: str, options: dict[str, str]) -> Path:
    clip = [add_alpha(make_gradient(96, 64, index)) for index in range(5)]
    return encode_video(path, video_frames(clip, "rgba"), codec, pix_fmt, options=options)


def encode_hdr_levels(nits: np.ndarray, transfer: ColorTrc) -> np.ndarray:
    """Return the uint16 levels of PQ or HLG whose display light is `nits` [..., 3], grey in the case of HLG."""
    if transfer == ColorTrc.SMPTE2084:
        return np.searchsorted(tabulate_pq(), nits / 203).clip(0, 65535).astype(np.uint16)
    scene = (nits / 1000) ** (1 / 1.2)
    return np.searchsorted(tabulate_hlg(), scene).clip(0, 65535).astype(np.uint16)


def write_hdr_clip(path: Path, levels: np.ndarray, transfer: ColorTrc, frames: int = 3) -> Path:
    """Write a 10-bit HEVC clip of uint16 levels [H, W, 3], tagged BT.2020 with a transfer."""
    source = av.VideoFrame.from_ndarray(np.ascontiguousarray(levels), format="rgb48le")
    yuv = source.reformat(format="yuv420p10le", dst_colorspace=Colorspace.BT2020, dst_color_range=ColorRange.MPEG)
    tags = {
        "color_trc": transfer, "color_primaries": ColorPrimaries.BT2020, "colorspace": Colorspace.BT2020,
        "color_range": ColorRange.MPEG,
    }  # fmt: skip
    options = {"x265-params": "log-level=none:crf=4:pools=none:frame-threads=1"}
    frames_of_clip = (yuv for _ in range(frames))
    return encode_video(path, frames_of_clip, "libx265", "yuv420p10le", options=options, tags=tags)


def set_display_matrix(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """Return an mp4 with another display matrix in its track header."""

    def pack(*cells: int) -> bytes:
        return b"".join(cell.to_bytes(4, "big", signed=True) for cell in cells)

    one = 1 << 16
    at = data.find(pack(one, 0, 0, 0, one, 0, 0, 0, 1 << 30), data.find(b"tkhd"))
    a, b, c, d = (one * cell for cell in matrix)
    return data[:at] + pack(a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


def write_still(path: Path, pixels: np.ndarray, orientation: int = 1, **options: object) -> Path:
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


def write_pictures(path: Path, clip: Sequence[np.ndarray], **options: object) -> Path:
    images = [Image.fromarray(pixels) for pixels in clip]
    images[0].save(path, save_all=True, append_images=images[1:], **options)
    return path


def encode_picture(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


# ---------------------------------------------------------------- the folder


def write_plain_clip(path: Path, width: int = 320, height: int = 240, codec: str = "libx264", pix_fmt: str = "yuv420p",
                     **options: Any) -> Path:  # fmt: skip
    clip = [make_gradient(width, height, index) for index in range(3)]
    return encode_video(path, video_frames(clip), codec, pix_fmt, **options)


def write_uneven_clip(path: Path) -> Path:
    clip = [make_gradient(320, 240, index) for index in range(5)]
    return encode_video(path, video_frames(clip), "libx264", "yuv420p", times=[0, 100, 200, 600, 700], rate=10)


def write_long_clip(path: Path) -> Path:
    """Write 20 s of 1080p30; the frames are few, so that making it is quick, but each has to be decoded."""
    pictures = [av.VideoFrame.from_ndarray(make_gradient(1920, 1080, index), format="rgb24") for index in range(4)]
    pictures = [picture.reformat(format="yuv420p") for picture in pictures]
    frames = (pictures[index % 4] for index in range(600))
    return encode_video(path, frames, "libx264", "yuv420p", options={"preset": "ultrafast"}, rate=30)


CLIPS: dict[str, Callable[[Path], Path]] = {
    "vp8-alpha.webm": lambda path: write_alpha_clip(
        path, "libvpx", "yuva420p", {"auto-alt-ref": "0", "crf": "4", "b": "2000000"}
    ),
    "vp9-alpha.webm": lambda path: write_alpha_clip(path, "libvpx-vp9", "yuva420p", {}),
    "prores-alpha.mov": lambda path: write_alpha_clip(path, "prores_ks", "yuva444p10le", {"profile": "4444"}),
    "plain.mp4": write_plain_clip,
    "ten-bit.mkv": lambda path: write_plain_clip(path, pix_fmt="yuv420p10le"),
    "odd-size.mp4": lambda path: write_plain_clip(path, 321, 241, pix_fmt="yuv444p"),
    "variable-rate.mkv": write_uneven_clip,
    "no-frame-count.webm": lambda path: write_plain_clip(path, codec="libvpx", container_options={"live": "1"}),
    "twenty-seconds.mp4": write_long_clip,
}

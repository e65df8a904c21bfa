"""Make small clips in many formats, and read the refusals of damaged ones."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from omnivideo.errors import UnreadableMedia
from omnivideo.media.limits import MediaLimits
from omnivideo.media.read import read_media

FPS = 8


def make_clip(frames: int = 9, width: int = 64, height: int = 64) -> np.ndarray:
    """Return a red disc that moves right over grey, above a blue box that stands still: uint8 [F, H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    clip = np.full((frames, height, width, 3), (140, 140, 140), np.uint8)
    for index, frame in enumerate(clip):
        frame[(x - 16 - 4 * index) ** 2 + (y - 22) ** 2 <= 49] = (225, 35, 40)
        frame[40:54, 10:24] = (40, 80, 230)
    return clip


def mux_clip(path: Path, clip: np.ndarray, kind: str, codec: str, options: dict[str, str] | None = None) -> Path:
    """Write the clip in a container and codec that `write_media` does not write."""
    with av.open(str(path), "w", format=kind, options=options or {}) as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], "yuv420p"
        for pixels in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_animation(path: Path, clip: np.ndarray, **options: Any) -> Path:
    """Write the clip with Pillow, which chooses the format by the suffix."""
    images = [Image.fromarray(pixels) for pixels in clip]
    images[0].save(path, save_all=True, append_images=images[1:], **options)
    return path


def compute_psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two arrays of bytes in dB."""
    return float(10 * np.log10(255**2 / np.mean((first.astype(float) - second.astype(float)) ** 2)))


def read_refusal(path: Path, limits: MediaLimits | None = None) -> str:
    """Return the refusal's text; assert that it is one line with the field and the file's name, and no folder."""
    with pytest.raises(UnreadableMedia) as caught:
        read_media(path, limits or MediaLimits())
    text = str(caught.value)
    assert caught.value.field == "source" and text.startswith("source: ")
    assert path.name in text and str(path.parent) not in text and "\n" not in text and "0x" not in text
    return text


def assert_truncation_is_refused(path: Path) -> None:
    """Cut the file in its header, in the middle and near its end; assert that each cut is refused."""
    data = path.read_bytes()
    size = len(data)
    for length in (20, size // 4, size // 2, size * 3 // 4, size - 200, size - 30, size - 10, size - 1):
        truncated = path.with_name(f"cut{length}{path.suffix}")
        truncated.write_bytes(data[:length])
        read_refusal(truncated)

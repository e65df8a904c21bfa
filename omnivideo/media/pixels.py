"""Convert decoded pictures to pixels uint8 [H, W, 3]: colours, HDR, alpha and orientation."""

from typing import Any, cast

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.video.reformatter import ColorPrimaries, Colorspace, Interpolation
from PIL import Image

from omnivideo.media.tone_mapping import HDR_TRANSFERS, tone_map

MIN_HD_HEIGHT = 720  # px; untagged video of this height or more is BT.709, below it BT.601
# FFmpeg's own default rounds down, which darkens a clip by one level at every save and load.
EXACT_INTERPOLATION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

MATRIX_BY_QUARTER_TURNS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))  # counter-clockwise


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


# ---------------------------------------------------------------- frames of clips


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

"""Lay out clips as rows of frames under their captions."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from omnivideo.media.resample import spread_frame_indices

MAX_SHEET_FRAMES = 9  # frames that a row shows
MARGIN_PIXELS, GAP_PIXELS, MIN_SHEET_WIDTH = 20, 6, 480  # px
PAPER_COLOR, INK_COLOR, RULE_COLOR = (248, 248, 246), (40, 40, 44), (190, 190, 188)

ClipFrames = Sequence[np.ndarray] | np.ndarray  # frames [H, W, 3] of one size, or one array [F, H, W, 3]


def make_contact_sheet(rows: Sequence[ClipFrames], captions: Sequence[str], scale: int = 2) -> Image.Image:
    """Return a page with a row for each clip: its caption above up to 9 evenly spaced frames.

    Frames are enlarged `scale` times without smoothing.
    """
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
    """Return up to 9 frames side by side, each with a thin border that shows where a white frame ends."""
    images = [
        ImageOps.scale(Image.fromarray(frames[index]), scale, Image.Resampling.NEAREST)
        for index in spread_frame_indices(len(frames), MAX_SHEET_FRAMES)
    ]
    images = [ImageOps.expand(image, border=1, fill=RULE_COLOR) for image in images]
    width = sum(image.width for image in images) + GAP_PIXELS * (len(images) - 1)
    strip = Image.new("RGB", (width, max(image.height for image in images)), PAPER_COLOR)
    x = 0
    for image in images:
        strip.paste(image, (x, 0))
        x += image.width + GAP_PIXELS
    return strip


def wrap_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, max_width: int) -> str:
    """Return the text in lines of at most `max_width` px, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > max_width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)

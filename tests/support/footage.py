"""Synthetic footage for the curation tests: textured backgrounds, moving objects, and defects."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, FPS = 384, 288, 24
FRAMES = 40


def make_texture(seed: int, width: int = 3 * WIDTH, height: int = 2 * HEIGHT) -> np.ndarray:
    """Return a landscape of coarse and fine colour patches: uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    layers = []
    for cells, weight in ((4, 1.0), (12, 0.7), (48, 0.5), (200, 0.5)):
        small = rng.uniform(0, 255, (cells * height // width + 1, cells, 3)).astype(np.uint8)
        layers.append(weight * np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)))
    mixed = sum(layers)
    return ((mixed - mixed.mean()) / mixed.std() * 50 + 128).clip(25, 240).astype(np.uint8)


def pan_camera(seed: int, frames: int = FRAMES, speed: float = 2.0, jitter: float = 0.0) -> Iterator[np.ndarray]:
    """Yield the frames of a camera that moves to the right, evenly or with jitter."""
    ground, rng = make_texture(seed), np.random.default_rng(seed)
    for at in range(frames):
        shake = rng.normal(0, jitter, 2) if jitter else (0, 0)
        x, y = int(60 + speed * at + shake[0]), int(60 + shake[1])
        yield ground[y : y + HEIGHT, x : x + WIDTH]


def move_ball(seed: int, frames: int = FRAMES) -> Iterator[np.ndarray]:
    """Yield the frames of a ball that moves in front of a fixed camera."""
    ground = make_texture(seed)[:HEIGHT, :WIDTH]
    for at in range(frames):
        image = Image.fromarray(ground)
        x = 40 + 5 * at
        ImageDraw.Draw(image).ellipse((x, 120, x + 70, 190), fill=(230, 40, 40), outline=(20, 20, 20), width=3)
        yield np.asarray(image)


def make_still(seed: int, grain: float = 6.0) -> Iterator[np.ndarray]:
    """Yield the frames of a still photograph with film grain."""
    rng, ground = np.random.default_rng(seed), make_texture(seed)[:HEIGHT, :WIDTH].astype(float)
    for _ in range(FRAMES):
        yield (ground + rng.normal(0, grain, ground.shape)).clip(0, 255).astype(np.uint8)


def make_night(seed: int) -> Iterator[np.ndarray]:
    """Return the frames of a sky that is black at the top and bright below, which is not a letterbox bar."""
    dawn = np.linspace(-0.15, 1, HEIGHT).clip(0, 1)[:, None, None]
    return ((frame * dawn).astype(np.uint8) for frame in pan_camera(seed))


def add_bars(frames: Iterable[np.ndarray], rows: int = 0, columns: int = 0) -> Iterator[np.ndarray]:
    for frame in frames:
        frame = frame.copy()
        if rows:
            frame[:rows], frame[-rows:] = 0, 0
        if columns:
            frame[:, :columns], frame[:, -columns:] = 0, 0
        yield frame


def add_text(frames: Iterable[np.ndarray], words: str, size: int, at: tuple[int, int], alpha: int = 255):
    """Yield the frames with burned-in text; `alpha` is its opacity, from 0 to 255."""
    font = ImageFont.load_default(size=size)
    for frame in frames:
        layer = Image.new("RGBA", frame.shape[1::-1], (255, 255, 255, 0))
        ImageDraw.Draw(layer).text(at, words, font=font, fill=(255, 255, 255, alpha), stroke_width=1,
                                   stroke_fill=(0, 0, 0, alpha))  # fmt: skip
        yield np.asarray(Image.alpha_composite(Image.fromarray(frame).convert("RGBA"), layer).convert("RGB"))


def resize(frames: Iterable[np.ndarray], width: int, height: int) -> Iterator[np.ndarray]:
    return (np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((width, height))) for frame in frames)


def write_film(path: Path, frames: Iterable[np.ndarray], crf: int = 18, gap: tuple[int, int] = (0, 0)) -> Path:
    """Write H.264 with the index at the front, so that a truncated file can be opened, and return the path.

    `gap` is the number of a frame and the seconds without frames before it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream("libx264", rate=FPS, options={"crf": str(crf), "preset": "veryfast"})
        stream.pix_fmt = "yuv420p"
        for at, pixels in enumerate(frames):
            if not at:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = at + FPS * gap[1] * (at >= gap[0]), Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path

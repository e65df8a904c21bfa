"""The figures of the stages.  Frames are uint8 RGB: `small` [F, h, w, 3], `looks` a list of [H, W, 3].

"side" is the longer side of the frame, so that no figure depends on the resolution.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from omnivideo.training.curation.reading import SAMPLED_FPS, needed

BLACK = 20  # of 255: a bar's pixels after any codec
STEP = 8  # of 255: a bar ends at an edge, a night sky does not
FASTEST = 0.05  # share of the pixels that motion is read from: a small subject before a still wall is motion
EDGE = 60.0  # Sobel response of an outline that somebody can see
SCALED = 480  # px, the longer side on which outlines are compared
STRAYS = 0.35  # of its strength: what an outline that stays may differ by between frames
LOCKED = 0.08  # sides: a camera that goes less far leaves outlines nearly where they were
CONFIDENT = 0.6  # OCR's own score
HASHED = 32  # px


def cv2() -> Any:
    module = needed("cv2", "opencv-python-headless")
    module.setNumThreads(1)  # one process a core already
    return module


def grey(frame: np.ndarray) -> np.ndarray:
    """uint8 [H, W]."""
    return cv2().cvtColor(np.ascontiguousarray(frame), cv2().COLOR_RGB2GRAY)


def shrunk(frame: np.ndarray, longest: int) -> np.ndarray:
    cv = cv2()
    height, width = frame.shape[:2]
    scale = min(1.0, longest / max(height, width))
    return cv.resize(frame, (round(width * scale), round(height * scale)), interpolation=cv.INTER_AREA)


# ---------------------------------------------------------------- black bars


def bars(looks: Sequence[np.ndarray]) -> float:
    """The share of the frame outside the picture: edges that are black in every frame and end in a step."""
    brightest = np.max([grey(look) for look in looks], axis=0)  # [H, W]
    rows, columns = (np.percentile(brightest, 98, axis=axis) for axis in (1, 0))
    inner = 1.0
    for lines in (rows, columns):
        inner *= 1 - (bar(lines) + bar(lines[::-1])) / len(lines)
    return max(0.0, 1 - max(0.0, inner))


def bar(lines: np.ndarray) -> int:
    """How many lines from the edge on are a bar."""
    bright = np.flatnonzero(lines > BLACK)
    if not len(bright):
        return len(lines)
    first = int(bright[0])
    inside = lines[first : first + 4].max()  # a codec smears the edge over a few lines
    return first if first and inside - lines[:first].max() >= STEP else 0


# ---------------------------------------------------------------- motion


def flows(small: np.ndarray) -> list[np.ndarray]:
    """Farneback's flow between neighbours, [h, w, 2] in sides."""
    cv = cv2()
    # Grain would be motion to it.
    greys = [cv.GaussianBlur(grey(frame), (5, 5), 0) for frame in small]
    pairs = itertools.pairwise(greys)
    side = max(small.shape[1:3])
    return [cv.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0) / side for a, b in pairs]


class Motion(NamedTuple):
    """`fastest` in sides a second; `shake`, the mean jump of the camera's motion between two steps, and `travel`, the
    way it goes in all, in sides."""

    fastest: float
    shake: float
    travel: float


def motion(small: np.ndarray) -> Motion:
    found = flows(small)
    if not found:
        return Motion(0.0, 0.0, 0.0)
    fastest = [np.quantile(np.linalg.norm(flow, axis=-1), 1 - FASTEST / 2) for flow in found]
    camera = np.array([np.median(flow, axis=(0, 1)) for flow in found])  # [F-1, 2]: most of a picture is not subject
    jumps = np.linalg.norm(np.diff(camera, axis=0), axis=1)
    travel = np.linalg.norm(camera, axis=1).sum()
    return Motion(float(np.mean(fastest)) * SAMPLED_FPS, float(jumps.mean()) if len(jumps) else 0.0, float(travel))


# ---------------------------------------------------------------- overlays and text


def outlines(looks: Sequence[np.ndarray]) -> np.ndarray:
    """Sobel gradients [N, 2, h, w]."""
    cv = cv2()
    greys = [grey(shrunk(look, SCALED)) for look in looks]
    return np.array([[cv.Sobel(one, cv.CV_32F, 1, 0), cv.Sobel(one, cv.CV_32F, 0, 1)] for one in greys])


def overlay(looks: Sequence[np.ndarray], travel: float) -> float | None:
    """The share of the frame under outlines that stay while the camera moves: logos, watermarks, burned-in text.

    None where the camera stands still too: then an overlay looks like the wall behind it.
    """
    if len(looks) < 4 or travel < LOCKED:
        return None
    gradients = outlines(looks)
    usual = np.median(gradients, axis=0)  # [2, h, w]
    strength = np.linalg.norm(usual, axis=0)
    strays = np.median(np.linalg.norm(gradients - usual, axis=1), axis=0)
    stays = (strength > EDGE) & (strays < STRAYS * strength)
    stays[:4], stays[-4:], stays[:, :4], stays[:, -4:] = False, False, False, False  # where a codec pads
    return float(grouped(cv2(), stays).mean())


def grouped(cv: Any, stays: np.ndarray) -> np.ndarray:
    """Outlines that lie together, as filled groups; what stands alone is chance."""
    joined = cv.morphologyEx(stays.astype(np.uint8), cv.MORPH_CLOSE, np.ones((5, 9), np.uint8))
    _, labels, stats, _ = cv.connectedComponentsWithStats(joined)
    large = stats[:, cv.CC_STAT_AREA] >= 30
    large[0] = False
    return large[labels]


@functools.cache
def reader() -> Any:
    """RapidOCR with the models that its package ships."""
    return needed("rapidocr_onnxruntime").RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)


def text(looks: Sequence[np.ndarray]) -> tuple[float, str]:
    """The mean share of the frame under words that OCR is sure of, and those words."""
    shares, words = [], []
    for look in looks[:: max(1, len(looks) // 3)]:
        found, _ = reader()(shrunk(look, 960)[..., ::-1].copy())
        sure = [
            (box, said) for box, said, score in found or [] if score >= CONFIDENT and sum(map(str.isalnum, said)) > 1
        ]
        shape = shrunk(look, 960).shape
        shares.append(sum(area(box) for box, _ in sure) / (shape[0] * shape[1]))
        words += [said for _, said in sure if said not in words]
    return float(np.mean(shares)), " ".join(words)[:200]


def area(box: Any) -> float:
    """Of a polygon [[x, y], ...]."""
    x, y = np.array(box, dtype=float).T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


# ---------------------------------------------------------------- duplicates


def hashes(looks: Sequence[np.ndarray]) -> list[int]:
    """One 64-bit perceptual hash a frame: the signs of the 8 x 8 lowest frequencies about their median."""
    return [phash(look) for look in looks]


def phash(frame: np.ndarray) -> int:
    cv = cv2()
    small = cv.resize(grey(frame), (HASHED, HASHED), interpolation=cv.INTER_AREA).astype(np.float32)
    low = cv.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def distances(mine: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Mean bits by which a clip's hashes [A] differ from the nearest of each kept clip's [N, B]: [N]."""
    return np.bitwise_count(mine[None, :, None] ^ kept[:, None, :]).min(axis=2).mean(axis=1)

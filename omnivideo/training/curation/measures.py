"""The figures of the stages.  Frames are uint8 RGB: `small` [F, h, w, 3], `looks` a list of [H, W, 3].

"side" is the longer side of the frame, so that no figure depends on the resolution.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from omnivideo.training.curation.reading import SAMPLED_FPS, import_optional

MAX_BLACK_LEVEL = 20  # of 255: a bar's pixels after any codec
MIN_BAR_EDGE_STEP = 8  # of 255: a bar ends at an edge, a night sky does not
FASTEST_FRACTION = 0.05  # share of the pixels that motion is read from: a small subject before a still wall is motion
MIN_OUTLINE_STRENGTH = 60.0  # Sobel response of an outline that somebody can see
OUTLINE_SIDE = 480  # px, the longer side on which outlines are compared
MAX_OUTLINE_DEVIATION = 0.35  # of its strength: what an outline that stays may differ by between frames
MIN_CAMERA_TRAVEL = 0.08  # sides: a camera that goes less far leaves outlines nearly where they were
MIN_OCR_SCORE = 0.6  # OCR's own score
HASH_INPUT_SIDE = 32  # px


def load_opencv() -> Any:
    module = import_optional("cv2", "opencv-python-headless")
    module.setNumThreads(1)  # one process a core already
    return module


def to_grayscale(frame: np.ndarray) -> np.ndarray:
    """uint8 [H, W]."""
    return load_opencv().cvtColor(np.ascontiguousarray(frame), load_opencv().COLOR_RGB2GRAY)


def shrink_frame(frame: np.ndarray, max_side: int) -> np.ndarray:
    cv = load_opencv()
    height, width = frame.shape[:2]
    scale = min(1.0, max_side / max(height, width))
    return cv.resize(frame, (round(width * scale), round(height * scale)), interpolation=cv.INTER_AREA)


# ---------------------------------------------------------------- black bars


def measure_black_bars(full_frames: Sequence[np.ndarray]) -> float:
    """The share of the frame outside the picture: edges that are black in every frame and end in a step."""
    brightest = np.max([to_grayscale(frame) for frame in full_frames], axis=0)  # [H, W]
    rows, columns = (np.percentile(brightest, 98, axis=axis) for axis in (1, 0))
    inner = 1.0
    for lines in (rows, columns):
        inner *= 1 - (measure_bar_width(lines) + measure_bar_width(lines[::-1])) / len(lines)
    return max(0.0, 1 - max(0.0, inner))


def measure_bar_width(lines: np.ndarray) -> int:
    """How many lines from the edge on are a bar."""
    bright = np.flatnonzero(lines > MAX_BLACK_LEVEL)
    if not len(bright):
        return len(lines)
    first = int(bright[0])
    inside = lines[first : first + 4].max()  # a codec smears the edge over a few lines
    return first if first and inside - lines[:first].max() >= MIN_BAR_EDGE_STEP else 0


# ---------------------------------------------------------------- motion


def compute_flows(small_frames: np.ndarray) -> list[np.ndarray]:
    """Farneback's flow between neighbours, [h, w, 2] in sides."""
    cv = load_opencv()
    # Grain would be motion to it.
    greys = [cv.GaussianBlur(to_grayscale(frame), (5, 5), 0) for frame in small_frames]
    pairs = itertools.pairwise(greys)
    side = max(small_frames.shape[1:3])
    return [cv.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0) / side for a, b in pairs]


class MotionStats(NamedTuple):
    """`fastest` in sides a second; `shake`, the mean jump of the camera's motion between two steps, and `travel`, the
    way it goes in all, in sides."""

    fastest_speed: float
    shake: float
    travel: float


def measure_motion(small_frames: np.ndarray) -> MotionStats:
    flow_fields = compute_flows(small_frames)
    if not flow_fields:
        return MotionStats(0.0, 0.0, 0.0)
    fastest = [np.quantile(np.linalg.norm(flow, axis=-1), 1 - FASTEST_FRACTION / 2) for flow in flow_fields]
    camera = np.array(
        [np.median(flow, axis=(0, 1)) for flow in flow_fields]
    )  # [F-1, 2]: most of a picture is not subject
    jumps = np.linalg.norm(np.diff(camera, axis=0), axis=1)
    travel = np.linalg.norm(camera, axis=1).sum()
    return MotionStats(float(np.mean(fastest)) * SAMPLED_FPS, float(jumps.mean()) if len(jumps) else 0.0, float(travel))


# ---------------------------------------------------------------- overlays and text


def compute_outline_gradients(full_frames: Sequence[np.ndarray]) -> np.ndarray:
    """Sobel gradients [N, 2, h, w]."""
    cv = load_opencv()
    greys = [to_grayscale(shrink_frame(frame, OUTLINE_SIDE)) for frame in full_frames]
    return np.array(
        [[cv.Sobel(grey_frame, cv.CV_32F, 1, 0), cv.Sobel(grey_frame, cv.CV_32F, 0, 1)] for grey_frame in greys]
    )


def measure_overlay(full_frames: Sequence[np.ndarray], travel: float) -> float | None:
    """The share of the frame under outlines that stay while the camera moves: logos, watermarks, burned-in text.

    None where the camera stands still too: then an overlay looks like the wall behind it.
    """
    if len(full_frames) < 4 or travel < MIN_CAMERA_TRAVEL:
        return None
    gradients = compute_outline_gradients(full_frames)
    usual = np.median(gradients, axis=0)  # [2, h, w]
    strength = np.linalg.norm(usual, axis=0)
    strays = np.median(np.linalg.norm(gradients - usual, axis=1), axis=0)
    is_static = (strength > MIN_OUTLINE_STRENGTH) & (strays < MAX_OUTLINE_DEVIATION * strength)
    is_static[:4], is_static[-4:], is_static[:, :4], is_static[:, -4:] = (
        False,
        False,
        False,
        False,
    )  # where a codec pads
    return float(group_outlines(load_opencv(), is_static).mean())


def group_outlines(cv: Any, is_static: np.ndarray) -> np.ndarray:
    """Outlines that lie together, as filled groups; what stands alone is chance."""
    closed_outlines = cv.morphologyEx(is_static.astype(np.uint8), cv.MORPH_CLOSE, np.ones((5, 9), np.uint8))
    _, labels, stats, _ = cv.connectedComponentsWithStats(closed_outlines)
    large = stats[:, cv.CC_STAT_AREA] >= 30
    large[0] = False
    return large[labels]


@functools.cache
def load_ocr() -> Any:
    """RapidOCR with the models that its package ships."""
    return import_optional("rapidocr_onnxruntime").RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)


def measure_text(full_frames: Sequence[np.ndarray]) -> tuple[float, str]:
    """The mean share of the frame under words that OCR is sure of, and those words."""
    shares, words = [], []
    for frame in full_frames[:: max(1, len(full_frames) // 3)]:
        detections, _ = load_ocr()(shrink_frame(frame, 960)[..., ::-1].copy())
        confident_words = [
            (box, said)
            for box, said, score in detections or []
            if score >= MIN_OCR_SCORE and sum(map(str.isalnum, said)) > 1
        ]
        shape = shrink_frame(frame, 960).shape
        shares.append(sum(compute_polygon_area(box) for box, _ in confident_words) / (shape[0] * shape[1]))
        words += [said for _, said in confident_words if said not in words]
    return float(np.mean(shares)), " ".join(words)[:200]


def compute_polygon_area(box: Any) -> float:
    """Of a polygon [[x, y], ...]."""
    x, y = np.array(box, dtype=float).T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


# ---------------------------------------------------------------- duplicates


def compute_hashes(full_frames: Sequence[np.ndarray]) -> list[int]:
    """One 64-bit perceptual hash a frame: the signs of the 8 x 8 lowest frequencies about their median."""
    return [compute_perceptual_hash(frame) for frame in full_frames]


def compute_perceptual_hash(frame: np.ndarray) -> int:
    cv = load_opencv()
    small = cv.resize(to_grayscale(frame), (HASH_INPUT_SIDE, HASH_INPUT_SIDE), interpolation=cv.INTER_AREA).astype(
        np.float32
    )
    low = cv.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def compute_hash_distances(clip_hashes: np.ndarray, kept_hashes: np.ndarray) -> np.ndarray:
    """Mean bits by which a clip's hashes [A] differ from the nearest of each kept clip's [N, B]: [N]."""
    return np.bitwise_count(clip_hashes[None, :, None] ^ kept_hashes[:, None, :]).min(axis=2).mean(axis=1)

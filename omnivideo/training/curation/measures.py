"""The measurements of the stages. Frames are uint8 RGB: `small_frames` [F, h, w, 3], `full_frames` a list of [H, W, 3].

The unit "side" is the longer side of the frame, so that no measurement depends on the resolution.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from omnivideo.training.curation.reading import SAMPLED_FPS, import_optional

MAX_BLACK_LEVEL = 20  # of 255; the pixels of a bar stay below it after any codec
MIN_BAR_EDGE_STEP = 8  # of 255; a bar ends at an edge, a night sky does not
FASTEST_FRACTION = 0.05  # share of pixels on which motion is measured: a small subject before a static wall counts
MIN_OUTLINE_STRENGTH = 60.0  # Sobel response of a visible outline
OUTLINE_SIDE = 480  # px, the longer side on which outlines are compared
MAX_OUTLINE_DEVIATION = 0.35  # relative to its strength; static outlines differ less between frames
MIN_CAMERA_TRAVEL = 0.08  # sides; outlines hardly move if the camera travels less
MIN_OCR_SCORE = 0.6  # OCR's confidence
HASH_INPUT_SIDE = 32  # px


def load_opencv() -> Any:
    """Return OpenCV, limited to one thread."""
    module = import_optional("cv2", "opencv-python-headless")
    module.setNumThreads(1)  # each core already has a process
    return module


def to_grayscale(frame: np.ndarray) -> np.ndarray:
    """Return the brightness, uint8 [H, W]."""
    result: np.ndarray = load_opencv().cvtColor(np.ascontiguousarray(frame), load_opencv().COLOR_RGB2GRAY)
    return result


def shrink_frame(frame: np.ndarray, max_side: int) -> np.ndarray:
    """Return the frame with a longer side of at most `max_side` px."""
    cv = load_opencv()
    height, width = frame.shape[:2]
    scale = min(1.0, max_side / max(height, width))
    result: np.ndarray = cv.resize(frame, (round(width * scale), round(height * scale)), interpolation=cv.INTER_AREA)
    return result


# ---------------------------------------------------------------- black bars


def measure_black_bars(full_frames: Sequence[np.ndarray]) -> float:
    """Return the share of the frame in black bars: edges that are black in every frame and end in a step."""
    brightest = np.max([to_grayscale(frame) for frame in full_frames], axis=0)  # [H, W]
    rows, columns = (np.percentile(brightest, 98, axis=axis) for axis in (1, 0))
    inner = 1.0
    for lines in (rows, columns):
        inner *= 1 - (measure_bar_width(lines) + measure_bar_width(lines[::-1])) / len(lines)
    return max(0.0, 1 - max(0.0, inner))


def measure_bar_width(lines: np.ndarray) -> int:
    """Return the number of lines from the edge that form a bar."""
    bright = np.flatnonzero(lines > MAX_BLACK_LEVEL)
    if not len(bright):
        return len(lines)
    first = int(bright[0])
    inside = lines[first : first + 4].max()  # a codec smears the edge over a few lines
    return first if first and inside - lines[:first].max() >= MIN_BAR_EDGE_STEP else 0


# ---------------------------------------------------------------- motion


def compute_flows(small_frames: np.ndarray) -> list[np.ndarray]:
    """Return Farneback's optical flow [h, w, 2] between neighbouring frames, in sides."""
    cv = load_opencv()
    # Film grain would count as motion.
    greys = [cv.GaussianBlur(to_grayscale(frame), (5, 5), 0) for frame in small_frames]
    pairs = itertools.pairwise(greys)
    side = max(small_frames.shape[1:3])
    return [cv.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0) / side for a, b in pairs]


class MotionStats(NamedTuple):
    """The motion of a clip.

    `fastest_speed` is in sides per second. `shake` is the mean jump of the camera's motion between two steps, and
    `travel` the total length of its path, both in sides.
    """

    fastest_speed: float
    shake: float
    travel: float


def measure_motion(small_frames: np.ndarray) -> MotionStats:
    """Return the motion between the sampled frames."""
    flow_fields = compute_flows(small_frames)
    if not flow_fields:
        return MotionStats(0.0, 0.0, 0.0)
    fastest = [np.quantile(np.linalg.norm(flow, axis=-1), 1 - FASTEST_FRACTION / 2) for flow in flow_fields]
    camera = np.array(
        [np.median(flow, axis=(0, 1)) for flow in flow_fields]
    )  # [F-1, 2]: most of a picture is background
    jumps = np.linalg.norm(np.diff(camera, axis=0), axis=1)
    travel = np.linalg.norm(camera, axis=1).sum()
    return MotionStats(float(np.mean(fastest)) * SAMPLED_FPS, float(jumps.mean()) if len(jumps) else 0.0, float(travel))


# ---------------------------------------------------------------- overlays and text


def compute_outline_gradients(full_frames: Sequence[np.ndarray]) -> np.ndarray:
    """Return the Sobel gradients of the frames [N, 2, h, w]."""
    cv = load_opencv()
    greys = [to_grayscale(shrink_frame(frame, OUTLINE_SIDE)) for frame in full_frames]
    return np.array(
        [[cv.Sobel(grey_frame, cv.CV_32F, 1, 0), cv.Sobel(grey_frame, cv.CV_32F, 0, 1)] for grey_frame in greys]
    )


def measure_overlay(full_frames: Sequence[np.ndarray], travel: float) -> float | None:
    """Return the share of the frame under outlines that stay while the camera moves: logos, watermarks, burned-in text.

    Return None for a static camera, because an overlay then looks like the background.
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
    """Return a mask of adjacent outlines as filled groups; isolated pixels are noise."""
    closed_outlines = cv.morphologyEx(is_static.astype(np.uint8), cv.MORPH_CLOSE, np.ones((5, 9), np.uint8))
    _, labels, stats, _ = cv.connectedComponentsWithStats(closed_outlines)
    large = stats[:, cv.CC_STAT_AREA] >= 30
    large[0] = False
    result: np.ndarray = large[labels]
    return result


@functools.cache
def load_ocr() -> Any:
    """Return RapidOCR with the models of its package."""
    return import_optional("rapidocr_onnxruntime").RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)


def measure_text(full_frames: Sequence[np.ndarray]) -> tuple[float, str]:
    """Return the mean share of the frame under text that OCR reads with confidence, and the text."""
    shares, words = [], []
    for frame in full_frames[:: max(1, len(full_frames) // 3)]:
        detections, _ = load_ocr()(shrink_frame(frame, 960)[..., ::-1].copy())
        confident_words = [
            (box, text)
            for box, text, score in detections or []
            if score >= MIN_OCR_SCORE and sum(map(str.isalnum, text)) > 1
        ]
        shape = shrink_frame(frame, 960).shape
        shares.append(sum(compute_polygon_area(box) for box, _ in confident_words) / (shape[0] * shape[1]))
        words += [text for _, text in confident_words if text not in words]
    return float(np.mean(shares)), " ".join(words)[:200]


def compute_polygon_area(box: Any) -> float:
    """Return the area of a polygon [[x, y], ...]."""
    x, y = np.array(box, dtype=float).T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


# ---------------------------------------------------------------- duplicates


def compute_hashes(full_frames: Sequence[np.ndarray]) -> list[int]:
    """Return a 64-bit perceptual hash of each frame."""
    return [compute_perceptual_hash(frame) for frame in full_frames]


def compute_perceptual_hash(frame: np.ndarray) -> int:
    """Return the signs of the 8 x 8 lowest frequencies relative to their median, as 64 bits."""
    cv = load_opencv()
    small = cv.resize(to_grayscale(frame), (HASH_INPUT_SIDE, HASH_INPUT_SIDE), interpolation=cv.INTER_AREA).astype(
        np.float32
    )
    low = cv.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def compute_hash_distances(clip_hashes: np.ndarray, kept_hashes: np.ndarray) -> np.ndarray:
    """Return the mean distance [N] in bits of a clip's hashes [A] to the nearest of each kept clip's [N, B]."""
    result: np.ndarray = np.bitwise_count(clip_hashes[None, :, None] ^ kept_hashes[:, None, :]).min(axis=2).mean(axis=1)
    return result

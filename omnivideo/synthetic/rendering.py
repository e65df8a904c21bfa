"""The pixels of scenes: anti-aliased shapes on a plain background."""

import math
from functools import cache

import numpy as np

from omnivideo.synthetic.scenes import BACKGROUNDS, CELL_SIZE, COLOURS, FRAME_SIZE, Scene, SceneObject


def compute_outline(shape: str, radius: float) -> np.ndarray:
    """Return the corners [n, 2] (x, y) of a shape centred at 0 whose bounding box has half-side `radius`."""
    if shape == "square":
        side = 0.88 * radius
        return np.array([(-side, -side), (side, -side), (side, side), (-side, side)])
    if shape == "triangle":
        return np.array([(0, -radius), (radius, 0.85 * radius), (-radius, 0.85 * radius)])
    angles = np.arange(10) * math.pi / 5 - math.pi / 2
    lengths = np.where(np.arange(10) % 2 == 0, 1.08 * radius, 0.46 * radius)
    return np.stack([np.cos(angles) * lengths, np.sin(angles) * lengths + 0.08 * radius], axis=1)


def is_inside_polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Return whether each point lies inside the polygon, by the even-odd rule."""
    result = np.zeros(x.shape, dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y1 == y2:
            continue
        crosses = ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
        result ^= crosses
    return result


@cache
def rasterize_shape(shape: str, radius: float) -> np.ndarray:
    """Return the coverage [32, 32] in 0..1 of a centred shape, anti-aliased with 8x8 samples per pixel."""
    side, oversampling = 2 * CELL_SIZE, 8
    axis = (np.arange(side * oversampling) + 0.5) / oversampling - CELL_SIZE
    x, y = np.meshgrid(axis, axis)
    filled = x**2 + y**2 <= radius**2 if shape == "circle" else is_inside_polygon(x, y, compute_outline(shape, radius))
    coverage: np.ndarray = filled.reshape(side, oversampling, side, oversampling).mean(axis=(1, 3))
    return coverage.astype(np.float32)


def rasterize_object(obj: SceneObject, frame_index: int) -> np.ndarray:
    """Return the coverage [64, 64] in 0..1 of an object at a frame."""
    canvas = np.zeros((FRAME_SIZE + 2 * CELL_SIZE, FRAME_SIZE + 2 * CELL_SIZE), dtype=np.float32)
    x, y = obj.centre_at(frame_index)
    canvas[y : y + 2 * CELL_SIZE, x : x + 2 * CELL_SIZE] = rasterize_shape(obj.shape, obj.radius_at(frame_index))
    return canvas[CELL_SIZE:-CELL_SIZE, CELL_SIZE:-CELL_SIZE]


def render_scene(scene: Scene) -> np.ndarray:
    """Return the pixels of a scene, uint8 [frames, 64, 64, 3]."""
    clip = np.empty((scene.frame_count, FRAME_SIZE, FRAME_SIZE, 3), dtype=np.float32)
    clip[:] = BACKGROUNDS[scene.background]
    for frame_index in range(scene.frame_count):
        for obj in scene.objects:
            alpha = rasterize_object(obj, frame_index)[..., None]
            clip[frame_index] += alpha * (np.asarray(COLOURS[obj.colour], dtype=np.float32) - clip[frame_index])
    return np.rint(clip).astype(np.uint8)


def render_object_mask(scene: Scene) -> np.ndarray:
    """Return which pixels belong to an object, bool [frames, 64, 64]."""
    touched = np.zeros((scene.frame_count, FRAME_SIZE, FRAME_SIZE), dtype=bool)
    for frame_index in range(scene.frame_count):
        for obj in scene.objects:
            touched[frame_index] |= rasterize_object(obj, frame_index) > 0
    return touched

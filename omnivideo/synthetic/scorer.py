"""Detect the objects of a clip from its pixels, without any trained model.

Every frame is segmented into blobs that differ from the background. A blob is assigned the nearest palette colour, and
the shape whose template overlaps it best, or no shape if no template overlaps enough. Tracks of blobs of one colour
give motion and steadiness.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from omnivideo.synthetic.facts import ObjectDetection, SceneDetection
from omnivideo.synthetic.rendering import compute_outline, rasterize_shape
from omnivideo.synthetic.scenes import (
    BACKGROUNDS,
    CLIP_FRAMES,
    COLOURS,
    DIRECTIONS,
    RADIUS_BY_SIZE,
    SHAPES,
    TURN_FRAME,
    Scene,
    SceneObject,
)

MIN_FOREGROUND_DISTANCE = 40.0  # RGB distance from the background at which a pixel may belong to an object
MIN_BLOB_PIXELS = 24  # smaller blobs are noise
MAX_COLOUR_DISTANCE = 75.0  # RGB distance from a palette colour beyond which a blob has no colour name
MIN_TEMPLATE_OVERLAP = 0.78  # intersection over union with a template, below which a blob has no shape
SIZE_THRESHOLD_RADIUS = (RADIUS_BY_SIZE["small"] + RADIUS_BY_SIZE["large"]) / 2
MIN_MOTION_PX = 5.0  # px in four frames; a slow motion has 8, a normal one 16, a fast one 32
MAX_REST_PX = 3.0  # px in four frames
MAX_SLOW_PX, MIN_FAST_PX = 12.0, 24.0  # px in four frames
MIN_GROWTH_RATIO = 1.35
MAX_POSITION_ERROR = 3.0  # px by which an object of a clip may be away from where a scene has it


@dataclass(frozen=True)
class Blob:
    """One object in one frame: centre and half-side of the box in px, and overlap with the template of its shape."""

    colour: str | None
    shape: str | None
    x: float
    y: float
    radius: float
    template_overlap: float


@cache
def compute_unit_area(shape: str) -> float:
    """Return the area of a shape divided by the square of its radius."""
    if shape == "circle":
        return np.pi
    x, y = compute_outline(shape, 1.0).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


@cache
def render_template(shape: str, quarter_radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the coverage [32, 32] of a shape and its centroid (y, x)."""
    filled = rasterize_shape(shape, quarter_radius / 4)
    return filled, np.array(ndimage.center_of_mass(filled))


def find_nearest_colour(palette: dict[str, tuple[int, int, int]], rgb: np.ndarray) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.asarray(value))) for name, value in palette.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= MAX_COLOUR_DISTANCE else None


def estimate_background(clip: np.ndarray) -> np.ndarray:
    """Return the colour [3] of the background: the median of the frames' borders."""
    border = np.concatenate(
        [
            clip[:, :2].reshape(-1, 3),
            clip[:, -2:].reshape(-1, 3),
            clip[:, :, :2].reshape(-1, 3),
            clip[:, :, -2:].reshape(-1, 3),
        ]
    )
    colour: np.ndarray = np.median(border, axis=0)
    return colour


def match_shape(alpha: np.ndarray, centroid: np.ndarray, area: float) -> tuple[str | None, float, float, np.ndarray]:
    """Return the best shape (None below `MIN_TEMPLATE_OVERLAP`), the overlap, the radius, and the box centre (y, x)."""
    best: tuple[str | None, float, float, np.ndarray] = (None, 0.0, (area / 3.0) ** 0.5, centroid)
    for shape in SHAPES:
        radius = (area / compute_unit_area(shape)) ** 0.5
        quarter_radius = int(np.clip(round(radius * 4), 12, 60))
        filled, template_centroid = render_template(shape, quarter_radius)
        aligned = ndimage.shift(
            crop_window(alpha, centroid, template_centroid),
            template_centroid - 16 - (centroid - np.floor(centroid)),
            order=1,
        )
        overlap = float(np.minimum(aligned, filled).sum() / np.maximum(aligned, filled).sum())
        if overlap > best[1]:
            best = (shape, overlap, radius, centroid + 15.5 - template_centroid)
    return best if best[1] >= MIN_TEMPLATE_OVERLAP else (None, *best[1:])


def crop_window(alpha: np.ndarray, centroid: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """Return a 32x32 window of `alpha` whose pixel 16 is the floor of the centroid, padded with zeros."""
    y, x = np.floor(centroid).astype(int)
    return np.pad(alpha, 16)[y : y + 32, x : x + 32]


def blob_from_region(pixels: np.ndarray, background: np.ndarray, region: np.ndarray) -> Blob:
    """Return the object in a region [H, W] of a frame [H, W, 3]."""
    difference = pixels - background
    distance = np.linalg.norm(difference, axis=-1)
    core = region & (distance >= np.quantile(distance[region], 0.5))
    colour = np.median(pixels[core], axis=0)
    colour_axis = colour - background
    alpha = np.clip(difference @ colour_axis / max(float(colour_axis @ colour_axis), 1.0), 0, 1)
    alpha = np.where(ndimage.binary_dilation(region, iterations=1), alpha, 0)
    centroid = np.array(ndimage.center_of_mass(alpha))
    shape, overlap, radius, centre = match_shape(alpha, centroid, float(alpha.sum()))
    return Blob(find_nearest_colour(COLOURS, colour), shape, centre[1] + 0.5, centre[0] + 0.5, radius, overlap)


def find_regions(foreground: np.ndarray) -> list[np.ndarray]:
    """Return the connected regions of at least `MIN_BLOB_PIXELS` px."""
    labels, count = ndimage.label(foreground)
    regions = (labels == index for index in range(1, count + 1))
    return [region for region in regions if region.sum() >= MIN_BLOB_PIXELS]


def detect_blobs(frame: np.ndarray, background: np.ndarray) -> list[Blob]:
    """Return the objects of a frame [H, W, 3]."""
    pixels = frame.astype(np.float32)
    distance = np.linalg.norm(pixels - background, axis=-1)
    detected = []
    for region in find_regions(distance > MIN_FOREGROUND_DISTANCE):
        # A faint bridge can join two objects, so segment again at half of the region's contrast.
        contrast = float(np.quantile(distance[region], 0.75))
        detected += [
            blob_from_region(pixels, background, subregion)
            for subregion in find_regions(region & (distance > contrast / 2))
        ]
    return detected


def track_blobs(frames: Sequence[list[Blob]]) -> list[list[Blob | None]]:
    """Return a track for each blob of the first frame: the nearest blob of its colour in every later frame."""
    tracks: list[list[Blob | None]] = [[blob] for blob in frames[0]]
    for blobs in frames[1:]:
        unmatched = list(blobs)
        for track in tracks:
            last = next(blob for blob in reversed(track) if blob is not None)
            candidates = [
                blob
                for blob in unmatched
                if blob.colour == last.colour and np.hypot(blob.x - last.x, blob.y - last.y) < 12
            ]
            match = min(candidates, key=lambda blob: np.hypot(blob.x - last.x, blob.y - last.y), default=None)
            if match is not None:
                unmatched.remove(match)
            track.append(match)
    return tracks


@dataclass(frozen=True)
class Path:
    """How an object moves: see `ObjectDetection`. A motion is None if it is unclear."""

    motion: str | None
    speed: str | None = None
    second_motion: str | None = None


def find_position(track: Sequence[Blob | None], frame_index: int) -> np.ndarray:
    """Return the centre (x, y) of an object at a frame, interpolated over frames in which it was not found."""
    frames = [index for index, blob in enumerate(track) if blob is not None]
    present = [blob for blob in track if blob is not None]
    return np.array([np.interp(frame_index, frames, [getattr(blob, axis) for blob in present]) for axis in "xy"])


def classify_displacement(displacement: np.ndarray) -> str | None:
    """Return the direction of a displacement (x, y) within four frames, "still", or None if it is unclear."""
    dx, dy = (float(value) for value in displacement)
    far, near = sorted((abs(dx), abs(dy)), reverse=True)
    if far <= MAX_REST_PX:
        return "still"
    if far < MIN_MOTION_PX or near > far / 2:
        return None
    return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")


def classify_path(track: Sequence[Blob | None]) -> Path:
    """Return how an object moves in the first nine frames of its track.

    An object that turns back bounces off the edge of the frame, which is no second motion.
    """
    track = track[:CLIP_FRAMES]
    present = [blob for blob in track if blob is not None]
    if len(track) == 1:
        return Path("still")
    if len(present) < len(track) - 2:
        return Path(None)
    last = len(track) - 1
    turn = TURN_FRAME if last > TURN_FRAME else 0
    positions = [find_position(track, index) for index in (0, turn or last, last)]
    first, second = (classify_displacement(positions[index + 1] - positions[index]) for index in (0, 1))
    second = second if turn else first
    if first is None:
        return Path(None)
    if first == second == "still":
        ratio = present[-1].radius / present[0].radius
        return Path("growing" if ratio > MIN_GROWTH_RATIO else "shrinking" if ratio < 1 / MIN_GROWTH_RATIO else "still")
    moving_leg = 1 if first == "still" else 0
    distance = float(np.abs(positions[moving_leg + 1] - positions[moving_leg]).max())
    speed = "slow" if distance < MAX_SLOW_PX else "fast" if distance > MIN_FAST_PX else "normal"
    if first == "still":
        return Path(first, speed, second) if second else Path(None)
    if continues_along(track, first, turn, last, distance):
        return Path(first, speed)
    return Path(first, speed, second) if second else Path(None)


def continues_along(track: Sequence[Blob | None], motion: str, turn: int, last: int, distance: float) -> bool:
    """Return whether an object still moves along the axis of its motion after the turn, possibly after a bounce.

    `distance` is the way in px that it covered before the turn.
    """
    points = np.stack([find_position(track, index) for index in range(turn, last + 1)])
    axis = 0 if DIRECTIONS[motion][0] else 1
    way = float(np.abs(np.diff(points[:, axis])).sum())
    aside = float(np.abs(points[-1, 1 - axis] - points[0, 1 - axis]))
    return turn == 0 or (way > distance / 2 and aside <= MAX_REST_PX)


def find_majority(names: Sequence[str | None]) -> str | None:
    """Return the name that more than half of the entries have, or None."""
    name, votes = Counter(names).most_common(1)[0]
    return name if votes > len(names) / 2 else None


def detection_from_track(track: Sequence[Blob | None]) -> ObjectDetection:
    present = [blob for blob in track if blob is not None]
    first, path = present[0], classify_path(track)
    return ObjectDetection(
        shape=find_majority([blob.shape for blob in present]),
        colour=find_majority([blob.colour for blob in present]),
        size="small" if first.radius < SIZE_THRESHOLD_RADIUS else "large",
        motion=path.motion,
        x=first.x,
        y=first.y,
        speed=path.speed,
        second_motion=path.second_motion,
    )


def detect_scene(clip: np.ndarray) -> SceneDetection:
    """Return the background, objects and steadiness of a clip or still, uint8 [F, H, W, 3]."""
    background = estimate_background(clip)
    frames = [detect_blobs(frame, background) for frame in clip]
    usual_count = find_majority([str(len(blobs)) for blobs in frames])
    tracks = track_blobs(frames)
    objects = tuple(map(detection_from_track, tracks))
    steady = [
        str(len(blobs)) == usual_count
        and all(
            track[frame_index] is not None and track[frame_index].shape == obj.shape  # type: ignore[union-attr]
            for track, obj in zip(tracks, objects, strict=True)
        )
        for frame_index, blobs in enumerate(frames)
    ]
    return SceneDetection(find_nearest_colour(BACKGROUNDS, background), objects, sum(steady) / len(steady))


# ---------------------------------------------------------------- comparison with a scene


def find_matching_frames(clip: np.ndarray, scene: Scene) -> list[bool]:
    """Return for each frame of a clip [F, H, W, 3] whether it shows the scene's objects where the scene has them."""
    background = estimate_background(clip)
    if find_nearest_colour(BACKGROUNDS, background) != scene.background:
        return [False] * len(clip)
    return [
        shows_objects(detect_blobs(frame, background), scene.objects, frame_index)
        for frame_index, frame in enumerate(clip)
    ]


def shows_objects(blobs: Sequence[Blob], objects: Sequence[SceneObject], frame_index: int) -> bool:
    """Return whether the blobs of a frame are exactly these objects, at most `MAX_POSITION_ERROR` px away."""
    unmatched = list(blobs)
    for obj in objects:
        x, y = obj.centre_at(frame_index)
        match = next(
            (
                blob
                for blob in unmatched
                if (blob.colour, blob.shape) == (obj.colour, obj.shape)
                and np.hypot(blob.x - x, blob.y - y) <= MAX_POSITION_ERROR
            ),
            None,
        )
        if match is None:
            return False
        unmatched.remove(match)
    return not unmatched


def measure_seam(clip: np.ndarray, seam_frame: int) -> float:
    """Return the change from the frame before the seam to the frame after it, divided by the median change of the clip.

    The change is the mean absolute difference of two successive frames; a seam that nobody sees is near 1.
    """
    changes = np.abs(np.diff(clip.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))
    return float((changes[seam_frame - 1] + 0.5) / (np.median(changes) + 0.5))

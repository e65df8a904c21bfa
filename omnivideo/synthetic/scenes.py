"""The synthetic world: scenes with exact ground truth, rendered to pixels.

It replaces the 45 M samples of the paper's Table 1, which are not available. A `Scene` states everything about its
pixels, so captions, questions, edits and verdicts on generated clips all derive from it.

Geometry. A frame is 64x64 px. Objects are placed on a lattice that matches the decoder: a small object is centred in
one 16 px cell (one decoder token: 8 px of VAE stride times a patch of 2), a large one in a block of 2x2 cells. A moving
object covers 4 px a frame, so it moves by exactly one decoder token in each latent frame (4 frames). docs/tiny.md
explains the benefit.

Composition. Most scenes for generation have a default layout if the caption does not state positions: one object in the
middle, two side by side in the order in which they are mentioned, three or four spread out. The layout then follows
from the text, and a small decoder can learn it.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

FRAME_SIZE = 64  # px, both sides
CELL_SIZE = 16  # px, one decoder token
CLIP_FRAMES = 9  # a clip: 4k + 1 frames, as the causal VAE requires
FPS = 8
SPEED = 4  # px per frame
MIN_GAP = 3  # px that must stay free between the boxes of two objects, at every frame

Split = Literal["train", "held_out"]
RGB = tuple[int, int, int]
LatticePoints = tuple[tuple[int, int], ...]

SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
MOTIONS = ("still", "left", "right", "up", "down", "growing", "shrinking")
COLOURS: dict[str, RGB] = {
    "red": (225, 35, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 230),
    "yellow": (245, 225, 40),
    "orange": (250, 135, 15),
    "purple": (145, 45, 195),
    "cyan": (45, 215, 225),
    "white": (250, 250, 250),
}
BACKGROUNDS: dict[str, RGB] = {
    "black": (12, 12, 12),
    "grey": (140, 140, 140),
    "white": (250, 250, 250),
    "pink": (255, 150, 190),
    "brown": (100, 62, 36),
}
RADIUS_BY_SIZE = {"small": 7.0, "large": 13.0}  # half of the box, px
MOTION_VECTORS = {"left": (-SPEED, 0), "right": (SPEED, 0), "up": (0, -SPEED), "down": (0, SPEED)}


@dataclass(frozen=True)
class SceneObject:
    """One object with its centre in px at frame 0. A growing object starts small, a shrinking object large."""

    shape: str
    colour: str
    size: str
    motion: str
    x: int
    y: int

    def centre_at(self, frame_index: int) -> tuple[int, int]:
        dx, dy = MOTION_VECTORS.get(self.motion, (0, 0))
        return self.x + dx * frame_index, self.y + dy * frame_index

    def radius_at(self, frame_index: int) -> float:
        """Return half of the side of the bounding box, in px."""
        progress = frame_index / (CLIP_FRAMES - 1)
        span = RADIUS_BY_SIZE["large"] - RADIUS_BY_SIZE["small"]
        if self.motion == "growing":
            return RADIUS_BY_SIZE["small"] + span * progress
        if self.motion == "shrinking":
            return RADIUS_BY_SIZE["large"] - span * progress
        return RADIUS_BY_SIZE[self.size]


@dataclass(frozen=True)
class Scene:
    """A background and one to four objects; `frame_count` is 1 for a still and 9 for a clip."""

    background: str
    objects: tuple[SceneObject, ...]
    frame_count: int

    @property
    def is_video(self) -> bool:
        return self.frame_count > 1


def is_held_out(obj: SceneObject) -> bool:
    """Return True for one colour in eight of every (shape, size, motion): training never uses it."""
    index = (
        list(COLOURS).index(obj.colour)
        + 2 * SHAPES.index(obj.shape)
        + 4 * SIZES.index(obj.size)
        + 3 * MOTIONS.index(obj.motion)
    )
    return index % 8 == 5


def is_in_split(scene: Scene, split: Split) -> bool:
    """Return whether a scene belongs to the split: held-out scenes contain a held-out object, training scenes none."""
    return any(map(is_held_out, scene.objects)) == (split == "held_out")


# ---------------------------------------------------------------- sampling


@cache
def find_lattice_points(size: str, motion: str, frame_count: int) -> tuple[tuple[int, int], ...]:
    """Return the lattice points from which an object of this size and motion stays inside the frame."""
    centred = size == "small" and motion not in ("growing", "shrinking")
    axis = range(CELL_SIZE // 2, FRAME_SIZE, CELL_SIZE) if centred else range(CELL_SIZE, FRAME_SIZE, CELL_SIZE)
    dx, dy = MOTION_VECTORS.get(motion, (0, 0))
    reach = (frame_count - 1, 0)
    largest = RADIUS_BY_SIZE["small"] if centred else RADIUS_BY_SIZE["large"]

    def is_inside(start: int, step: int) -> bool:
        return all(largest <= start + step * frame_index <= FRAME_SIZE - largest for frame_index in reach)

    return tuple((x, y) for x in axis for y in axis if is_inside(x, dx) and is_inside(y, dy))


def is_clear_of(first: SceneObject, second: SceneObject, frame_count: int) -> bool:
    """Return whether the boxes of two objects keep `MIN_GAP` px between them at every frame."""
    for frame_index in range(0, frame_count, 2):
        (ax, ay), (bx, by) = first.centre_at(frame_index), second.centre_at(frame_index)
        min_distance = first.radius_at(frame_index) + second.radius_at(frame_index) + MIN_GAP
        if abs(ax - bx) < min_distance and abs(ay - by) < min_distance:
            return False
    return True


def place_randomly(
    rng: random.Random, objects: Sequence[SceneObject], frame_count: int
) -> tuple[SceneObject, ...] | None:
    """Return the objects at random lattice points without contact, or None after 40 failed attempts."""
    for _ in range(40):
        placed: list[SceneObject] = []
        for obj in objects:
            x, y = rng.choice(find_lattice_points(obj.size, obj.motion, frame_count))
            candidate = replace(obj, x=x, y=y)
            if not all(is_clear_of(candidate, other, frame_count) for other in placed):
                break
            placed.append(candidate)
        else:
            return tuple(placed)
    return None


# Target positions of the objects of a composed scene, in px, halfway through a clip. They are slightly off-centre,
# so that an object between two lattice points always takes the same one.
ARRANGEMENTS: dict[str, tuple[tuple[int, int], ...]] = {
    "middle": ((31, 31),),
    "row": ((15, 31), (49, 31)),
    "column": ((31, 15), (31, 49)),
    "three": ((15, 15), (49, 15), (31, 49)),
    "four": ((15, 15), (49, 15), (15, 49), (49, 49)),
}
DEFAULT_ARRANGEMENTS = ("middle", "row", "three", "four")  # by the number of objects, from one
SIDE_TARGETS = (0, 31, FRAME_SIZE)


@cache
def snap_to_lattice(
    kinds: tuple[tuple[str, str], ...], targets: tuple[tuple[int, int], ...], frame_count: int
) -> LatticePoints | None:
    """Return the lattice points nearest to the targets at which objects of these (size, motion) do not touch.

    Only the eight nearest points of each object are tried; the result is None if none of them fit.
    """
    options = []
    for (size, motion), (x, y) in zip(kinds, targets, strict=True):
        candidates = [
            SceneObject("circle", "red", size, motion, *point)
            for point in find_lattice_points(size, motion, frame_count)
        ]
        by_distance = [(math.dist(obj.centre_at(frame_count // 2), (x, y)) ** 2, obj) for obj in candidates]
        options.append(sorted(by_distance, key=lambda option: option[0])[:8])
    for combination in sorted(itertools.product(*options), key=lambda pairs: sum(distance for distance, _ in pairs)):
        objects = [obj for _, obj in combination]
        if all(is_clear_of(first, second, frame_count) for first, second in itertools.combinations(objects, 2)):
            return tuple((obj.x, obj.y) for obj in objects)
    return None


def arrange_objects(
    objects: Sequence[SceneObject], targets: Sequence[tuple[int, int]], frame_count: int
) -> tuple[SceneObject, ...] | None:
    """Return the objects in the same order, each near its target, or None if they do not fit."""
    points = snap_to_lattice(tuple((obj.size, obj.motion) for obj in objects), tuple(targets), frame_count)
    if points is None:
        return None
    return tuple(replace(obj, x=x, y=y) for obj, (x, y) in zip(objects, points, strict=True))


def arrange_by_default(objects: Sequence[SceneObject], frame_count: int) -> tuple[SceneObject, ...] | None:
    """Return the objects at the default positions, which apply if a prompt does not state positions."""
    return arrange_objects(objects, ARRANGEMENTS[DEFAULT_ARRANGEMENTS[len(objects) - 1]], frame_count)


def compose_layout(
    rng: random.Random, objects: Sequence[SceneObject], frame_count: int
) -> tuple[SceneObject, ...] | None:
    """Return the objects in the default layout, or in one that a caption can describe, or None if they do not fit.

    Such layouts are one object at a side or in a corner, and two objects one above the other.
    """
    first = objects[0]
    if len(objects) == 1 and first.motion == "still" and rng.random() < 0.3:
        sides = SIDE_TARGETS if first.size == "large" else (0, FRAME_SIZE)
        return arrange_objects(objects, [(rng.choice(sides), rng.choice(sides))], frame_count)
    is_sayable = len(objects) == 2 and first.motion == objects[1].motion and first != objects[1]
    if is_sayable and rng.random() < 0.35:
        return arrange_objects(objects, ARRANGEMENTS["column"], frame_count)
    return arrange_by_default(objects, frame_count)


def get_initial_size(motion: str, size: str) -> str:
    """Return the size at frame 0: a growing object starts small, a shrinking object large."""
    return {"growing": "small", "shrinking": "large"}.get(motion, size)


def sample_object(rng: random.Random, background: str, is_video: bool, large_probability: float = 0.5) -> SceneObject:
    """Return an object at position (0, 0); it is large with probability `large_probability`."""
    motion = rng.choice(MOTIONS) if is_video else "still"
    colour = rng.choice([name for name in COLOURS if name != background])
    size = get_initial_size(motion, "large" if rng.random() < large_probability else "small")
    return SceneObject(rng.choice(SHAPES), colour, size, motion, 0, 0)


def sample_objects(rng: random.Random, background: str, is_video: bool) -> list[SceneObject]:
    """Return one object, a group of equal objects, or two or three different objects."""
    kind = rng.random()
    if kind < 0.35:
        return [sample_object(rng, background, is_video)]
    if kind < 0.55:
        return [sample_object(rng, background, is_video, large_probability=0.15)] * rng.randint(2, 3 if is_video else 4)
    count = 2 if kind < 0.85 else 3
    objects: list[SceneObject] = []
    while len(objects) < count:
        obj = sample_object(rng, background, is_video, large_probability=0.3)
        if (obj.shape, obj.colour) not in {(other.shape, other.colour) for other in objects}:
            objects.append(obj)
    return objects


def sample_scene(rng: random.Random, is_video: bool, split: Split = "train", composed_share: float = 0.0) -> Scene:
    """Return a scene of the split whose objects do not touch; a share `composed_share` has a composed layout."""
    while True:
        background = rng.choice(list(BACKGROUNDS))
        frame_count = CLIP_FRAMES if is_video else 1
        objects = sample_objects(rng, background, is_video)
        is_composed = composed_share > 0 and rng.random() < composed_share
        placed = compose_layout(rng, objects, frame_count) if is_composed else place_randomly(rng, objects, frame_count)
        if placed is None:
            continue
        scene = Scene(background, placed, frame_count)
        if is_in_split(scene, split):
            return scene


def stream_scenes(seed: int, is_video: bool, split: Split = "train", composed_share: float = 0.0) -> Iterator[Scene]:
    """Yield an endless sequence of scenes, which is the same for the same arguments."""
    rng = random.Random(f"{seed}/{is_video}/{split}")
    while True:
        yield sample_scene(rng, is_video, split, composed_share)


# ---------------------------------------------------------------- pixels


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

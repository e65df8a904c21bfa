"""The synthetic world: scenes with exact ground truth, rendered to pixels.

It replaces the 45 M samples of the paper's Table 1, which are not available. A `Scene` states everything about its
pixels, so captions, questions, edits and verdicts on generated clips all derive from it.

Geometry. A frame is 64x64 px. Objects are placed on a lattice that matches the decoder: a small object is usually
centred in one 16 px cell (one decoder token: 8 px of VAE stride times a patch of 2) or on the frame's middle line, a
large one in a block of 2x2 cells. A moving object covers 4 px a frame, so it moves by exactly one decoder token in each
latent frame (4 frames); a slow one covers half of that, a fast one twice as much. It bounces off the edges of the
frame. An object may change its motion once, after 4 frames. docs/tiny.md explains the benefit.

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

FRAME_SIZE = 64  # px, both sides
CELL_SIZE = 16  # px, one decoder token
CLIP_FRAMES, LONG_CLIP_FRAMES = 9, 17  # lengths of a clip: 4k + 1 frames, as the causal VAE requires
EXTENSION_FRAMES = 8  # frames that one extension adds
TURN_FRAME = 4  # the frame at which an object with two motions changes from the first to the second
MAX_FRAMES = 41  # the longest clip whose motion is defined
FPS = 8
SPEED_PX = {"slow": 2, "normal": 4, "fast": 8}  # px per frame
MIN_GAP = 3  # px that must stay free between the boxes of two objects, at every frame

Split = Literal["train", "held_out"]
RGB = tuple[int, int, int]
Point = tuple[int, int]

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
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = tuple(SPEED_PX)


def needs_room(size: str, motion: str) -> bool:
    """Return whether an object covers more than one cell at some frame."""
    return size == "large" or motion in ("growing", "shrinking")


def get_centre_bounds(size: str, motion: str) -> tuple[int, int]:
    """Return the least and the greatest coordinate of an object's centre that keep it inside the frame."""
    margin = CELL_SIZE if needs_room(size, motion) else CELL_SIZE // 2
    return margin, FRAME_SIZE - margin


@cache
def trace_path(bounds: Point, start: Point, motion: str, second_motion: str | None, speed: str) -> tuple[Point, ...]:
    """Return the centre of an object at every frame; it bounces off the bounds of its centre."""
    position, points = list(start), [start]
    velocity = get_velocity(motion, speed)
    for frame_index in range(MAX_FRAMES - 1):
        if frame_index == TURN_FRAME and second_motion is not None:
            velocity = get_velocity(second_motion, speed)
        for axis in (0, 1):
            if not bounds[0] <= position[axis] + velocity[axis] <= bounds[1]:
                velocity[axis] = -velocity[axis]
            position[axis] += velocity[axis]
        points.append((position[0], position[1]))
    return tuple(points)


def get_velocity(motion: str, speed: str) -> list[int]:
    """Return the velocity (x, y) in px per frame; (0, 0) for a motion without a direction."""
    return [SPEED_PX[speed] * step for step in DIRECTIONS.get(motion, (0, 0))]


@dataclass(frozen=True)
class SceneObject:
    """One object with its centre in px at frame 0. A growing object starts small, a shrinking object large.

    `second_motion` is the motion from frame `TURN_FRAME` on, None if the first one continues. `speed` matters only for
    an object that moves in a direction.
    """

    shape: str
    colour: str
    size: str
    motion: str
    x: int
    y: int
    speed: str = "normal"
    second_motion: str | None = None

    @property
    def changes_place(self) -> bool:
        """Return whether one of its motions has a direction; only then its speed matters."""
        return self.motion in DIRECTIONS or self.second_motion in DIRECTIONS

    def centre_at(self, frame_index: int) -> Point:
        """Return the centre (x, y) at a frame."""
        if not self.changes_place:
            return self.x, self.y
        return trace_path(
            get_centre_bounds(self.size, self.motion), (self.x, self.y), self.motion, self.second_motion, self.speed
        )[frame_index]

    def continue_from(self, frame_index: int) -> "SceneObject":
        """Return the object as it is at a frame, with the motion that it has from there on; growth has ended."""
        (x, y), (next_x, next_y) = self.centre_at(frame_index), self.centre_at(frame_index + 1)
        size = min(SIZES, key=lambda name: abs(RADIUS_BY_SIZE[name] - self.radius_at(frame_index)))
        step = ((next_x > x) - (next_x < x), (next_y > y) - (next_y < y))
        motion = next((name for name, direction in DIRECTIONS.items() if direction == step), "still")
        return SceneObject(self.shape, self.colour, size, motion, x, y, self.speed if motion != "still" else "normal")

    def radius_at(self, frame_index: int) -> float:
        """Return half of the side of the bounding box, in px; growing and shrinking end with the first 9 frames."""
        progress = min(frame_index / (CLIP_FRAMES - 1), 1.0)
        span = RADIUS_BY_SIZE["large"] - RADIUS_BY_SIZE["small"]
        if self.motion == "growing":
            return RADIUS_BY_SIZE["small"] + span * progress
        if self.motion == "shrinking":
            return RADIUS_BY_SIZE["large"] - span * progress
        return RADIUS_BY_SIZE[self.size]


@dataclass(frozen=True)
class Scene:
    """A background and one to four objects; `frame_count` is 1 for a still, and 9, 17 or more for a clip."""

    background: str
    objects: tuple[SceneObject, ...]
    frame_count: int

    @property
    def is_video(self) -> bool:
        return self.frame_count > 1

    def take_frames(self, frame_count: int) -> "Scene":
        """Return the scene with another length: its beginning, or its continuation."""
        return replace(self, frame_count=frame_count)

    def freeze(self, frame_index: int) -> "Scene":
        """Return the still that shows one frame. A radius between small and large becomes the nearer one's."""
        objects = (replace(obj.continue_from(frame_index), motion="still", speed="normal") for obj in self.objects)
        return Scene(self.background, tuple(objects), 1)

    def continue_from(self, frame_index: int, frame_count: int) -> "Scene":
        """Return what follows if nothing changes: a clip whose first frame is a late frame of this one."""
        return Scene(self.background, tuple(obj.continue_from(frame_index) for obj in self.objects), frame_count)


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
def find_start_points(
    size: str, motion: str, speed: str, second_motion: str | None, frame_count: int
) -> tuple[Point, ...]:
    """Return the lattice points from which an object moves as described.

    A motion keeps its direction for at least 8 frames before it bounces, a fast or a second one for at least 4.
    """
    bounds = get_centre_bounds(size, motion)
    motions = [name for name in (motion, second_motion or "") if name in DIRECTIONS]
    cells = (8, 24, 40, 56) if bounds[0] == CELL_SIZE // 2 else (16, 32, 48)
    centred = cells if bounds[0] == CELL_SIZE else (8, 24, 32, 40, 56)
    axes = [cells if any(DIRECTIONS[name][axis] for name in motions) else centred for axis in (0, 1)]
    points = []
    for start in itertools.product(*axes):
        path = trace_path(bounds, (start[0], start[1]), motion, second_motion, speed)
        if keeps_direction(path, motion, speed, 0, frame_count, second_motion is not None) and (
            second_motion is None or keeps_direction(path, second_motion, speed, TURN_FRAME, frame_count, True)
        ):
            points.append((start[0], start[1]))
    return tuple(points)


def keeps_direction(
    path: Sequence[Point], motion: str, speed: str, first_frame: int, frame_count: int, is_short: bool
) -> bool:
    """Return whether a path follows the motion from a frame on, for 4 frames if it is short or fast, otherwise 8."""
    length = min(4 if is_short or speed == "fast" else 8, frame_count - 1)
    dx, dy = get_velocity(motion, speed)
    x, y = path[first_frame]
    return all(path[first_frame + step] == (x + dx * step, y + dy * step) for step in range(1, length + 1))


def list_start_points(obj: SceneObject, frame_count: int) -> tuple[Point, ...]:
    return find_start_points(obj.size, obj.motion, obj.speed, obj.second_motion, frame_count)


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
            x, y = rng.choice(list_start_points(obj, frame_count))
            candidate = replace(obj, x=x, y=y)
            if not all(is_clear_of(candidate, other, frame_count) for other in placed):
                break
            placed.append(candidate)
        else:
            return tuple(placed)
    return None


# Target positions of the objects of a composed scene, in px, halfway through a clip. Most are slightly off the lattice,
# so that an object between two lattice points always takes the same one.
ARRANGEMENTS: dict[str, tuple[Point, ...]] = {
    "middle": ((32, 32),),
    "row": ((15, 32), (49, 32)),
    "column": ((32, 15), (32, 49)),
    "three": ((15, 15), (49, 15), (32, 49)),
    "four": ((15, 15), (49, 15), (15, 49), (49, 49)),
}
DEFAULT_ARRANGEMENTS = ("middle", "row", "three", "four")  # by the number of objects, from one
SIDE_TARGETS = (0, 32, FRAME_SIZE)
ObjectKind = tuple[str, str, str, str | None]  # size, motion, speed, second motion


@cache
def snap_to_lattice(
    kinds: tuple[ObjectKind, ...], targets: tuple[Point, ...], frame_count: int, target_frame: int
) -> tuple[Point, ...] | None:
    """Return the start points at which objects of these kinds do not touch and are nearest to the targets at a frame.

    Only the eight nearest points of each object are tried; the result is None if none of them fit.
    """
    options = []
    for (size, motion, speed, second_motion), target in zip(kinds, targets, strict=True):
        candidates = [
            SceneObject("circle", "red", size, motion, *point, speed, second_motion)
            for point in find_start_points(size, motion, speed, second_motion, frame_count)
        ]
        by_distance = [(math.dist(obj.centre_at(target_frame), target) ** 2, obj) for obj in candidates]
        options.append(sorted(by_distance, key=lambda option: option[0])[:8])
    for combination in sorted(itertools.product(*options), key=lambda pairs: sum(distance for distance, _ in pairs)):
        objects = [obj for _, obj in combination]
        if all(is_clear_of(first, second, frame_count) for first, second in itertools.combinations(objects, 2)):
            return tuple((obj.x, obj.y) for obj in objects)
    return None


def arrange_objects(
    objects: Sequence[SceneObject], targets: Sequence[Point], frame_count: int, target_frame: int | None = None
) -> tuple[SceneObject, ...] | None:
    """Return the objects in the same order, each near its target halfway or at a frame; None if they do not fit."""
    points = snap_to_lattice(
        tuple((obj.size, obj.motion, obj.speed, obj.second_motion) for obj in objects),
        tuple(targets),
        frame_count,
        frame_count // 2 if target_frame is None else target_frame,
    )
    if points is None:
        return None
    return tuple(replace(obj, x=x, y=y) for obj, (x, y) in zip(objects, points, strict=True))


def arrange_by_default(objects: Sequence[SceneObject], frame_count: int) -> tuple[SceneObject, ...] | None:
    """Return the objects at the default positions, which apply if a prompt does not state positions."""
    return arrange_objects(objects, ARRANGEMENTS[DEFAULT_ARRANGEMENTS[len(objects) - 1]], frame_count)


def arrange_in_places(
    rng: random.Random, objects: Sequence[SceneObject], frame_count: int
) -> tuple[SceneObject, ...] | None:
    """Return the objects in different ninths of the frame at frame 0; None if they do not fit."""
    places = rng.sample(list(itertools.product(SIDE_TARGETS, SIDE_TARGETS)), len(objects))
    return arrange_objects(objects, places, frame_count, target_frame=0)


def compose_layout(
    rng: random.Random, objects: Sequence[SceneObject], frame_count: int
) -> tuple[SceneObject, ...] | None:
    """Return the objects in the default layout, or in one that a caption can describe, or None if they do not fit.

    The caption states the place of every object, or how two objects stand to each other.
    """
    first, chance = objects[0], rng.random()
    if len(objects) > 1 and all(obj == first for obj in objects):
        return arrange_by_default(objects, frame_count)
    if len(objects) == 2 and first.motion == objects[1].motion and chance < 0.25:
        return arrange_objects(objects, ARRANGEMENTS["column"], frame_count)
    if chance < 0.55:
        return arrange_in_places(rng, objects, frame_count)
    return arrange_by_default(objects, frame_count)


def get_initial_size(motion: str, size: str) -> str:
    """Return the size at frame 0: a growing object starts small, a shrinking object large."""
    return {"growing": "small", "shrinking": "large"}.get(motion, size)


def sample_object(
    rng: random.Random, background: str, is_video: bool, large_probability: float = 0.5, is_varied: bool = False
) -> SceneObject:
    """Return an object at position (0, 0); it is large with probability `large_probability`.

    If `is_varied`, some objects are slow or fast, or change their motion.
    """
    motion = rng.choice(MOTIONS) if is_video else "still"
    colour = rng.choice([name for name in COLOURS if name != background])
    size = get_initial_size(motion, "large" if rng.random() < large_probability else "small")
    obj = SceneObject(rng.choice(SHAPES), colour, size, motion, 0, 0)
    return vary_motion(rng, obj) if is_video and is_varied else obj


def vary_motion(rng: random.Random, obj: SceneObject) -> SceneObject:
    """Return the object, in a quarter of the cases with another speed or a second motion, if it moves or rests."""
    chance = rng.random()
    if obj.motion in DIRECTIONS and chance < 0.2:
        return replace(obj, speed=rng.choice(("slow", "fast")))
    if (obj.motion in DIRECTIONS and chance < 0.38) or (obj.motion == "still" and chance < 0.1):
        return replace(obj, second_motion=rng.choice(list_second_motions(obj.motion)))
    return obj


def list_second_motions(motion: str) -> list[str]:
    """Return the motions that can follow: a turn to the side, a stop, or any direction after a rest."""
    if motion not in DIRECTIONS:
        return list(DIRECTIONS)
    is_horizontal = DIRECTIONS[motion][0] != 0
    return [*(name for name in DIRECTIONS if (DIRECTIONS[name][0] != 0) != is_horizontal), "still"]


def sample_objects(rng: random.Random, background: str, is_video: bool) -> list[SceneObject]:
    """Return one object, a group of equal objects, or two or three different objects."""
    kind = rng.random()
    if kind < 0.35:
        return [sample_object(rng, background, is_video, is_varied=True)]
    if kind < 0.55:
        return [sample_object(rng, background, is_video, 0.15, is_varied=True)] * rng.randint(2, 3 if is_video else 4)
    count = 2 if kind < 0.85 else 3
    objects: list[SceneObject] = []
    while len(objects) < count:
        obj = sample_object(rng, background, is_video, 0.3, is_varied=True)
        if (obj.shape, obj.colour) not in {(other.shape, other.colour) for other in objects}:
            objects.append(obj)
    return objects


def sample_scene(
    rng: random.Random,
    is_video: bool,
    split: Split = "train",
    composed_share: float = 0.0,
    frame_count: int | None = None,
) -> Scene:
    """Return a scene of the split whose objects do not touch; a share `composed_share` has a composed layout.

    A clip has 9 frames unless `frame_count` is given.
    """
    frame_count = (frame_count or CLIP_FRAMES) if is_video else 1
    while True:
        background = rng.choice(list(BACKGROUNDS))
        objects = sample_objects(rng, background, is_video)
        is_composed = composed_share > 0 and rng.random() < composed_share
        placed = compose_layout(rng, objects, frame_count) if is_composed else place_randomly(rng, objects, frame_count)
        if placed is None:
            continue
        scene = Scene(background, placed, frame_count)
        if is_in_split(scene, split):
            return scene


def stream_scenes(
    seed: int,
    is_video: bool,
    split: Split = "train",
    composed_share: float = 0.0,
    frame_counts: Sequence[int] = (CLIP_FRAMES,),
) -> Iterator[Scene]:
    """Yield an endless sequence of scenes, which is the same for the same arguments; clips take turns in length."""
    rng = random.Random(f"{seed}/{is_video}/{split}")
    for frame_count in itertools.cycle(frame_counts):
        yield sample_scene(rng, is_video, split, composed_share, frame_count)

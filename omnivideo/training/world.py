"""The rendered world: scenes with exact ground truth, as pixels.

It stands for the 45 M samples of the paper's Table 1, which cannot be had here.  Everything about a scene is
known, so a caption, a question, an edit and a verdict on somebody's pixels can all be derived from one
`Scene`.

Geometry.  A frame is 64x64 px.  Objects stand on a lattice that matches the decoder: a small object is centred
in one 16 px cell (one decoder token: 8 px of VAE stride times a patch of 2), a large one in a block of 2x2 cells.
A moving object covers 4 px a frame, so each latent frame (4 frames) moves it by exactly one decoder token.
`../docs/tiny.md` has what this buys.

Composition.  Where a caption does not say where things are, scenes for generation are mostly composed as a person would
compose them: one object in the middle, two side by side in the order of their mention, three or four spread out.  The
layout then follows from the words, which a small decoder can learn.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

FRAME = 64  # px, both sides
CELL = 16  # px, one decoder token
FRAMES = 9  # a clip: 4k + 1 frames, as the causal VAE wants
FPS = 8
SPEED = 4  # px a frame
GAP = 3  # px that must stay free between the boxes of two objects, at every frame

Split = Literal["train", "held_out"]
Colour = tuple[int, int, int]
Spots = tuple[tuple[int, int], ...]

SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
MOTIONS = ("still", "left", "right", "up", "down", "growing", "shrinking")
COLOURS: dict[str, Colour] = {
    "red": (225, 35, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 230),
    "yellow": (245, 225, 40),
    "orange": (250, 135, 15),
    "purple": (145, 45, 195),
    "cyan": (45, 215, 225),
    "white": (250, 250, 250),
}
BACKGROUNDS: dict[str, Colour] = {
    "black": (12, 12, 12),
    "grey": (140, 140, 140),
    "white": (250, 250, 250),
    "pink": (255, 150, 190),
    "brown": (100, 62, 36),
}
RADIUS = {"small": 7.0, "large": 13.0}  # half of the box, px
STEP = {"left": (-SPEED, 0), "right": (SPEED, 0), "up": (0, -SPEED), "down": (0, SPEED)}


@dataclass(frozen=True)
class Thing:
    """One object: `x`, `y` is the centre in px at frame 0.  A growing one starts small, a shrinking one large."""

    shape: str
    colour: str
    size: str
    motion: str
    x: int
    y: int

    def centre(self, frame: int) -> tuple[int, int]:
        dx, dy = STEP.get(self.motion, (0, 0))
        return self.x + dx * frame, self.y + dy * frame

    def radius(self, frame: int) -> float:
        """Half of the bounding box, in px."""
        done = frame / (FRAMES - 1)
        span = RADIUS["large"] - RADIUS["small"]
        if self.motion == "growing":
            return RADIUS["small"] + span * done
        if self.motion == "shrinking":
            return RADIUS["large"] - span * done
        return RADIUS[self.size]


@dataclass(frozen=True)
class Scene:
    """A background and one to four objects; `frames` is 1 for a still and 9 for a clip."""

    background: str
    things: tuple[Thing, ...]
    frames: int

    @property
    def is_video(self) -> bool:
        return self.frames > 1


def held_out(thing: Thing) -> bool:
    """The rule: of every (shape, size, motion), one colour in eight is never shown in training."""
    index = (
        list(COLOURS).index(thing.colour)
        + 2 * SHAPES.index(thing.shape)
        + 4 * SIZES.index(thing.size)
        + 3 * MOTIONS.index(thing.motion)
    )
    return index % 8 == 5


def scene_fits(scene: Scene, split: Split) -> bool:
    """Training scenes hold no held-out object; held-out scenes hold at least one."""
    return any(map(held_out, scene.things)) == (split == "held_out")


# ---------------------------------------------------------------- sampling


@cache
def places(size: str, motion: str, frames: int) -> tuple[tuple[int, int], ...]:
    """Lattice points from which an object of this size and motion stays inside the frame."""
    centred = size == "small" and motion not in ("growing", "shrinking")
    axis = range(CELL // 2, FRAME, CELL) if centred else range(CELL, FRAME, CELL)
    dx, dy = STEP.get(motion, (0, 0))
    reach = (frames - 1, 0)
    largest = RADIUS["small"] if centred else RADIUS["large"]

    def inside(start: int, step: int) -> bool:
        return all(largest <= start + step * at <= FRAME - largest for at in reach)

    return tuple((x, y) for x in axis for y in axis if inside(x, dx) and inside(y, dy))


def apart(one: Thing, two: Thing, frames: int) -> bool:
    """Whether the boxes of two objects keep `GAP` px between them at every frame."""
    for frame in range(0, frames, 2):
        (ax, ay), (bx, by) = one.centre(frame), two.centre(frame)
        need = one.radius(frame) + two.radius(frame) + GAP
        if abs(ax - bx) < need and abs(ay - by) < need:
            return False
    return True


def place_all(rng: random.Random, things: Sequence[Thing], frames: int) -> tuple[Thing, ...] | None:
    """The same objects at random lattice points, none touching another; None where 40 tries found no room."""
    for _ in range(40):
        placed: list[Thing] = []
        for thing in things:
            x, y = rng.choice(places(thing.size, thing.motion, frames))
            candidate = replace(thing, x=x, y=y)
            if not all(apart(candidate, other, frames) for other in placed):
                break
            placed.append(candidate)
        else:
            return tuple(placed)
    return None


# Where the objects of a composed scene stand, in px, halfway through a clip.  A little off the middle, so that an
# object between two lattice points always takes the same one.
ARRANGEMENTS: dict[str, tuple[tuple[int, int], ...]] = {
    "middle": ((31, 31),),
    "row": ((15, 31), (49, 31)),
    "column": ((31, 15), (31, 49)),
    "three": ((15, 15), (49, 15), (31, 49)),
    "four": ((15, 15), (49, 15), (15, 49), (49, 49)),
}
USUAL = ("middle", "row", "three", "four")  # by the number of objects, from one
SIDES = (0, 31, FRAME)


@cache
def spots(kinds: tuple[tuple[str, str], ...], targets: tuple[tuple[int, int], ...], frames: int) -> Spots | None:
    """Lattice points nearest to the targets for objects of these (size, motion), none touching another.

    Only the eight nearest points of each are looked at; None where they leave no room.
    """
    options = []
    for (size, motion), (x, y) in zip(kinds, targets, strict=True):
        found = [Thing("circle", "red", size, motion, *at) for at in places(size, motion, frames)]
        away = [(math.dist(thing.centre(frames // 2), (x, y)) ** 2, thing) for thing in found]
        options.append(sorted(away, key=lambda one: one[0])[:8])
    for chosen in sorted(itertools.product(*options), key=lambda ones: sum(distance for distance, _ in ones)):
        things = [thing for _, thing in chosen]
        if all(apart(one, two, frames) for one, two in itertools.combinations(things, 2)):
            return tuple((thing.x, thing.y) for thing in things)
    return None


def arrange(things: Sequence[Thing], targets: Sequence[tuple[int, int]], frames: int) -> tuple[Thing, ...] | None:
    """The same objects, each near its target, in their order; None where they find no room."""
    found = spots(tuple((thing.size, thing.motion) for thing in things), tuple(targets), frames)
    if found is None:
        return None
    return tuple(replace(thing, x=x, y=y) for thing, (x, y) in zip(things, found, strict=True))


def usual(things: Sequence[Thing], frames: int) -> tuple[Thing, ...] | None:
    """The objects where they stand when nobody says where."""
    return arrange(things, ARRANGEMENTS[USUAL[len(things) - 1]], frames)


def compose(rng: random.Random, things: Sequence[Thing], frames: int) -> tuple[Thing, ...] | None:
    """As usual, or in a way that a caption can say: one object at a side or in a corner, two above each other."""
    first = things[0]
    if len(things) == 1 and first.motion == "still" and rng.random() < 0.3:
        sides = SIDES if first.size == "large" else (0, FRAME)
        return arrange(things, [(rng.choice(sides), rng.choice(sides))], frames)
    sayable = len(things) == 2 and first.motion == things[1].motion and first != things[1]
    if sayable and rng.random() < 0.35:
        return arrange(things, ARRANGEMENTS["column"], frames)
    return usual(things, frames)


def size_for(motion: str, size: str) -> str:
    """The size at frame 0: growing starts small, shrinking starts large."""
    return {"growing": "small", "shrinking": "large"}.get(motion, size)


def random_thing(rng: random.Random, background: str, video: bool, large: float = 0.5) -> Thing:
    """An object without a place; `large` is the chance of a large one."""
    motion = rng.choice(MOTIONS) if video else "still"
    colour = rng.choice([name for name in COLOURS if name != background])
    size = size_for(motion, "large" if rng.random() < large else "small")
    return Thing(rng.choice(SHAPES), colour, size, motion, 0, 0)


def random_things(rng: random.Random, background: str, video: bool) -> list[Thing]:
    """One object, a group of equal ones, or two or three different ones."""
    kind = rng.random()
    if kind < 0.35:
        return [random_thing(rng, background, video)]
    if kind < 0.55:
        return [random_thing(rng, background, video, large=0.15)] * rng.randint(2, 3 if video else 4)
    count = 2 if kind < 0.85 else 3
    things: list[Thing] = []
    while len(things) < count:
        thing = random_thing(rng, background, video, large=0.3)
        if (thing.shape, thing.colour) not in {(other.shape, other.colour) for other in things}:
            things.append(thing)
    return things


def random_scene(rng: random.Random, video: bool, split: Split = "train", composed: float = 0.0) -> Scene:
    """A scene of the split, drawn until its objects fit beside each other; a share `composed` is composed."""
    while True:
        background = rng.choice(list(BACKGROUNDS))
        frames = FRAMES if video else 1
        things = random_things(rng, background, video)
        as_usual = composed > 0 and rng.random() < composed
        placed = compose(rng, things, frames) if as_usual else place_all(rng, things, frames)
        if placed is None:
            continue
        scene = Scene(background, placed, frames)
        if scene_fits(scene, split):
            return scene


def scenes(seed: int, video: bool, split: Split = "train", composed: float = 0.0) -> Iterator[Scene]:
    """An endless, repeatable stream of scenes."""
    rng = random.Random(f"{seed}/{video}/{split}")
    while True:
        yield random_scene(rng, video, split, composed)


# ---------------------------------------------------------------- pixels


def outline(shape: str, radius: float) -> np.ndarray:
    """Corner points [n, 2] (x, y) of a shape whose bounding box has half-side `radius`, centred at 0."""
    if shape == "square":
        side = 0.88 * radius
        return np.array([(-side, -side), (side, -side), (side, side), (-side, side)])
    if shape == "triangle":
        return np.array([(0, -radius), (radius, 0.85 * radius), (-radius, 0.85 * radius)])
    angles = np.arange(10) * math.pi / 5 - math.pi / 2
    lengths = np.where(np.arange(10) % 2 == 0, 1.08 * radius, 0.46 * radius)
    return np.stack([np.cos(angles) * lengths, np.sin(angles) * lengths + 0.08 * radius], axis=1)


def inside_polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Even-odd rule: whether each point lies inside the polygon."""
    result = np.zeros(x.shape, dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y1 == y2:
            continue
        crosses = ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
        result ^= crosses
    return result


@cache
def mask(shape: str, radius: float) -> np.ndarray:
    """Coverage [32, 32] in 0..1 of a shape centred in the middle, anti-aliased by 8x8 samples a pixel."""
    side, fine = 2 * CELL, 8
    axis = (np.arange(side * fine) + 0.5) / fine - CELL
    x, y = np.meshgrid(axis, axis)
    filled = x**2 + y**2 <= radius**2 if shape == "circle" else inside_polygon(x, y, outline(shape, radius))
    return filled.reshape(side, fine, side, fine).mean(axis=(1, 3)).astype(np.float32)


def coverage(thing: Thing, frame: int) -> np.ndarray:
    """Coverage [64, 64] in 0..1 of one object at one frame."""
    canvas = np.zeros((FRAME + 2 * CELL, FRAME + 2 * CELL), dtype=np.float32)
    x, y = thing.centre(frame)
    canvas[y : y + 2 * CELL, x : x + 2 * CELL] = mask(thing.shape, thing.radius(frame))
    return canvas[CELL:-CELL, CELL:-CELL]


def render(scene: Scene) -> np.ndarray:
    """The scene's pixels: uint8 [frames, 64, 64, 3]."""
    clip = np.empty((scene.frames, FRAME, FRAME, 3), dtype=np.float32)
    clip[:] = BACKGROUNDS[scene.background]
    for frame in range(scene.frames):
        for thing in scene.things:
            alpha = coverage(thing, frame)[..., None]
            clip[frame] += alpha * (np.asarray(COLOURS[thing.colour], dtype=np.float32) - clip[frame])
    return np.rint(clip).astype(np.uint8)


def object_mask(scene: Scene) -> np.ndarray:
    """Which pixels some object touches: bool [frames, 64, 64]."""
    touched = np.zeros((scene.frames, FRAME, FRAME), dtype=bool)
    for frame in range(scene.frames):
        for thing in scene.things:
            touched[frame] |= coverage(thing, frame) > 0
    return touched

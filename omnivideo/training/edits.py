"""Edits of scenes by instruction: what is named changes, everything else stays."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from omnivideo.training.facts import Demand, Wanted
from omnivideo.training.language import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    MOTION_WORDS,
    SHAPE_WORDS,
    article,
    is_group,
    noun,
    plural,
)
from omnivideo.training.world import (
    BACKGROUNDS,
    COLOURS,
    FRAMES,
    MOTIONS,
    SHAPES,
    Scene,
    Split,
    Thing,
    apart,
    places,
    random_scene,
    random_thing,
    scene_fits,
    size_for,
)

IMAGE_EDITS = ("recolour", "reshape", "add", "remove", "background")
VIDEO_EDITS = (*IMAGE_EDITS, "motion")
MOTION_ORDERS = {
    "still": ("stay still", "stand still", "stop moving"),
    "left": ("move left", "move to the left", "go left"),
    "right": ("move right", "move to the right", "go right"),
    "up": ("move up", "rise", "go up"),
    "down": ("move down", "fall", "go down"),
    "growing": ("grow", "get bigger"),
    "shrinking": ("shrink", "get smaller"),
}


@dataclass(frozen=True)
class Edit:
    """A source, an instruction and the one right target; `touched` are the objects that differ, before and after."""

    kind: str
    source: Scene
    target: Scene
    instruction: str
    touched: tuple[Thing, ...]

    @property
    def demand(self) -> Demand:
        """All of the target, as a prompt would ask for it."""
        return demand_of(self.target)


def demand_of(scene: Scene) -> Demand:
    """All of a scene that does not hang on where things are, as a prompt would ask for it."""
    wants = (Wanted(one.shape, one.colour, None, one.motion if scene.is_video else None) for one in scene.things)
    return Demand(tuple(wants), background=scene.background)


def refer(rng: random.Random, thing: Thing, scene: Scene) -> str:
    """Words that mean this object and no other of the scene; "it" where it is alone."""
    others = [other for other in scene.things if other is not thing]
    if not others and rng.random() < 0.35:
        return "it"
    shape, colour = rng.choice(SHAPE_WORDS[thing.shape]), rng.choice(COLOUR_WORDS[thing.colour])
    choices = [f"the {colour} {shape}"] * 2
    if all(other.shape != thing.shape for other in others):
        choices.append(f"the {shape}")
    if all(other.colour != thing.colour for other in others):
        choices.append(f"the {colour} one" if others else f"the {colour} shape")
    return rng.choice(choices)


def refer_all(rng: random.Random, scene: Scene) -> str:
    """Words for a whole group."""
    shapes = plural(rng.choice(SHAPE_WORDS[scene.things[0].shape]))
    return rng.choice(("them", f"the {shapes}", f"all the {shapes}"))


Change = tuple[Scene, str, tuple[Thing, ...]]  # target, instruction, the objects concerned


def recolour(rng: random.Random, scene: Scene) -> Change | None:
    thing = rng.choice(scene.things)
    taken = {scene.background, *(other.colour for other in scene.things if not is_group(scene))}
    colour = rng.choice([name for name in COLOURS if name not in taken | {thing.colour}])
    word = rng.choice(COLOUR_WORDS[colour])
    chosen = scene.things if is_group(scene) else (thing,)
    whom = refer_all(rng, scene) if is_group(scene) else refer(rng, thing, scene)
    forms = (
        "make {} {}",
        "make {} {}",
        "turn {} {}",
        "paint {} {}",
        "change {} to {}",
        "change the colour of {} to {}",
        "recolour {} to {}",
    )
    return swap(scene, {old: replace(old, colour=colour) for old in chosen}, rng.choice(forms).format(whom, word))


def reshape(rng: random.Random, scene: Scene) -> Change | None:
    if is_group(scene):
        return None
    thing = rng.choice(scene.things)
    taken = {other.shape for other in scene.things}
    shape = rng.choice([name for name in SHAPES if name not in taken] or [""])
    if not shape:
        return None
    forms = ("turn {} into {}", "change {} into {}", "replace {} with {}", "make {} {}", "transform {} into {}")
    text = rng.choice(forms).format(refer(rng, thing, scene), article(rng.choice(SHAPE_WORDS[shape])))
    return swap(scene, {thing: replace(thing, shape=shape)}, text)


def swap(scene: Scene, new: dict[Thing, Thing], text: str) -> Change:
    things = tuple(new.get(thing, thing) for thing in scene.things)
    return replace(scene, things=things), text, (*new.keys(), *new.values())


def add(rng: random.Random, scene: Scene) -> Change | None:
    if len(scene.things) > 2:
        return None
    thing = random_thing(rng, scene.background, scene.is_video, large=0.25)
    if any(thing.shape == other.shape and thing.colour == other.colour for other in scene.things):
        return None
    placed = roomiest(thing, scene)
    if placed is None:
        return None
    text = f"{rng.choice(('add', 'add', 'put', 'draw'))} {article(noun(rng, thing, size=True))}"
    motion = rng.choice(MOTION_WORDS[thing.motion]) if scene.is_video else ""
    return replace(scene, things=(*scene.things, placed)), f"{text} {motion}".strip(), (placed,)


def roomiest(thing: Thing, scene: Scene) -> Thing | None:
    """The object where it is farthest from the others, halfway through a clip; None where there is no room."""
    candidates = [replace(thing, x=x, y=y) for x, y in places(thing.size, thing.motion, scene.frames)]
    fitting = [one for one in candidates if all(apart(one, other, scene.frames) for other in scene.things)]
    half = scene.frames // 2
    return max(
        fitting,
        key=lambda one: min(math.dist(one.centre(half), other.centre(half)) for other in scene.things),
        default=None,
    )


def remove(rng: random.Random, scene: Scene) -> Change | None:
    if len(scene.things) < 2 or is_group(scene):
        return None
    thing = rng.choice(scene.things)
    forms = ("remove {}", "remove {}", "delete {}", "take away {}", "erase {}", "get rid of {}")
    text = rng.choice(forms).format(refer(rng, thing, scene))
    rest = tuple(other for other in scene.things if other is not thing)
    return replace(scene, things=rest), text, (thing,)


def background(rng: random.Random, scene: Scene) -> Change | None:
    taken = {scene.background, *(thing.colour for thing in scene.things)}
    name = rng.choice([name for name in BACKGROUNDS if name not in taken])
    forms = (
        "change the background to {}",
        "make the background {}",
        "turn the background {}",
        "put it on a {} background",
        "use a {} background",
        "set the background to {}",
    )
    text = rng.choice(forms).format(rng.choice(BACKGROUND_WORDS[name]))
    return replace(scene, background=name), text, ()


def motion(rng: random.Random, scene: Scene) -> Change | None:
    if not scene.is_video or is_group(scene):
        return None
    thing = rng.choice(scene.things)
    name = rng.choice([name for name in MOTIONS if name != thing.motion])
    new = replace(thing, motion=name, size=size_for(name, thing.size))
    others = [other for other in scene.things if other is not thing]
    stays = (thing.x, thing.y) in places(new.size, name, FRAMES)
    if not stays or new.size != thing.size or not all(apart(new, other, FRAMES) for other in others):
        return None
    forms = ("make {} {}", "make {} {}", "let {} {}", "now {} should {}", "have {} {} instead")
    text = rng.choice(forms).format(refer(rng, thing, scene), rng.choice(MOTION_ORDERS[name]))
    return swap(scene, {thing: new}, text)


CHANGES: dict[str, Callable[[random.Random, Scene], Change | None]] = {
    "recolour": recolour,
    "reshape": reshape,
    "add": add,
    "remove": remove,
    "background": background,
    "motion": motion,
}


def random_edit(
    rng: random.Random,
    video: bool,
    split: Split = "train",
    kinds: Sequence[str] | None = None,
    composed: float = 0.0,
) -> Edit:
    """An edit of the split; a share `composed` of the sources is composed.

    Held out means a held-out object in the target, or in the source where none is new.
    """
    kinds = kinds or (VIDEO_EDITS if video else IMAGE_EDITS)
    kind = rng.choice(kinds)
    while True:
        source = random_scene(rng, video, split if kind in ("remove", "background") else "train", composed)
        change = CHANGES[kind](rng, source)
        if change and (kind == "remove" or scene_fits(change[0], split)):
            return Edit(kind, source, *change)

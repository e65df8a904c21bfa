"""The prompts of an evaluation: held-out combinations in GenEval's six categories, and motion for clips."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from omnivideo.training.facts import Demand, Wanted
from omnivideo.training.language import (
    BACKDROPS,
    BACKGROUND_WORDS,
    MOTION_WORDS,
    NUMBERS,
    RELATION_WORDS,
    article,
    noun,
    relation,
)
from omnivideo.training.world import BACKGROUNDS, FRAMES, Scene, Thing, place_all, random_thing, scene_fits

IMAGE_CATEGORIES = ("single", "two", "counting", "colours", "position", "colour attribution")
CATEGORIES = (*IMAGE_CATEGORIES, "motion")


@dataclass(frozen=True)
class Prompt:
    """One prompt of a category, with what must be seen for it to count as met."""

    category: str
    text: str
    demand: Demand
    video: bool = False


def things_for(rng: random.Random, category: str, background: str) -> list[Thing]:
    """Objects of a category: one, a group, or two that differ in shape and in colour."""
    video = category == "motion"
    if category in ("single", "colours", "motion"):
        return [random_thing(rng, background, video)]
    if category == "counting":
        return [random_thing(rng, background, video, large=0.0)] * rng.randint(1, 4)
    one = random_thing(rng, background, video, large=0.3)
    while True:
        two = random_thing(rng, background, video, large=0.3)
        if two.shape != one.shape and two.colour != one.colour:
            return [one, two]


def held_out_scene(rng: random.Random, category: str) -> Scene:
    """A scene of the category with at least one held-out object."""
    while True:
        background = rng.choice(list(BACKGROUNDS))
        frames = FRAMES if category == "motion" else 1
        placed = place_all(rng, things_for(rng, category, background), frames)
        if placed is None:
            continue
        scene = Scene(background, placed, frames)
        if scene_fits(scene, "held_out") and (category != "position" or relation(*placed)):
            return scene


def said(rng: random.Random, thing: Thing, many: bool = False) -> str:
    return noun(rng, thing, size=thing.motion not in ("growing", "shrinking"), many=many)


def worded(rng: random.Random, category: str, scene: Scene) -> str:
    """The objects in words: size, colour and shape always, so that the combination is the held-out one."""
    first = scene.things[0]
    if category == "counting":
        count = len(scene.things)
        return article(said(rng, first)) if count == 1 else f"{NUMBERS[count]} {said(rng, first, many=True)}"
    if category == "motion":
        return f"{article(said(rng, first))} {rng.choice(MOTION_WORDS[first.motion])}".strip()
    if len(scene.things) == 1:
        return article(said(rng, first))
    joint = "and"
    if category == "position":
        known = relation(*scene.things)
        assert known is not None
        joint = rng.choice(RELATION_WORDS[known])
    return f"{article(said(rng, first))} {joint} {article(said(rng, scene.things[1]))}"


CHECKS: dict[str, Callable[[Thing], Wanted]] = {
    "single": lambda thing: Wanted(thing.shape),
    "two": lambda thing: Wanted(thing.shape),
    "counting": lambda thing: Wanted(thing.shape),
    "colours": lambda thing: Wanted(None, thing.colour),
    "position": lambda thing: Wanted(thing.shape),
    "colour attribution": lambda thing: Wanted(thing.shape, thing.colour),
    "motion": lambda thing: Wanted(None, thing.colour, None, thing.motion),
}


def prompt(rng: random.Random, category: str) -> Prompt:
    scene = held_out_scene(rng, category)
    text = worded(rng, category, scene)
    if rng.random() < 0.5:
        text += " " + rng.choice(BACKDROPS).format(rng.choice(BACKGROUND_WORDS[scene.background]))
    demand = Demand(tuple(CHECKS[category](thing) for thing in scene.things))
    if category == "position":
        demand = replace(demand, relation=relation(*scene.things))
    return Prompt(category, text, demand, video=scene.is_video)


def prompts(count: int, categories: Sequence[str] = CATEGORIES) -> list[Prompt]:
    """`count` prompts of each category, the same every time."""
    made = []
    for category in categories:
        rng = random.Random(f"evaluation/{category}")
        made += [prompt(rng, category) for _ in range(count)]
    return made

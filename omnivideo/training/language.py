"""Captions of scenes, in varied wording.

A caption states facts that hold; which ones it states varies, and so do the words.  `plain` gives the one
canonical wording, which think mode learns to rewrite to.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from omnivideo.training.facts import Demand, Wanted
from omnivideo.training.world import FRAME, Scene, Thing, usual

SHAPE_WORDS = {
    "circle": ("circle", "circle", "ball", "disc", "dot", "round shape"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle", "triangle", "three-sided shape"),
    "star": ("star", "star", "five-pointed star"),
}
COLOUR_WORDS = {
    "red": ("red", "red", "crimson", "scarlet"),
    "green": ("green", "green", "emerald"),
    "blue": ("blue", "blue", "azure"),
    "yellow": ("yellow", "yellow", "golden"),
    "orange": ("orange", "orange", "tangerine"),
    "purple": ("purple", "purple", "violet"),
    "cyan": ("cyan", "cyan", "turquoise"),
    "white": ("white", "white", "snow-white"),
}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
BACKGROUND_WORDS = {
    "black": ("black",),
    "grey": ("grey", "gray"),
    "white": ("white",),
    "pink": ("pink",),
    "brown": ("brown",),
}
MOTION_WORDS = {
    "still": ("", "", "staying still", "standing still", "that does not move"),
    "left": ("moving left", "moving to the left", "sliding left", "drifting to the left", "going left"),
    "right": ("moving right", "moving to the right", "sliding right", "drifting to the right", "going right"),
    "up": ("moving up", "rising", "moving upwards", "floating up", "going up"),
    "down": ("moving down", "falling", "moving downwards", "dropping", "going down"),
    "growing": ("growing", "getting bigger", "expanding", "becoming larger"),
    "shrinking": ("shrinking", "getting smaller", "contracting", "becoming smaller"),
}
BACKDROPS = ("on a {} background", "on a {} background", "against {}", "on {}", "in front of a {} backdrop")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
STILL_PREFIX = ("a picture of ", "an image of ", "a photo of ", "a still of ")
CLIP_PREFIX = ("a video of ", "a clip of ", "an animation of ", "footage of ")
PLACES: dict[tuple[str, ...], str] = {
    (): "in the middle",
    ("left",): "on the left",
    ("right",): "on the right",
    ("top",): "at the top",
    ("bottom",): "at the bottom",
    **{(along, across): f"in the {along} {across}" for along in ("top", "bottom") for across in ("left", "right")},
}
RELATIONS = ("left of", "right of", "above", "below")
RELATION_WORDS = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
}


def plural(noun: str) -> str:
    return {"box": "boxes"}.get(noun, noun + "s")


def article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def regions(thing: Thing) -> tuple[str, ...]:
    """The sides of the frame on which the object's centre lies (at frame 0): none, one or two."""
    middle, margin = FRAME // 2, 4
    across = "left" if thing.x < middle - margin else "right" if thing.x > middle + margin else ""
    along = "top" if thing.y < middle - margin else "bottom" if thing.y > middle + margin else ""
    return tuple(name for name in (along, across) if name)


def relation(one: Thing, two: Thing) -> str | None:
    """How the first stands to the second at frame 0: the larger of the two distances decides; None on a diagonal."""
    dx, dy = one.x - two.x, one.y - two.y
    if abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


@dataclass(frozen=True)
class Caption:
    """A text and exactly what it asks for, objects in the order of their mention.

    `spans` says where each object is named, from character to character; a group's objects share one.
    """

    text: str
    demand: Demand
    spans: tuple[tuple[int, int], ...]


def noun(rng: random.Random, thing: Thing, *, size: bool, many: bool = False) -> str:
    """ "small red circle", in some wording; without an article."""
    words = [rng.choice(SIZE_WORDS[thing.size])] if size else []
    shape = rng.choice(SHAPE_WORDS[thing.shape])
    words += [rng.choice(COLOUR_WORDS[thing.colour]), plural(shape) if many else shape]
    return " ".join(words)


def says_size(rng: random.Random, thing: Thing) -> bool:
    """Sizes are named mostly, and never for what grows or shrinks."""
    return thing.motion not in ("growing", "shrinking") and rng.random() < 0.7


def wanted(thing: Thing, *, size: bool, video: bool) -> Wanted:
    return Wanted(thing.shape, thing.colour, thing.size if size else None, thing.motion if video else None)


def phrase(rng: random.Random, thing: Thing, video: bool) -> tuple[str, Wanted]:
    """One object with its article, sometimes its size, and its motion in a clip."""
    size = says_size(rng, thing)
    text = article(noun(rng, thing, size=size))
    motion = rng.choice(MOTION_WORDS[thing.motion]) if video else ""
    return f"{text} {motion}".strip(), wanted(thing, size=size, video=video)


def join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def is_group(scene: Scene) -> bool:
    """Whether the scene is several objects that differ in place only."""
    first = scene.things[0]
    return len(scene.things) > 1 and all(
        (t.shape, t.colour, t.size, t.motion) == (first.shape, first.colour, first.size, first.motion)
        for t in scene.things
    )


def place(rng: random.Random, where: tuple[str, ...]) -> str:
    """A place in the frame, as words; no side is the middle."""
    if len(where) == 2:
        return rng.choice(("in the {0} {1}", "in the {0} {1} corner")).format(*where)
    return PLACES[where]


def group(rng: random.Random, scene: Scene) -> Caption:
    first, size = scene.things[0], says_size(rng, scene.things[0])
    number = NUMBERS[len(scene.things)] if rng.random() < 0.85 else str(len(scene.things))
    motion = rng.choice(MOTION_WORDS[first.motion]) if scene.is_video else ""
    text = f"{number} {noun(rng, first, size=size, many=True)} {motion}".strip()
    count = len(scene.things)
    return Caption(text, Demand((wanted(first, size=size, video=scene.is_video),) * count), ((0, len(text)),) * count)


def spans_of(parts: Sequence[str], text: str) -> tuple[tuple[int, int], ...]:
    """Where each of the parts stands in a text that holds them in order."""
    spans, at = [], 0
    for part in parts:
        at = text.index(part, at)
        spans.append((at, at + len(part)))
        at += len(part)
    return tuple(spans)


def content(rng: random.Random, scene: Scene, composed: bool) -> Caption:
    """The objects of a scene, with a relation or a place now and then, without the background.

    Of a composed scene the objects are named in their order, and where they are is said if it is not as usual.
    """
    if is_group(scene):
        return group(rng, scene)
    as_usual = composed and usual(scene.things, scene.frames) == scene.things
    relates, locates = (0.4, 0.0) if as_usual else (1.0, 1.0) if composed else (0.6, 0.3)
    tells = rng.random()
    shuffled = not composed or (tells < relates and rng.random() < 0.5)
    things = rng.sample(scene.things, len(scene.things)) if shuffled else list(scene.things)
    pairs = [phrase(rng, thing, scene.is_video) for thing in things]
    parts, wants = [text for text, _ in pairs], tuple(want for _, want in pairs)
    if len(things) == 2 and things[0].motion == things[1].motion and tells < relates:
        known = relation(things[0], things[1])
        if known:
            text = f"{parts[0]} {rng.choice(RELATION_WORDS[known])} {parts[1]}"
            return Caption(text, Demand(wants, relation=known), spans_of(parts, text))
    if len(things) == 1 and things[0].motion == "still" and tells < locates:
        where = regions(things[0])
        return Caption(f"{parts[0]} {place(rng, where)}", Demand(wants, region=where), ((0, len(parts[0])),))
    return Caption(join(parts), Demand(wants), spans_of(parts, join(parts)))


def caption(rng: random.Random, scene: Scene, composed: bool = False) -> Caption:
    """A caption that states the objects and, mostly, the background; `composed` as for `content`."""
    inner = content(rng, scene, composed)
    text, demand, prefix = inner.text, inner.demand, ""
    if rng.random() < 0.65:
        text += " " + rng.choice(BACKDROPS).format(rng.choice(BACKGROUND_WORDS[scene.background]))
        demand = replace(demand, background=scene.background)
    if rng.random() < 0.25:
        prefix = rng.choice(CLIP_PREFIX if scene.is_video else STILL_PREFIX)
    spans = tuple((start + len(prefix), end + len(prefix)) for start, end in inner.spans)
    return Caption(prefix + text, demand, spans)


# ---------------------------------------------------------------- the canonical wording


def reading_order(scene: Scene) -> list[Thing]:
    """Objects from left to right, then from top to bottom, by their place at frame 0."""
    return sorted(scene.things, key=lambda thing: (thing.x, thing.y))


PLAIN_MOTION = {name: words[0] or "staying still" for name, words in MOTION_WORDS.items()}


def plain_thing(want: Wanted, count: int = 1) -> str:
    """ "a small red circle moving right" or "three small red circles moving right"."""
    assert want.shape is not None
    words = [want.size or "", want.colour or "", plural(want.shape) if count > 1 else want.shape]
    text = " ".join(word for word in words if word)
    text = f"{NUMBERS[count]} {text}" if count > 1 else article(text)
    return f"{text} {PLAIN_MOTION[want.motion]}" if want.motion else text


def plain(demand: Demand) -> str:
    """The one canonical wording of what is asked for."""
    first = demand.things[0]
    if len(demand.things) > 1 and all(want == first for want in demand.things):
        text = plain_thing(first, len(demand.things))
    elif demand.relation:
        text = f"{plain_thing(first)} {RELATION_WORDS[demand.relation][0]} {plain_thing(demand.things[1])}"
    else:
        text = join([plain_thing(want) for want in demand.things])
    if demand.region:
        text += f" {PLACES[demand.region]}"
    return f"{text} on a {demand.background} background" if demand.background else text


def description(scene: Scene) -> str:
    """A full plain caption of a scene, objects in reading order."""
    wants = tuple(
        wanted(thing, size=thing.motion not in ("growing", "shrinking"), video=scene.is_video)
        for thing in reading_order(scene)
    )
    return plain(Demand(wants, background=scene.background))

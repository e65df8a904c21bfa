"""Questions about scenes with their right answers: the understanding tasks."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from omnivideo.training.facts import Reading, Seen
from omnivideo.training.language import (
    COLOUR_WORDS,
    NUMBERS,
    PLACES,
    RELATION_WORDS,
    RELATIONS,
    SHAPE_WORDS,
    SIZE_WORDS,
    article,
    caption,
    description,
    plain,
    plural,
    reading_order,
    regions,
    relation,
)
from omnivideo.training.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Scene, Thing

MOTION_ANSWERS = {
    "still": "it stays still", "left": "it moves left", "right": "it moves right", "up": "it moves up",
    "down": "it moves down", "growing": "it grows", "shrinking": "it shrinks",
}  # fmt: skip
MOTION_VERBS = {
    "still": "stay still", "left": "move left", "right": "move right", "up": "move up", "down": "move down",
    "growing": "grow", "shrinking": "shrink",
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def by_shape(scene: Scene) -> list[Thing]:
    """Objects whose shape no other has."""
    return [one for one in scene.things if sum(one.shape == other.shape for other in scene.things) == 1]


def by_colour(scene: Scene) -> list[Thing]:
    return [one for one in scene.things if sum(one.colour == other.colour for other in scene.things) == 1]


def named(rng: random.Random, shape: str, colour: str | None = None) -> str:
    words = [rng.choice(COLOUR_WORDS[colour])] if colour else []
    return " ".join([*words, rng.choice(SHAPE_WORDS[shape])])


def which(rng: random.Random, scene: Scene) -> tuple[Thing, str] | None:
    """An object and words that mean it alone."""
    unique = [
        thing
        for thing in scene.things
        if sum((t.shape, t.colour) == (thing.shape, thing.colour) for t in scene.things) == 1
    ]
    if not unique:
        return None
    thing = rng.choice(unique)
    words = [f"the {named(rng, thing.shape, thing.colour)}"]
    if thing in by_shape(scene):
        words.append(f"the {named(rng, thing.shape)}")
    if thing in by_colour(scene):
        words.append(f"the {rng.choice(COLOUR_WORDS[thing.colour])} {rng.choice(('object', 'shape', 'thing'))}")
    if len(scene.things) == 1:
        words.append(rng.choice(("the object", "the shape")))
    return thing, rng.choice(words)


def ask_colour(rng: random.Random, scene: Scene) -> Question | None:
    group = len({(thing.shape, thing.colour) for thing in scene.things}) == 1 and len(scene.things) > 1
    if group:
        thing = scene.things[0]
        shapes = plural(rng.choice(SHAPE_WORDS[thing.shape]))
        return Question(
            "colour",
            rng.choice(("what colour are the {}?", "which colour do the {} have?")).format(shapes),
            thing.colour,
        )
    if not (alone := by_shape(scene)):
        return None
    thing = rng.choice(alone)
    forms = (
        "what colour is the {}?",
        "which colour is the {}?",
        "what is the colour of the {}?",
        "tell me the colour of the {}",
    )
    return Question("colour", rng.choice(forms).format(named(rng, thing.shape)), thing.colour)


def ask_shape(rng: random.Random, scene: Scene) -> Question | None:
    if not (alone := by_colour(scene)):
        return None
    thing = rng.choice(alone)
    forms = (
        "what shape is the {} object?",
        "which shape is the {} one?",
        "what is the {} thing?",
        "what shape is the {} one?",
    )
    return Question("shape", rng.choice(forms).format(rng.choice(COLOUR_WORDS[thing.colour])), article(thing.shape))


def ask_count(rng: random.Random, scene: Scene) -> Question:
    thing = rng.choice(scene.things)
    kind = rng.random()
    if kind < 0.4:
        noun, count = rng.choice(("objects", "shapes", "things")), len(scene.things)
    elif kind < 0.8:
        shape = thing.shape if rng.random() < 0.8 else rng.choice(SHAPES)
        noun = plural(rng.choice(SHAPE_WORDS[shape]))
        count = sum(other.shape == shape for other in scene.things)
    else:
        colour = thing.colour if rng.random() < 0.8 else rng.choice(list(COLOURS))
        noun = f"{rng.choice(COLOUR_WORDS[colour])} {rng.choice(('objects', 'shapes'))}"
        count = sum(other.colour == colour for other in scene.things)
    forms = ("how many {} are there?", "how many {} do you see?", "count the {}", "what is the number of {}?")
    return Question("count", rng.choice(forms).format(noun), NUMBERS[count])


def ask_position(rng: random.Random, scene: Scene) -> Question | None:
    found = which(rng, scene)
    if found is None or found[0].motion in ("left", "right", "up", "down"):
        return None
    thing, words = found
    forms = ("where is {}?", "in which part of the picture is {}?", "where can you see {}?")
    return Question("position", rng.choice(forms).format(words), PLACES[regions(thing)])


def ask_relation(rng: random.Random, scene: Scene) -> Question | None:
    kinds = {(thing.shape, thing.colour) for thing in scene.things}
    if len(scene.things) < 2 or len(kinds) < len(scene.things):
        return None
    one, two = rng.sample(scene.things, 2)
    known = relation(one, two)
    if known is None or one.motion != two.motion:
        return None
    first, second = named(rng, one.shape, one.colour), named(rng, two.shape, two.colour)
    if rng.random() < 0.4:
        return Question("relation", f"where is the {first} from the {second}?", f"{known} it")
    claim = known if rng.random() < 0.5 else rng.choice([name for name in RELATIONS if name != known])
    text = f"is the {first} {rng.choice(RELATION_WORDS[claim])} the {second}?"
    return Question("relation", text, "yes" if claim == known else "no")


def ask_motion(rng: random.Random, scene: Scene) -> Question | None:
    found = which(rng, scene)
    if not scene.is_video or found is None:
        return None
    thing, words = found
    if rng.random() < 0.3:
        claim = thing.motion if rng.random() < 0.5 else rng.choice([m for m in MOTIONS if m != thing.motion])
        text = f"does {words} {MOTION_VERBS[claim]}?"
        return Question("motion", text, "yes" if claim == thing.motion else "no")
    forms = (
        "how does {} move?",
        "what does {} do?",
        "what happens to {}?",
        "which way does {} move?",
        "what is the motion of {}?",
    )
    return Question("motion", rng.choice(forms).format(words), MOTION_ANSWERS[thing.motion])


def ask_background(rng: random.Random, scene: Scene) -> Question:
    if rng.random() < 0.25:
        claim = (
            scene.background if rng.random() < 0.5 else rng.choice([b for b in BACKGROUNDS if b != scene.background])
        )
        return Question("background", f"is the background {claim}?", "yes" if claim == scene.background else "no")
    forms = ("what colour is the background?", "which colour is the background?", "what is the background colour?")
    return Question("background", rng.choice(forms), scene.background)


def ask_size(rng: random.Random, scene: Scene) -> Question | None:
    found = which(rng, scene)
    if found is None or found[0].motion in ("growing", "shrinking"):
        return None
    thing, words = found
    small, large = rng.choice(SIZE_WORDS["small"]), rng.choice(SIZE_WORDS["large"])
    return Question("size", f"is {words} {small} or {large}?", thing.size)


def ask_presence(rng: random.Random, scene: Scene) -> Question:
    """Yes or no, evenly; the false ones are near misses as often as not."""
    thing = rng.choice(scene.things)
    shape, colour = thing.shape, thing.colour
    if rng.random() < 0.5:
        present = {(other.shape, other.colour) for other in scene.things}
        while (shape, colour) in present:
            change = rng.random()
            shape = rng.choice(SHAPES) if change < 0.6 else shape
            colour = rng.choice(list(COLOURS)) if change > 0.4 else colour
    forms = ("is there {}?", "do you see {}?", "can you see {}?")
    text = rng.choice(forms).format(article(named(rng, shape, colour)))
    there = any((shape, colour) == (other.shape, other.colour) for other in scene.things)
    return Question("presence", text, "yes" if there else "no")


def near_miss(rng: random.Random, scene: Scene) -> Scene:
    """The scene with one thing wrong, as a decoder gets it wrong: an attribute, two colours swapped, the number."""
    things = list(scene.things)
    at = rng.randrange(len(things))
    thing = things[at]
    kind = rng.choice(("colour", "shape", "motion" if scene.is_video else "size", "swap", "more", "fewer"))
    if kind == "fewer" and len(things) > 1:
        del things[at]
    elif kind == "more":
        things.insert(at, thing)
    elif kind == "swap" and len(things) > 1:
        other = rng.choice([index for index in range(len(things)) if index != at])
        things[at], things[other] = (
            replace(thing, colour=things[other].colour),
            replace(things[other], colour=thing.colour),
        )
    else:
        things[at] = {
            "shape": replace(thing, shape=rng.choice(SHAPES)),
            "motion": replace(thing, motion=rng.choice(MOTIONS)),
            "size": replace(thing, size=rng.choice(SIZES)),
        }.get(kind) or replace(thing, colour=rng.choice(list(COLOURS)))
    return replace(scene, things=tuple(things))


def truth(scene: Scene) -> Reading:
    """What a flawless scorer reads from the scene's pixels."""
    things = (Seen(t.shape, t.colour, t.size, t.motion, t.x, t.y) for t in scene.things)
    return Reading(scene.background, tuple(things), 1.0)


def ask_match(rng: random.Random, scene: Scene) -> Question:
    """Whether a caption holds (what the planner's check asks of a generated clip); half of them are near misses."""
    said = caption(rng, scene if rng.random() < 0.5 else near_miss(rng, scene))
    text = said.text if rng.random() < 0.5 else plain(said.demand)
    forms = ("does this show {}?", "does this show {}?", "is this {}?")
    return Question("match", rng.choice(forms).format(text), "yes" if said.demand.met_by(truth(scene)) else "no")


def ask_caption(rng: random.Random, scene: Scene) -> Question:
    kind = "video" if scene.is_video else "picture"
    forms = (
        "describe the {}",
        "what do you see?",
        "what is in this {}?",
        "caption this {}",
        "describe what you see",
        "what does the {} show?",
    )
    return Question("caption", rng.choice(forms).format(kind), description(scene))


ASKS: dict[str, Callable[[random.Random, Scene], Question | None]] = {
    "colour": ask_colour, "shape": ask_shape, "count": ask_count, "position": ask_position,
    "relation": ask_relation, "motion": ask_motion, "background": ask_background, "size": ask_size,
    "presence": ask_presence, "caption": ask_caption, "match": ask_match,
}  # fmt: skip


# How often each kind is asked in training: what hangs on where things are, and on telling true from nearly true, is
# learned last and by few of the tokens.
TRAINED = {name: {"match": 4, "position": 4, "relation": 6, "motion": 3, "count": 2}.get(name, 1) for name in ASKS}


def ask_layout(rng: random.Random, scene: Scene) -> Question:
    """Where everything is, for training: many answers to "where" in one."""
    forms = ("where is everything?", "where are the objects?", "what is where?")
    told = [f"{named_plainly(thing)} {PLACES[regions(thing)]}" for thing in reading_order(scene)]
    return Question("layout", rng.choice(forms), ", ".join(told))


def named_plainly(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def random_question(rng: random.Random, scene: Scene, weights: Mapping[str, int] | None = None) -> Question:
    """A question that the scene can answer; the kinds by weight, or evenly with the hardest one twice as often."""
    while True:
        asked = rng.choice([*ASKS, "match"]) if weights is None else rng.choices([*weights], [*weights.values()])[0]
        question = ASKS[asked](rng, scene)
        if question is not None:
            return question

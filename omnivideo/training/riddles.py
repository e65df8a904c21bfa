"""The reasoning split for think mode: prompts that name things indirectly, with the reasoning and the plain rewrite.

"a shape with no corners the colour of grass" -> "a green circle".  A third of each list of hints is kept for
evaluation only.
"""

import random
from dataclasses import dataclass

from omnivideo.training.facts import Demand, Wanted
from omnivideo.training.language import NUMBERS, article, noun, plain
from omnivideo.training.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Split, Thing, held_out, size_for

SHAPE_HINTS = {
    "circle": ("a shape with no corners", "a shape like a coin", "a shape like a full moon", "a shape like a wheel",
               "a shape without any sides", "a shape like a plate"),
    "square": ("a shape with four equal sides", "a shape like a chessboard field", "a shape with four corners",
               "a shape like a dice", "a shape with four right angles", "a shape like a tile"),
    "triangle": ("a shape with three corners", "a shape like a slice of pizza", "a shape with three sides",
                 "a shape like a pyramid", "a shape with the fewest corners", "a shape like a tent"),
    "star": ("a shape with five points", "a shape like on a sheriff's badge", "a shape that shines in the night sky",
             "a shape on top of a christmas tree", "a shape with ten edges", "a shape you wish upon"),
}  # fmt: skip
COLOUR_HINTS = {
    "red": ("blood", "a ripe tomato", "a fire engine", "a strawberry", "a rose", "a stop sign"),
    "green": ("grass", "spring leaves", "a frog", "a cucumber", "an emerald", "a pine tree"),
    "blue": ("the deep sea", "a clear sky", "sapphires", "jeans", "a blueberry", "the ocean"),
    "yellow": ("a lemon", "the sun", "a banana", "butter", "a canary", "a sunflower"),
    "orange": ("a carrot", "a pumpkin", "a tangerine", "a basketball", "a mandarin", "a traffic cone"),
    "purple": ("a plum", "grapes", "lavender", "an aubergine", "violets", "an eggplant"),
    "cyan": ("a swimming pool", "a tropical lagoon", "turquoise stone", "printer ink that is not magenta or yellow",
             "a shallow coral sea", "an ice glacier"),
    "white": ("snow", "milk", "a sheet of paper", "salt", "a swan", "a cloud"),
}  # fmt: skip
BACKGROUND_HINTS = {
    "black": ("as dark as night", "the colour of coal", "the colour of a raven"),
    "grey": ("the colour of concrete", "the colour of ash", "the colour of an elephant"),
    "white": ("as white as snow", "the colour of milk", "the colour of paper"),
    "pink": ("the colour of a flamingo", "the colour of bubblegum", "the colour of a piglet"),
    "brown": ("the colour of chocolate", "the colour of wood", "the colour of coffee"),
}
MOTION_HINTS = {
    "still": ("it sleeps like a stone", "it does not go anywhere", "it is frozen in place"),
    "left": ("it goes to where west is on a map", "it goes opposite to right", "it goes against the reading direction"),
    "right": ("it goes to where east is on a map", "it goes opposite to left", "it goes in the reading direction"),
    "up": ("it rises like a balloon", "it takes off like a rocket", "it goes towards the sky"),
    "down": ("it sinks like a stone", "it comes down like rain", "it goes the way an apple falls"),
    "growing": ("it swells like rising dough", "it inflates like a tyre", "it comes closer and closer"),
    "shrinking": ("it melts like an ice cube", "it deflates", "it goes farther and farther away"),
}
COUNT_HINTS = {
    2: ("a pair of {}", "one more than one {one}", "half of four {}", "as many {} as you have eyes"),
    3: ("one more than two {}", "one less than four {}", "as many {} as a triangle has corners", "half of six {}"),
    4: ("twice two {}", "one more than three {}", "as many {} as a square has corners", "two pairs of {}"),
}


@dataclass(frozen=True)
class Riddle:
    """An indirect prompt, the reasoning that solves it, its plain rewrite, and what is to be seen."""

    prompt: str
    reasoning: str
    rewrite: str
    demand: Demand


def hint(rng: random.Random, hints: tuple[str, ...], split: Split) -> str:
    """The last third of each list is held out."""
    kept = len(hints) // 3
    return rng.choice(hints[len(hints) - kept :] if split == "held_out" else hints[: len(hints) - kept])


def random_wanted(rng: random.Random, background: str, video: bool) -> Wanted:
    while True:
        colour = rng.choice([name for name in COLOURS if name != background])
        motion = rng.choice(MOTIONS) if video else "still"
        thing = Thing(rng.choice(SHAPES), colour, size_for(motion, rng.choice(SIZES)), motion, 0, 0)
        if not held_out(thing):
            named = thing.size if motion not in ("growing", "shrinking") and rng.random() < 0.6 else None
            return Wanted(thing.shape, colour, named, motion if video else None)


def spoken(rng: random.Random, want: Wanted, many: bool = False) -> str:
    """The object in plain, varied words."""
    assert want.shape and want.colour
    thing = Thing(want.shape, want.colour, want.size or "small", want.motion or "still", 0, 0)
    return noun(rng, thing, size=want.size is not None, many=many)


def riddle_one(rng: random.Random, want: Wanted, split: Split) -> tuple[str, list[str]]:
    """One object by hints of its shape, its colour or its motion, with the steps that solve them."""
    assert want.shape and want.colour
    which = rng.sample(("shape", "colour", "motion"), rng.randint(1, 2)) if want.motion else ["shape", "colour"]
    which = which if want.motion else rng.sample(which, rng.randint(1, 2))
    steps = []
    size = f"{want.size} " if want.size else ""
    if "shape" in which:
        shape = hint(rng, SHAPE_HINTS[want.shape], split)
        steps.append(f"{shape} is {article(want.shape)}")
        text = shape.replace("a shape", article(f"{size}shape"), 1)
    else:
        text = article(f"{size}{want.shape}")
    if "colour" in which:
        thing = hint(rng, COLOUR_HINTS[want.colour], split)
        steps.append(f"{thing} is {want.colour}")
        text += f", the colour of {thing}"
    else:
        text += f", {want.colour}" if "shape" in which else ""
        text = text if "shape" in which else article(f"{size}{want.colour} {want.shape}")
    if want.motion and "motion" in which:
        move = hint(rng, MOTION_HINTS[want.motion], split)
        steps.append(
            f"{move}, so it is {'moving ' if want.motion in ('left', 'right', 'up', 'down') else ''}{want.motion}"
        )
        text += f", {move}"
    elif want.motion:
        text += f", {'moving ' if want.motion in ('left', 'right', 'up', 'down') else ''}{want.motion}"
    return text, steps


def random_riddle(rng: random.Random, video: bool, split: Split = "train") -> Riddle:
    """A riddle about one object, or about a number of equal ones."""
    background = rng.choice(list(BACKGROUNDS))
    want = random_wanted(rng, background, video)
    count = 1
    if rng.random() < 0.35:
        count = rng.choice((2, 3, 4)[: 2 if video else 3])
        pattern = hint(rng, COUNT_HINTS[count], split)
        text = pattern.format(spoken(rng, want, many=True), one=spoken(rng, want))
        steps = [f"{pattern.format('shapes', one='shape')} makes {NUMBERS[count]}"]
        text += f", {'moving ' if want.motion in ('left', 'right', 'up', 'down') else ''}{want.motion}" if video else ""
    else:
        text, steps = riddle_one(rng, want, split)
    named = rng.random() < 0.4
    if named:
        where = hint(rng, BACKGROUND_HINTS[background], split)
        text += f", on a background {where}"
        steps.append(f"a background {where} is {background}")
    demand = Demand((want,) * count, background=background if named else None)
    return Riddle(text, "; ".join(steps), plain(demand), demand)

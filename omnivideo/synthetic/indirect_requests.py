"""Indirect prompts for think mode, with the reasoning that solves them and the plain rewrite.

"a shape with no corners, the colour of grass" -> "a green circle". A third of each list of hints is held out for
evaluation.
"""

import random
from dataclasses import dataclass

from omnivideo.synthetic.captions import NUMBER_WORDS, add_article, sample_noun_phrase, to_canonical_text
from omnivideo.synthetic.facts import ObjectSpec, SceneSpec
from omnivideo.synthetic.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    SceneObject,
    Split,
    get_initial_size,
    is_held_out,
)

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
class IndirectRequest:
    """An indirect prompt, the reasoning that solves it, its plain rewrite, and the content that it requests."""

    prompt: str
    reasoning: str
    rewrite: str
    scene_spec: SceneSpec


def sample_hint(rng: random.Random, hints: tuple[str, ...], split: Split) -> str:
    """Return a hint of the split; the last third of each list is held out."""
    held_out_count = len(hints) // 3
    return rng.choice(
        hints[len(hints) - held_out_count :] if split == "held_out" else hints[: len(hints) - held_out_count]
    )


def sample_object_spec(rng: random.Random, background: str, is_video: bool) -> ObjectSpec:
    while True:
        colour = rng.choice([name for name in COLOURS if name != background])
        motion = rng.choice(MOTIONS) if is_video else "still"
        obj = SceneObject(rng.choice(SHAPES), colour, get_initial_size(motion, rng.choice(SIZES)), motion, 0, 0)
        if not is_held_out(obj):
            size = obj.size if motion not in ("growing", "shrinking") and rng.random() < 0.6 else None
            return ObjectSpec(obj.shape, colour, size, motion if is_video else None)


def sample_spec_phrase(rng: random.Random, object_spec: ObjectSpec, is_plural: bool = False) -> str:
    """Return a direct phrase for the object, in varied words."""
    assert object_spec.shape and object_spec.colour
    obj = SceneObject(
        object_spec.shape, object_spec.colour, object_spec.size or "small", object_spec.motion or "still", 0, 0
    )
    return sample_noun_phrase(rng, obj, with_size=object_spec.size is not None, is_plural=is_plural)


def compose_object_hints(rng: random.Random, object_spec: ObjectSpec, split: Split) -> tuple[str, list[str]]:
    """Return a phrase that hints at shape, colour or motion of an object, and the steps that solve the hints."""
    assert object_spec.shape and object_spec.colour
    hinted_fields = (
        rng.sample(("shape", "colour", "motion"), rng.randint(1, 2)) if object_spec.motion else ["shape", "colour"]
    )
    hinted_fields = hinted_fields if object_spec.motion else rng.sample(hinted_fields, rng.randint(1, 2))
    steps = []
    size = f"{object_spec.size} " if object_spec.size else ""
    if "shape" in hinted_fields:
        shape_hint = sample_hint(rng, SHAPE_HINTS[object_spec.shape], split)
        steps.append(f"{shape_hint} is {add_article(object_spec.shape)}")
        text = shape_hint.replace("a shape", add_article(f"{size}shape"), 1)
    else:
        text = add_article(f"{size}{object_spec.shape}")
    if "colour" in hinted_fields:
        colour_hint = sample_hint(rng, COLOUR_HINTS[object_spec.colour], split)
        steps.append(f"{colour_hint} is {object_spec.colour}")
        text += f", the colour of {colour_hint}"
    else:
        text += f", {object_spec.colour}" if "shape" in hinted_fields else ""
        text = text if "shape" in hinted_fields else add_article(f"{size}{object_spec.colour} {object_spec.shape}")
    if object_spec.motion and "motion" in hinted_fields:
        motion_hint = sample_hint(rng, MOTION_HINTS[object_spec.motion], split)
        verb = "moving " if object_spec.motion in ("left", "right", "up", "down") else ""
        steps.append(f"{motion_hint}, so it is {verb}{object_spec.motion}")
        text += f", {motion_hint}"
    elif object_spec.motion:
        text += f", {'moving ' if object_spec.motion in ('left', 'right', 'up', 'down') else ''}{object_spec.motion}"
    return text, steps


def sample_indirect_request(rng: random.Random, is_video: bool, split: Split = "train") -> IndirectRequest:
    """Return an indirect request for one object, or for several equal objects."""
    background = rng.choice(list(BACKGROUNDS))
    object_spec = sample_object_spec(rng, background, is_video)
    count = 1
    if rng.random() < 0.35:
        count = rng.choice((2, 3, 4)[: 2 if is_video else 3])
        pattern = sample_hint(rng, COUNT_HINTS[count], split)
        text = pattern.format(
            sample_spec_phrase(rng, object_spec, is_plural=True), one=sample_spec_phrase(rng, object_spec)
        )
        steps = [f"{pattern.format('shapes', one='shape')} makes {NUMBER_WORDS[count]}"]
        text += (
            f", {'moving ' if object_spec.motion in ('left', 'right', 'up', 'down') else ''}{object_spec.motion}"
            if is_video
            else ""
        )
    else:
        text, steps = compose_object_hints(rng, object_spec, split)
    has_background = rng.random() < 0.4
    if has_background:
        background_hint = sample_hint(rng, BACKGROUND_HINTS[background], split)
        text += f", on a background {background_hint}"
        steps.append(f"a background {background_hint} is {background}")
    scene_spec = SceneSpec((object_spec,) * count, background=background if has_background else None)
    return IndirectRequest(text, "; ".join(steps), to_canonical_text(scene_spec), scene_spec)

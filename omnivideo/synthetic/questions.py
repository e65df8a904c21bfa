"""Questions about scenes with their answers: the understanding tasks."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from omnivideo.synthetic.captions import (
    COLOUR_WORDS,
    NUMBER_WORDS,
    REGION_PHRASES,
    RELATION_WORDS,
    RELATIONS,
    SHAPE_WORDS,
    SIZE_WORDS,
    add_article,
    describe_scene,
    find_region,
    find_relation,
    pluralize,
    sample_caption,
    sort_in_reading_order,
    to_canonical_text,
)
from omnivideo.synthetic.facts import ObjectDetection, SceneDetection
from omnivideo.synthetic.scenes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    Scene,
    SceneObject,
)

MOTION_ANSWERS = {
    "still": "it stays still", "left": "it moves left", "right": "it moves right", "up": "it moves up",
    "down": "it moves down", "growing": "it grows", "shrinking": "it shrinks",
}  # fmt: skip
SPEED_ANSWERS = {"slow": "slowly", "normal": "at a normal speed", "fast": "quickly"}
SECOND_MOTION_ANSWERS = {"left": "left", "right": "right", "up": "up", "down": "down", "still": "stops"}
MOTION_VERBS = {
    "still": "stay still", "left": "move left", "right": "move right", "up": "move up", "down": "move down",
    "growing": "grow", "shrinking": "shrink",
}  # fmt: skip


@dataclass(frozen=True)
class SceneQuestion:
    kind: str
    text: str
    answer: str


def find_unique_shapes(scene: Scene) -> list[SceneObject]:
    """Return the objects whose shape is unique in the scene."""
    return [obj for obj in scene.objects if sum(obj.shape == other.shape for other in scene.objects) == 1]


def find_unique_colours(scene: Scene) -> list[SceneObject]:
    return [obj for obj in scene.objects if sum(obj.colour == other.colour for other in scene.objects) == 1]


def sample_object_name(rng: random.Random, shape: str, colour: str | None = None) -> str:
    words = [rng.choice(COLOUR_WORDS[colour])] if colour else []
    return " ".join([*words, rng.choice(SHAPE_WORDS[shape])])


def sample_reference(rng: random.Random, scene: Scene) -> tuple[SceneObject, str] | None:
    """Return an object and words that identify it, or None if no object is unique."""
    unique = [
        obj
        for obj in scene.objects
        if sum((other.shape, other.colour) == (obj.shape, obj.colour) for other in scene.objects) == 1
    ]
    if not unique:
        return None
    obj = rng.choice(unique)
    words = [f"the {sample_object_name(rng, obj.shape, obj.colour)}"]
    if obj in find_unique_shapes(scene):
        words.append(f"the {sample_object_name(rng, obj.shape)}")
    if obj in find_unique_colours(scene):
        words.append(f"the {rng.choice(COLOUR_WORDS[obj.colour])} {rng.choice(('object', 'shape', 'thing'))}")
    if len(scene.objects) == 1:
        words.append(rng.choice(("the object", "the shape")))
    return obj, rng.choice(words)


def ask_colour(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    is_single_group = len({(obj.shape, obj.colour) for obj in scene.objects}) == 1 and len(scene.objects) > 1
    if is_single_group:
        obj = scene.objects[0]
        shapes = pluralize(rng.choice(SHAPE_WORDS[obj.shape]))
        return SceneQuestion(
            "colour",
            rng.choice(("what colour are the {}?", "which colour do the {} have?")).format(shapes),
            obj.colour,
        )
    if not (candidates := find_unique_shapes(scene)):
        return None
    obj = rng.choice(candidates)
    forms = (
        "what colour is the {}?",
        "which colour is the {}?",
        "what is the colour of the {}?",
        "tell me the colour of the {}",
    )
    return SceneQuestion("colour", rng.choice(forms).format(sample_object_name(rng, obj.shape)), obj.colour)


def ask_shape(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    if not (candidates := find_unique_colours(scene)):
        return None
    obj = rng.choice(candidates)
    forms = (
        "what shape is the {} object?",
        "which shape is the {} one?",
        "what is the {} thing?",
        "what shape is the {} one?",
    )
    return SceneQuestion(
        "shape", rng.choice(forms).format(rng.choice(COLOUR_WORDS[obj.colour])), add_article(obj.shape)
    )


def ask_count(rng: random.Random, scene: Scene) -> SceneQuestion:
    obj = rng.choice(scene.objects)
    kind = rng.random()
    if kind < 0.4:
        noun, count = rng.choice(("objects", "shapes", "things")), len(scene.objects)
    elif kind < 0.8:
        shape = obj.shape if rng.random() < 0.8 else rng.choice(SHAPES)
        noun = pluralize(rng.choice(SHAPE_WORDS[shape]))
        count = sum(other.shape == shape for other in scene.objects)
    else:
        colour = obj.colour if rng.random() < 0.8 else rng.choice(list(COLOURS))
        noun = f"{rng.choice(COLOUR_WORDS[colour])} {rng.choice(('objects', 'shapes'))}"
        count = sum(other.colour == colour for other in scene.objects)
    forms = ("how many {} are there?", "how many {} do you see?", "count the {}", "what is the number of {}?")
    return SceneQuestion("count", rng.choice(forms).format(noun), NUMBER_WORDS[count])


def ask_position(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    reference = sample_reference(rng, scene)
    if reference is None or reference[0].changes_place:
        return None
    obj, words = reference
    forms = ("where is {}?", "in which part of the picture is {}?", "where can you see {}?")
    return SceneQuestion("position", rng.choice(forms).format(words), REGION_PHRASES[find_region(obj)])


def ask_relation(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    kinds = {(obj.shape, obj.colour) for obj in scene.objects}
    if len(scene.objects) < 2 or len(kinds) < len(scene.objects):
        return None
    first, second = rng.sample(scene.objects, 2)
    actual = find_relation(first, second)
    if actual is None or first.motion != second.motion:
        return None
    first_name, second_name = (
        sample_object_name(rng, first.shape, first.colour),
        sample_object_name(rng, second.shape, second.colour),
    )
    if rng.random() < 0.4:
        return SceneQuestion("relation", f"where is the {first_name} from the {second_name}?", f"{actual} it")
    claim = actual if rng.random() < 0.5 else rng.choice([name for name in RELATIONS if name != actual])
    text = f"is the {first_name} {rng.choice(RELATION_WORDS[claim])} the {second_name}?"
    return SceneQuestion("relation", text, "yes" if claim == actual else "no")


def describe_motion(obj: SceneObject) -> str:
    """Return e.g. "it moves slowly right" or "it moves right then up"."""
    text = MOTION_ANSWERS[obj.motion]
    if obj.motion in DIRECTIONS and obj.speed != "normal":
        text = text.replace("moves", f"moves {SPEED_ANSWERS[obj.speed]}")
    if obj.second_motion is None:
        return text
    second = SECOND_MOTION_ANSWERS[obj.second_motion]
    return f"{text} then {second}" if obj.motion in DIRECTIONS else f"{text} then moves {second}"


def ask_speed(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    reference = sample_reference(rng, scene)
    if not scene.is_video or reference is None or reference[0].motion not in DIRECTIONS:
        return None
    obj, words = reference
    forms = ("how fast does {} move?", "how fast is {}?", "what is the speed of {}?", "does {} move slowly or quickly?")
    return SceneQuestion("speed", rng.choice(forms).format(words), SPEED_ANSWERS[obj.speed])


def ask_motion(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    reference = sample_reference(rng, scene)
    if not scene.is_video or reference is None:
        return None
    obj, words = reference
    if rng.random() < 0.3:
        claim = obj.motion if rng.random() < 0.5 else rng.choice([m for m in MOTIONS if m != obj.motion])
        text = f"does {words} {MOTION_VERBS[claim]}?"
        return SceneQuestion("motion", text, "yes" if claim == obj.motion else "no")
    forms = (
        "how does {} move?",
        "what does {} do?",
        "what happens to {}?",
        "which way does {} move?",
        "what is the motion of {}?",
    )
    return SceneQuestion("motion", rng.choice(forms).format(words), describe_motion(obj))


def ask_background(rng: random.Random, scene: Scene) -> SceneQuestion:
    if rng.random() < 0.25:
        claim = (
            scene.background if rng.random() < 0.5 else rng.choice([b for b in BACKGROUNDS if b != scene.background])
        )
        return SceneQuestion("background", f"is the background {claim}?", "yes" if claim == scene.background else "no")
    forms = ("what colour is the background?", "which colour is the background?", "what is the background colour?")
    return SceneQuestion("background", rng.choice(forms), scene.background)


def ask_size(rng: random.Random, scene: Scene) -> SceneQuestion | None:
    reference = sample_reference(rng, scene)
    if reference is None or reference[0].motion in ("growing", "shrinking"):
        return None
    obj, words = reference
    small, large = rng.choice(SIZE_WORDS["small"]), rng.choice(SIZE_WORDS["large"])
    return SceneQuestion("size", f"is {words} {small} or {large}?", obj.size)


def ask_presence(rng: random.Random, scene: Scene) -> SceneQuestion:
    """Ask whether an object is present. Yes and no are equally likely; a wrong object may share an attribute."""
    obj = rng.choice(scene.objects)
    shape, colour = obj.shape, obj.colour
    if rng.random() < 0.5:
        present = {(other.shape, other.colour) for other in scene.objects}
        while (shape, colour) in present:
            chance = rng.random()
            shape = rng.choice(SHAPES) if chance < 0.6 else shape
            colour = rng.choice(list(COLOURS)) if chance > 0.4 else colour
    forms = ("is there {}?", "do you see {}?", "can you see {}?")
    text = rng.choice(forms).format(add_article(sample_object_name(rng, shape, colour)))
    is_present = any((shape, colour) == (other.shape, other.colour) for other in scene.objects)
    return SceneQuestion("presence", text, "yes" if is_present else "no")


def corrupt_scene(rng: random.Random, scene: Scene) -> Scene:
    """Return the scene with a typical decoder error: a wrong attribute, two swapped colours, or a wrong number."""
    objects = list(scene.objects)
    position = rng.randrange(len(objects))
    obj = objects[position]
    kinds = ("colour", "shape", "motion" if scene.is_video else "size", "swap", "more", "fewer")
    kind = rng.choice((*kinds, "speed") if obj.motion in DIRECTIONS and obj.second_motion is None else kinds)
    if kind == "fewer" and len(objects) > 1:
        del objects[position]
    elif kind == "more":
        objects.insert(position, obj)
    elif kind == "swap" and len(objects) > 1:
        other = rng.choice([index for index in range(len(objects)) if index != position])
        objects[position], objects[other] = (
            replace(obj, colour=objects[other].colour),
            replace(objects[other], colour=obj.colour),
        )
    else:
        objects[position] = {
            "shape": replace(obj, shape=rng.choice(SHAPES)),
            "motion": replace(obj, motion=rng.choice(MOTIONS), second_motion=None),
            "speed": replace(obj, speed=rng.choice(SPEEDS)),
            "size": replace(obj, size=rng.choice(SIZES)),
        }.get(kind) or replace(obj, colour=rng.choice(list(COLOURS)))
    return replace(scene, objects=tuple(objects))


def detection_from_scene(scene: Scene) -> SceneDetection:
    """Return what a perfect scorer detects in the scene's pixels."""
    objects = (
        ObjectDetection(
            obj.shape,
            obj.colour,
            obj.size,
            obj.motion,
            obj.x,
            obj.y,
            obj.speed if obj.changes_place else None,
            obj.second_motion,
        )
        for obj in scene.objects
    )
    return SceneDetection(scene.background, tuple(objects), 1.0)


def ask_match(rng: random.Random, scene: Scene) -> SceneQuestion:
    """Ask whether a caption is true, as the planner asks about a generated clip; half of the captions have an error."""
    caption = sample_caption(rng, scene if rng.random() < 0.5 else corrupt_scene(rng, scene))
    text = caption.text if rng.random() < 0.5 else to_canonical_text(caption.scene_spec)
    forms = ("does this show {}?", "does this show {}?", "is this {}?")
    return SceneQuestion(
        "match",
        rng.choice(forms).format(text),
        "yes" if caption.scene_spec.is_met_by(detection_from_scene(scene)) else "no",
    )


def ask_caption(rng: random.Random, scene: Scene) -> SceneQuestion:
    kind = "video" if scene.is_video else "picture"
    forms = (
        "describe the {}",
        "what do you see?",
        "what is in this {}?",
        "caption this {}",
        "describe what you see",
        "what does the {} show?",
    )
    return SceneQuestion("caption", rng.choice(forms).format(kind), describe_scene(scene))


QUESTION_MAKERS: dict[str, Callable[[random.Random, Scene], SceneQuestion | None]] = {
    "colour": ask_colour, "shape": ask_shape, "count": ask_count, "position": ask_position,
    "relation": ask_relation, "motion": ask_motion, "background": ask_background, "size": ask_size,
    "presence": ask_presence, "caption": ask_caption, "match": ask_match, "speed": ask_speed,
}  # fmt: skip


# Sampling weights in training: positions and near misses are learned last, and only few answer tokens teach them.
QUESTION_WEIGHTS = {
    name: {"match": 4, "position": 4, "relation": 6, "motion": 3, "count": 2, "speed": 2}.get(name, 1)
    for name in QUESTION_MAKERS
}


def ask_layout(rng: random.Random, scene: Scene) -> SceneQuestion:
    """Ask for the position of every object at once, for training."""
    forms = ("where is everything?", "where are the objects?", "what is where?")
    placements = [
        f"{format_plain_name(obj)} {REGION_PHRASES[find_region(obj)]}" for obj in sort_in_reading_order(scene)
    ]
    return SceneQuestion("layout", rng.choice(forms), ", ".join(placements))


def format_plain_name(obj: SceneObject) -> str:
    return f"{obj.colour} {obj.shape}"


def sample_question(rng: random.Random, scene: Scene, weights: Mapping[str, int] | None = None) -> SceneQuestion:
    """Return a question that fits the scene, sampled by `weights`, or uniformly with "match" twice as likely."""
    while True:
        kind = (
            rng.choice([*QUESTION_MAKERS, "match"])
            if weights is None
            else rng.choices([*weights], [*weights.values()])[0]
        )
        question = QUESTION_MAKERS[kind](rng, scene)
        if question is not None:
            return question

"""Changes of a scene by an instruction about one object, or about two that exchange something."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from omnivideo.synthetic.captions import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    SECOND_MOTION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    add_article,
    find_region,
    is_group,
    pluralize,
    sample_motion_phrase,
    sample_noun_phrase,
    sample_place_phrase,
)
from omnivideo.synthetic.scenes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    FRAME_SIZE,
    MOTIONS,
    SHAPES,
    TURN_FRAME,
    Scene,
    SceneObject,
    get_centre_bounds,
    get_initial_size,
    is_clear_of,
    keeps_direction,
    list_second_motions,
    list_start_points,
    sample_object,
    trace_path,
)

MOTION_COMMANDS = {
    "still": ("stay still", "stand still", "stop moving"),
    "left": ("move left", "move to the left", "go left"),
    "right": ("move right", "move to the right", "go right"),
    "up": ("move up", "rise", "go up"),
    "down": ("move down", "fall", "go down"),
    "growing": ("grow", "get bigger as time goes on", "get bigger and bigger"),
    "shrinking": ("shrink", "get smaller as time goes on", "get smaller and smaller"),
}
SIZE_COMMANDS = {
    "large": ("bigger", "larger", "large", "big", "huge", "a lot bigger", "twice as big"),
    "small": ("smaller", "small", "little", "tiny", "much smaller", "half as big"),
}
SPEED_COMMANDS = {
    ("normal", "fast"): ("faster", "quicker", "move faster", "move quickly", "speed up"),
    ("normal", "slow"): ("slower", "move slower", "move slowly", "slow down"),
    ("slow", "normal"): ("faster", "move faster", "a bit faster"),
    ("fast", "normal"): ("slower", "move slower", "a bit slower"),
    ("slow", "fast"): ("much faster", "move quickly", "move really fast"),
    ("fast", "slow"): ("much slower", "move slowly", "move really slowly"),
}


def refer_to_object(rng: random.Random, obj: SceneObject, scene: Scene) -> str:
    """Return words that identify the object in the scene; a single object can be "it"."""
    others = [other for other in scene.objects if other is not obj]
    if not others and rng.random() < 0.35:
        return "it"
    shape, colour = rng.choice(SHAPE_WORDS[obj.shape]), rng.choice(COLOUR_WORDS[obj.colour])
    choices = [f"the {colour} {shape}"] * 2
    if all(other.shape != obj.shape for other in others):
        choices.append(f"the {shape}")
    if all(other.colour != obj.colour for other in others):
        choices.append(f"the {colour} one" if others else f"the {colour} shape")
    if others and all(other.size != obj.size for other in others) and not is_changing_size(scene):
        choices.append(f"the {rng.choice(SIZE_WORDS[obj.size])} one")
    return rng.choice(choices)


def is_changing_size(scene: Scene) -> bool:
    return any(obj.motion in ("growing", "shrinking") for obj in scene.objects)


def refer_to_group(rng: random.Random, scene: Scene) -> str:
    """Return words for all objects of a group."""
    shapes = pluralize(rng.choice(SHAPE_WORDS[scene.objects[0].shape]))
    return rng.choice(("them", f"the {shapes}", f"all the {shapes}"))


SceneChange = tuple[Scene, str, tuple[SceneObject, ...]]  # target, instruction, changed objects


def replace_objects(scene: Scene, replacements: dict[SceneObject, SceneObject], instruction: str) -> SceneChange | None:
    """Return the scene with other objects in the same order, or None if two of them touch."""
    objects = tuple(replacements.get(obj, obj) for obj in scene.objects)
    if not is_possible(objects, scene.frame_count):
        return None
    return replace(scene, objects=objects), instruction, (*replacements.keys(), *replacements.values())


def is_possible(objects: Sequence[SceneObject], frame_count: int) -> bool:
    """Return whether the objects stay inside the frame, keep their motions for at least 4 frames, and never touch."""
    return all(can_move(obj, frame_count) for obj in objects) and all(
        is_clear_of(first, second, frame_count)
        for index, first in enumerate(objects)
        for second in objects[index + 1 :]
    )


def can_move(obj: SceneObject, frame_count: int) -> bool:
    """Return whether an object is inside the frame and keeps each of its motions for at least 4 frames."""
    bounds = get_centre_bounds(obj.size, obj.motion)
    if not all(bounds[0] <= position <= bounds[1] for position in (obj.x, obj.y)):
        return False
    path = trace_path(bounds, (obj.x, obj.y), obj.motion, obj.second_motion, obj.speed)
    return keeps_direction(path, obj.motion, obj.speed, 0, frame_count, True) and (
        obj.second_motion is None or keeps_direction(path, obj.second_motion, obj.speed, TURN_FRAME, frame_count, True)
    )


def move_inside(obj: SceneObject) -> SceneObject:
    """Return the object at the nearest position at which it is completely inside the frame."""
    low, high = get_centre_bounds(obj.size, obj.motion)
    return replace(obj, x=min(max(obj.x, low), high), y=min(max(obj.y, low), high))


# ---------------------------------------------------------------- one attribute


def recolour_object(rng: random.Random, scene: Scene) -> SceneChange | None:
    obj = rng.choice(scene.objects)
    excluded = {scene.background, *(other.colour for other in scene.objects if not is_group(scene))}
    colour = rng.choice([name for name in COLOURS if name not in excluded | {obj.colour}])
    word = rng.choice(COLOUR_WORDS[colour])
    targets = scene.objects if is_group(scene) else (obj,)
    reference = refer_to_group(rng, scene) if is_group(scene) else refer_to_object(rng, obj, scene)
    forms: tuple[str, ...] = (
        "make {0} {1}", "make {0} {1}", "turn {0} {1}", "paint {0} {1}", "change {0} to {1}",
        "change the colour of {0} to {1}", "recolour {0} to {1}", "i want {0} in {1}", "{0} should be {1}",
    )  # fmt: skip
    if len(targets) == len(scene.objects):
        forms += ("{1} instead", "now in {1}", "the same in {1}", "try {1}", "let's see it in {1}")
    text = rng.choice(forms).format(reference, word)
    return replace_objects(scene, {old: replace(old, colour=colour) for old in targets}, text)


def reshape_object(rng: random.Random, scene: Scene) -> SceneChange | None:
    if is_group(scene):
        return None
    obj = rng.choice(scene.objects)
    excluded = {other.shape for other in scene.objects}
    shape = rng.choice([name for name in SHAPES if name not in excluded] or [""])
    if not shape:
        return None
    forms = (
        "turn {} into {}", "change {} into {}", "make {} {}", "transform {} into {}", "{} should be {}",
        "i want {} to be {}",
    )  # fmt: skip
    text = rng.choice(forms).format(refer_to_object(rng, obj, scene), add_article(rng.choice(SHAPE_WORDS[shape])))
    return replace_objects(scene, {obj: replace(obj, shape=shape)}, text)


def resize_object(rng: random.Random, scene: Scene) -> SceneChange | None:
    """Make an object large or small; in a group all of them."""
    obj = rng.choice(scene.objects)
    if obj.motion in ("growing", "shrinking"):
        return None
    size = "small" if obj.size == "large" else "large"
    targets = scene.objects if is_group(scene) else (obj,)
    reference = refer_to_group(rng, scene) if is_group(scene) else refer_to_object(rng, obj, scene)
    word = rng.choice(SIZE_COMMANDS[size])
    forms: tuple[str, ...] = ("make {0} {1}", "make {0} {1}", "{0} should be {1}", "i want {0} {1}", "can {0} be {1}")
    if len(targets) == len(scene.objects):
        forms += ("{1}", "{1} please", "a bit {1}") if word.endswith("er") and " " not in word else ()
    text = rng.choice(forms).format(reference, word)
    return replace_objects(scene, {old: move_inside(replace(old, size=size)) for old in targets}, text)


def change_background(rng: random.Random, scene: Scene) -> SceneChange | None:
    excluded = {scene.background, *(obj.colour for obj in scene.objects)}
    name = rng.choice([name for name in BACKGROUNDS if name not in excluded])
    forms = (
        "change the background to {}", "make the background {}", "turn the background {}",
        "put it on a {} background", "use a {} background", "set the background to {}", "the same on {}",
        "now with a {} background", "{} background", "on {} instead",
    )  # fmt: skip
    text = rng.choice(forms).format(rng.choice(BACKGROUND_WORDS[name]))
    return replace(scene, background=name), text, ()


def change_place(rng: random.Random, scene: Scene) -> SceneChange | None:
    """Put an object at the middle, a side or a corner of the frame."""
    if is_group(scene):
        return None
    obj = rng.choice(scene.objects)
    middle = FRAME_SIZE // 2
    low, high = get_centre_bounds(obj.size, obj.motion)
    moved = replace(obj, x=rng.choice((low, middle, high)), y=rng.choice((low, middle, high)))
    if find_region(moved) == find_region(obj):
        return None
    place = sample_place_phrase(rng, find_region(moved))
    forms = ["put {0} {1}", "place {0} {1}", "i want {0} {1}", "{0} should be {1}"]
    destination = place.replace("in the", "to the", 1).replace("on the", "to the", 1).replace("at the", "to the", 1)
    forms += [f"move {{0}} {destination}"] * (1 if scene.is_video else 2)
    text = rng.choice(forms).format(refer_to_object(rng, obj, scene), place)
    return replace_objects(scene, {obj: moved}, text)


# ---------------------------------------------------------------- motion


def change_motion(rng: random.Random, scene: Scene) -> SceneChange | None:
    """Change how an object moves; its speed becomes the usual one."""
    if not scene.is_video or is_group(scene):
        return None
    obj = rng.choice(scene.objects)
    name = rng.choice([name for name in MOTIONS if name != obj.motion or obj.second_motion])
    moved = SceneObject(obj.shape, obj.colour, get_initial_size(name, obj.size), name, obj.x, obj.y)
    if moved.size != obj.size:
        return None
    forms = ("make {} {}", "make {} {}", "let {} {}", "now {} should {}", "have {} {} instead", "{} should {}")
    text = rng.choice(forms).format(refer_to_object(rng, obj, scene), rng.choice(MOTION_COMMANDS[name]))
    return replace_objects(scene, {obj: moved}, text)


def change_speed(rng: random.Random, scene: Scene) -> SceneChange | None:
    """Make a moving object faster or slower; in a group all of them."""
    movers = [obj for obj in scene.objects if obj.motion in DIRECTIONS and obj.second_motion is None]
    if not scene.is_video or not movers:
        return None
    obj = rng.choice(movers)
    old, new = rng.choice([pair for pair in SPEED_COMMANDS if pair[0] == obj.speed])
    targets = scene.objects if is_group(scene) else (obj,)
    reference = refer_to_group(rng, scene) if is_group(scene) else refer_to_object(rng, obj, scene)
    word = rng.choice(SPEED_COMMANDS[old, new])
    forms: tuple[str, ...] = ("make {0} {1}", "make {0} {1}", "let {0} {1}" if " " in word else "make {0} move {1}")
    if len(targets) == len(scene.objects):
        forms += ("{1}", "{1} please") if word.endswith("er") and " " not in word else ()
    text = rng.choice(forms).format(reference, word)
    return replace_objects(scene, {old: replace(old, speed=new) for old in targets}, text)


def change_path(rng: random.Random, scene: Scene) -> SceneChange | None:
    """Give an object a second motion after its first, or two new ones."""
    if not scene.is_video or is_group(scene):
        return None
    obj = rng.choice(scene.objects)
    if obj.motion in ("growing", "shrinking"):
        return None
    keeps_first = obj.second_motion is None and rng.random() < 0.6
    first = obj.motion if keeps_first else rng.choice([*DIRECTIONS, "still"])
    second = rng.choice(list_second_motions(first))
    moved = replace(obj, motion=first, speed="normal", second_motion=second)
    if moved == obj or (keeps_first and obj.speed != "normal"):
        return None
    reference = refer_to_object(rng, obj, scene)
    first_command, second_command = rng.choice(MOTION_COMMANDS[first]), rng.choice(MOTION_COMMANDS[second])
    second_words = rng.choice((second_command, rng.choice(SECOND_MOTION_WORDS[second])))
    forms = [
        "make {0} {1} then {2}",
        "make {0} {1} and then {2}",
        "let {0} first {1} then {2}",
        "{0} should {1} then {2}",
    ]
    if keeps_first:
        forms += ["then make {0} {3}", "after that {0} should {3}", "and then let {0} {3}", "make {0} {3} afterwards"]
    text = rng.choice(forms).format(reference, first_command, second_words, second_command)
    return replace_objects(scene, {obj: moved}, text)


# ---------------------------------------------------------------- whole objects


def add_object(rng: random.Random, scene: Scene) -> SceneChange | None:
    if len(scene.objects) > 2:
        return None
    obj = sample_object(rng, scene.background, scene.is_video, large_probability=0.25, is_varied=True)
    if any(obj.shape == other.shape and obj.colour == other.colour for other in scene.objects):
        return None
    candidates = [replace(obj, x=x, y=y) for x, y in list_start_points(obj, scene.frame_count)]
    region = None
    if rng.random() < 0.3:
        region = find_region(rng.choice(candidates))
        candidates = [candidate for candidate in candidates if find_region(candidate) == region]
    placed = find_farthest(candidates, scene)
    if placed is None:
        return None
    verb = rng.choice(("add", "add", "put", "draw", "give me also", "also add"))
    parts = [verb, add_article(sample_noun_phrase(rng, obj, with_size=obj.motion not in ("growing", "shrinking")))]
    if region is not None:
        parts.append(sample_place_phrase(rng, region))
    if scene.is_video:
        parts.append(sample_motion_phrase(rng, obj.motion, obj.speed, obj.second_motion))
    return replace(scene, objects=(*scene.objects, placed)), " ".join(filter(None, parts)), (placed,)


def find_farthest(candidates: Sequence[SceneObject], scene: Scene) -> SceneObject | None:
    """Return the candidate farthest from all objects halfway through a clip; None if all of them touch one."""
    fitting = [
        candidate
        for candidate in candidates
        if all(is_clear_of(candidate, other, scene.frame_count) for other in scene.objects)
    ]
    middle_frame = scene.frame_count // 2
    return max(
        fitting,
        key=lambda candidate: min(
            math.dist(candidate.centre_at(middle_frame), other.centre_at(middle_frame)) for other in scene.objects
        ),
        default=None,
    )


def remove_object(rng: random.Random, scene: Scene) -> SceneChange | None:
    if len(scene.objects) < 2 or is_group(scene):
        return None
    obj = rng.choice(scene.objects)
    forms = (
        "remove {}", "remove {}", "delete {}", "take away {}", "erase {}", "get rid of {}", "i do not want {}",
        "without {}", "drop {}",
    )  # fmt: skip
    text = rng.choice(forms).format(refer_to_object(rng, obj, scene))
    remaining_objects = tuple(other for other in scene.objects if other is not obj)
    return replace(scene, objects=remaining_objects), text, (obj,)


def replace_object(rng: random.Random, scene: Scene) -> SceneChange | None:
    """Put another object in the place of one; it moves in the same way."""
    if is_group(scene):
        return None
    obj = rng.choice(scene.objects)
    others = {(other.shape, other.colour) for other in scene.objects}
    shape = rng.choice(SHAPES)
    colour = rng.choice([name for name in COLOURS if name != scene.background])
    changes_size = obj.motion not in ("growing", "shrinking")
    size = rng.choice(("small", "large")) if changes_size else obj.size
    if (shape, colour) in others:
        return None
    new = move_inside(replace(obj, shape=shape, colour=colour, size=size))
    words = add_article(sample_noun_phrase(rng, new, with_size=changes_size))
    forms = (
        "replace {0} with {1}", "replace {0} by {1}", "swap {0} for {1}", "turn {0} into {1}",
        "remove {0} and put {1} there instead", "take away {0} and draw {1} in its place", "{1} instead of {0}",
        "make {0} {1}",
    )  # fmt: skip
    return replace_objects(scene, {obj: new}, rng.choice(forms).format(refer_to_object(rng, obj, scene), words))


def swap_objects(rng: random.Random, scene: Scene) -> SceneChange | None:
    """Exchange the colours, the shapes or the places of two objects."""
    if len(scene.objects) < 2 or is_group(scene):
        return None
    first, second = rng.sample(scene.objects, 2)
    attribute = rng.choice(("colour", "colour", "shape", "place"))
    if attribute == "place":
        swapped = {first: move_inside(replace(first, x=second.x, y=second.y))}
        swapped[second] = move_inside(replace(second, x=first.x, y=first.y))
    else:
        if getattr(first, attribute) == getattr(second, attribute):
            return None
        swapped = {first: replace(first, **{attribute: getattr(second, attribute)})}
        swapped[second] = replace(second, **{attribute: getattr(first, attribute)})
    if len({(obj.shape, obj.colour) for obj in swapped.values()}) < 2 or set(swapped.values()) == {first, second}:
        return None
    noun = {"colour": "colours", "shape": "shapes", "place": rng.choice(("places", "positions"))}[attribute]
    names = f"{refer_to_object(rng, first, scene)} and {refer_to_object(rng, second, scene)}"
    verb = rng.choice(("swap", "swap", "exchange", "switch"))
    forms = [f"{verb} the {noun} of {names}", f"{verb} {noun} of {names}"]
    if len(scene.objects) == 2:
        forms += [f"{verb} their {noun}", f"{verb} the {noun}", f"{verb} {noun}"]
    return replace_objects(scene, swapped, rng.choice(forms))

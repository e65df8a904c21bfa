"""Captions of scenes, in varied wording.

A caption states true facts; the choice of facts and of words varies. `to_canonical_text` returns the canonical
wording, to which think mode learns to rewrite requests.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from omnivideo.synthetic.facts import REGION_MARGIN, ObjectSpec, SceneSpec
from omnivideo.synthetic.scenes import (
    ARRANGEMENTS,
    FRAME_SIZE,
    Scene,
    SceneObject,
    arrange_by_default,
    arrange_objects,
)

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
# The words of a motion in a direction at another speed, and of the second of two motions.
SPEED_ADVERBS = {"slow": ("slowly", "slowly", "gently"), "fast": ("quickly", "quickly", "fast", "rapidly")}
DIRECTION_PHRASES = {
    "left": ("moving {} left", "moving {} to the left", "sliding {} left", "going {} left"),
    "right": ("moving {} right", "moving {} to the right", "sliding {} right", "going {} right"),
    "up": ("moving {} up", "rising {}", "moving {} upwards", "going {} up"),
    "down": ("moving {} down", "falling {}", "moving {} downwards", "going {} down"),
}
SECOND_MOTION_WORDS = {
    "left": ("left", "left", "to the left", "moving left", "going left"),
    "right": ("right", "right", "to the right", "moving right", "going right"),
    "up": ("up", "up", "upwards", "moving up", "rising"),
    "down": ("down", "down", "downwards", "moving down", "falling"),
    "still": ("stopping", "stopping", "staying still", "coming to rest"),
}
TURN_WORDS = ("then", "then", "and then", "before", "and after that")
BACKGROUND_PHRASES = ("on a {} background", "on a {} background", "against {}", "on {}", "in front of a {} backdrop")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five")
STILL_PREFIXES = ("a picture of ", "an image of ", "a photo of ", "a still of ")
CLIP_PREFIXES = ("a video of ", "a clip of ", "an animation of ", "footage of ")
REGION_PHRASES: dict[tuple[str, ...], str] = {
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


def pluralize(noun: str) -> str:
    return {"box": "boxes"}.get(noun, noun + "s")


def add_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def find_region(obj: SceneObject) -> tuple[str, ...]:
    """Return the sides of the frame on which the object's centre lies at frame 0: none, one or two."""
    middle, margin = FRAME_SIZE // 2, REGION_MARGIN
    across = "left" if obj.x < middle - margin else "right" if obj.x > middle + margin else ""
    along = "top" if obj.y < middle - margin else "bottom" if obj.y > middle + margin else ""
    return tuple(name for name in (along, across) if name)


def find_relation(first: SceneObject, second: SceneObject) -> str | None:
    """Return the relation of the first to the second object at frame 0, by the larger distance; None on a diagonal."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


@dataclass(frozen=True)
class Caption:
    """A text with the content that it describes; the objects are in the order in which the text mentions them.

    `object_spans` are the character ranges of the objects' phrases; the objects of a group share one.
    """

    text: str
    scene_spec: SceneSpec
    object_spans: tuple[tuple[int, int], ...]


def sample_noun_phrase(rng: random.Random, obj: SceneObject, *, with_size: bool, is_plural: bool = False) -> str:
    """Return a phrase such as "small red circle", without an article, in varied words."""
    words = [rng.choice(SIZE_WORDS[obj.size])] if with_size else []
    shape = rng.choice(SHAPE_WORDS[obj.shape])
    words += [rng.choice(COLOUR_WORDS[obj.colour]), pluralize(shape) if is_plural else shape]
    return " ".join(words)


def should_mention_size(rng: random.Random, obj: SceneObject) -> bool:
    """Return whether to name the size: usually, but never for an object that grows or shrinks."""
    return obj.motion not in ("growing", "shrinking") and rng.random() < 0.7


def spec_from_object(
    obj: SceneObject, *, with_size: bool, with_motion: bool, region: tuple[str, ...] | None = None
) -> ObjectSpec:
    return ObjectSpec(
        obj.shape,
        obj.colour,
        obj.size if with_size else None,
        obj.motion if with_motion else None,
        obj.speed if with_motion and obj.changes_place and obj.speed != "normal" else None,
        obj.second_motion if with_motion else None,
        region,
    )


def sample_motion_phrase(rng: random.Random, motion: str, speed: str | None, second_motion: str | None) -> str:
    """Return words for a motion, such as "moving slowly left" or "rising and then stopping"; "" is possible at rest."""
    if speed in SPEED_ADVERBS and motion in DIRECTION_PHRASES:
        words = rng.choice(DIRECTION_PHRASES[motion]).format(rng.choice(SPEED_ADVERBS[speed]))
    else:
        words = rng.choice(MOTION_WORDS[motion])
    if second_motion is None:
        return words
    return f"{words or 'staying still'} {rng.choice(TURN_WORDS)} {rng.choice(SECOND_MOTION_WORDS[second_motion])}"


def sample_object_phrase(
    rng: random.Random, obj: SceneObject, is_video: bool, region: tuple[str, ...] | None = None
) -> tuple[str, ObjectSpec]:
    """Return an object's phrase with an article, sometimes its size, its place if given, and its motion in a clip."""
    with_size = should_mention_size(rng, obj)
    parts = [add_article(sample_noun_phrase(rng, obj, with_size=with_size))]
    if is_video:
        parts.append(sample_motion_phrase(rng, obj.motion, obj.speed, obj.second_motion))
    if region is not None:
        parts.insert(rng.randint(1, len(parts)), sample_place_phrase(rng, region))
    spec = spec_from_object(obj, with_size=with_size, with_motion=is_video, region=region)
    return " ".join(filter(None, parts)), spec


def join_phrases(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def is_group(scene: Scene) -> bool:
    """Return whether the scene has several objects that differ only in position."""
    first = scene.objects[0]
    return len(scene.objects) > 1 and all(replace(obj, x=0, y=0) == replace(first, x=0, y=0) for obj in scene.objects)


def sample_place_phrase(rng: random.Random, region: tuple[str, ...]) -> str:
    """Return words for a place in the frame; an empty region is the middle."""
    if len(region) == 2:
        return rng.choice(("in the {0} {1}", "in the {0} {1} corner")).format(*region)
    return REGION_PHRASES[region]


def sample_group_caption(rng: random.Random, scene: Scene) -> Caption:
    first, with_size = scene.objects[0], should_mention_size(rng, scene.objects[0])
    number = NUMBER_WORDS[len(scene.objects)] if rng.random() < 0.85 else str(len(scene.objects))
    motion = sample_motion_phrase(rng, first.motion, first.speed, first.second_motion) if scene.is_video else ""
    text = f"{number} {sample_noun_phrase(rng, first, with_size=with_size, is_plural=True)} {motion}".strip()
    count = len(scene.objects)
    return Caption(
        text,
        SceneSpec((spec_from_object(first, with_size=with_size, with_motion=scene.is_video),) * count),
        ((0, len(text)),) * count,
    )


def find_spans(phrases: Sequence[str], text: str) -> tuple[tuple[int, int], ...]:
    """Return the character range of each phrase in a text that contains them in order."""
    spans, position = [], 0
    for phrase in phrases:
        position = text.index(phrase, position)
        spans.append((position, position + len(phrase)))
        position += len(phrase)
    return tuple(spans)


def sample_object_caption(rng: random.Random, scene: Scene, is_composed: bool) -> Caption:
    """Return a caption of the objects, sometimes with a relation or with places, without the background.

    The caption of a composed scene names the objects in their order, and states positions that differ from the default.
    """
    if is_group(scene):
        return sample_group_caption(rng, scene)
    is_default = is_composed and arrange_by_default(scene.objects, scene.frame_count) == scene.objects
    chance = rng.random()
    can_relate = (
        len(scene.objects) == 2
        and scene.objects[0].motion == scene.objects[1].motion
        and find_relation(*scene.objects) is not None
    )
    if is_composed and not is_default:
        column = arrange_objects(scene.objects, ARRANGEMENTS["column"], scene.frame_count) if can_relate else None
        states_relation = column == scene.objects
        states_places = not states_relation
    else:
        states_relation = can_relate and chance < (0.4 if is_composed else 0.5)
        states_places = not states_relation and chance > (0.9 if is_composed else 0.7)
    shuffled = not is_composed or (states_relation and rng.random() < 0.5)
    objects = rng.sample(scene.objects, len(scene.objects)) if shuffled else list(scene.objects)
    regions = [find_region(obj) if states_places else None for obj in objects]
    pairs = [
        sample_object_phrase(rng, obj, scene.is_video, region) for obj, region in zip(objects, regions, strict=True)
    ]
    phrases, object_specs = [text for text, _ in pairs], tuple(object_spec for _, object_spec in pairs)
    if states_relation and (relation := find_relation(objects[0], objects[1])):
        text = f"{phrases[0]} {rng.choice(RELATION_WORDS[relation])} {phrases[1]}"
        return Caption(text, SceneSpec(object_specs, relation=relation), find_spans(phrases, text))
    return Caption(join_phrases(phrases), SceneSpec(object_specs), find_spans(phrases, join_phrases(phrases)))


def sample_caption(rng: random.Random, scene: Scene, is_composed: bool = False) -> Caption:
    """Return a caption that states the objects and usually the background."""
    inner = sample_object_caption(rng, scene, is_composed)
    text, scene_spec, prefix = inner.text, inner.scene_spec, ""
    if rng.random() < 0.65:
        text += " " + rng.choice(BACKGROUND_PHRASES).format(rng.choice(BACKGROUND_WORDS[scene.background]))
        scene_spec = replace(scene_spec, background=scene.background)
    if rng.random() < 0.25:
        prefix = rng.choice(CLIP_PREFIXES if scene.is_video else STILL_PREFIXES)
    spans = tuple((start + len(prefix), end + len(prefix)) for start, end in inner.object_spans)
    return Caption(prefix + text, scene_spec, spans)


# ---------------------------------------------------------------- the canonical wording


def sort_in_reading_order(scene: Scene) -> list[SceneObject]:
    """Return the objects from left to right, then from top to bottom, by their position at frame 0."""
    return sorted(scene.objects, key=lambda obj: (obj.x, obj.y))


CANONICAL_MOTION_WORDS = {name: words[0] or "staying still" for name, words in MOTION_WORDS.items()}


def to_canonical_motion(object_spec: ObjectSpec) -> str:
    """Return e.g. "moving slowly left" or "moving right then up"; "" if the motion is free."""
    motion = object_spec.motion
    if motion is None:
        return ""
    words = CANONICAL_MOTION_WORDS[motion]
    if object_spec.speed in SPEED_ADVERBS and motion in DIRECTION_PHRASES:
        words = DIRECTION_PHRASES[motion][0].format(SPEED_ADVERBS[object_spec.speed][0])
    return f"{words} then {SECOND_MOTION_WORDS[object_spec.second_motion][0]}" if object_spec.second_motion else words


def to_canonical_phrase(object_spec: ObjectSpec, count: int = 1) -> str:
    """Return e.g. "a small red circle in the top left moving right" or "three small red circles moving right"."""
    assert object_spec.shape is not None
    words = [
        object_spec.size or "",
        object_spec.colour or "",
        pluralize(object_spec.shape) if count > 1 else object_spec.shape,
    ]
    text = " ".join(word for word in words if word)
    text = f"{NUMBER_WORDS[count]} {text}" if count > 1 else add_article(text)
    place = "" if object_spec.region is None else REGION_PHRASES[object_spec.region]
    return " ".join(filter(None, (text, place, to_canonical_motion(object_spec))))


def to_canonical_text(scene_spec: SceneSpec) -> str:
    """Return the canonical wording of a scene's content."""
    first = scene_spec.objects[0]
    if len(scene_spec.objects) > 1 and all(object_spec == first for object_spec in scene_spec.objects):
        text = to_canonical_phrase(first, len(scene_spec.objects))
    elif scene_spec.relation:
        relation = RELATION_WORDS[scene_spec.relation][0]
        text = f"{to_canonical_phrase(first)} {relation} {to_canonical_phrase(scene_spec.objects[1])}"
    else:
        text = join_phrases([to_canonical_phrase(object_spec) for object_spec in scene_spec.objects])
    return f"{text} on a {scene_spec.background} background" if scene_spec.background else text


def specify_scene(scene: Scene, *, with_places: bool = False) -> SceneSpec:
    """Return all facts of a scene, with the objects in reading order."""
    object_specs = tuple(
        spec_from_object(
            obj,
            with_size=obj.motion not in ("growing", "shrinking"),
            with_motion=scene.is_video,
            region=find_region(obj) if with_places else None,
        )
        for obj in sort_in_reading_order(scene)
    )
    return SceneSpec(object_specs, background=scene.background)


def describe_scene(scene: Scene, *, with_places: bool = False) -> str:
    """Return the complete canonical caption of a scene.

    With places it is what think mode rewrites an edit to: the layout of the target does not follow from the words.
    """
    return to_canonical_text(specify_scene(scene, with_places=with_places))


def caption_with_places(scene: Scene) -> Caption:
    """Return the canonical caption with the place of every object, as think mode writes it."""
    scene_spec = specify_scene(scene, with_places=True)
    text = to_canonical_text(scene_spec)
    if len(set(scene_spec.objects)) < len(scene_spec.objects):  # equal objects in one place share one phrase
        return Caption(text, scene_spec, ((0, text.index(" on a ")),) * len(scene_spec.objects))
    return Caption(text, scene_spec, find_spans([to_canonical_phrase(spec) for spec in scene_spec.objects], text))

"""Names for the objects that a change refers to by place, size or exclusion: "the left one" is "the red circle".

What is said is resolved against the description of the current result. Words that fit no object, or several where one
is meant, stay as they are, so that the user is asked.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

from omnivideo.agent.small_world.lexicon import name_target, tokenize
from omnivideo.agent.small_world.readings import Context
from omnivideo.agent.small_world.scenes import DescribedScene, ObjectRequest, read_scene
from omnivideo.agent.small_world.wordings import load_pattern

SIDES = {
    "left": "left", "leftmost": "left", "left-hand": "left", "lefthand": "left", "right": "right",
    "rightmost": "right", "right-hand": "right", "righthand": "right", "upper": "top", "uppermost": "top",
    "top": "top", "topmost": "top", "higher": "top", "highest": "top", "lower": "bottom", "lowest": "bottom",
    "bottom": "bottom", "bottommost": "bottom",
}  # fmt: skip
# The side on which the first object of a relation lies, and that of the second one.
RELATION_SIDES = {
    "left of": ("left", "right"), "right of": ("right", "left"), "above": ("top", "bottom"), "below": ("bottom", "top"),
}  # fmt: skip
Finder = Callable[[re.Match[str], DescribedScene, str], list[ObjectRequest]]
LARGER = ("bigger", "larger", "biggest", "largest")


def read_current_scene(context: Context) -> DescribedScene:
    return read_scene(tokenize(context.describe()))


def list_object_names(context: Context) -> list[str]:
    """Return "the circle" or "the red circle" for each different object that the MLLM sees."""
    scene = read_current_scene(context)
    return [name_object(obj, scene.objects) for obj in scene.objects]


def name_object(obj: ObjectRequest, objects: Sequence[ObjectRequest]) -> str:
    """Return the shortest name that tells an object from the others."""
    noun = f"{obj.shape}s" if (obj.count or 1) > 1 else str(obj.shape)
    alike = [other for other in objects if other.shape == obj.shape]
    if len(alike) == 1:
        return f"the {noun}"
    same_colour = [other for other in alike if other.colour == obj.colour]
    size = f"{obj.size} " if len(same_colour) > 1 and obj.size else ""
    return f"the {size}{obj.colour} {noun}"


def name_referents(text: str, context: Context) -> str:
    """Return a normalised text with objects by name that it refers to by place, size or exclusion."""
    if context.medium is None:
        return text
    scene: DescribedScene | None = None
    for name, find in FINDERS.items():
        pattern = load_pattern(name)
        if pattern.search(text) is None:
            continue
        scene = scene or read_current_scene(context)

        text = pattern.sub(partial(replace_referent, find=find, scene=scene, earlier=context.last_request), text)
    return text


def replace_referent(match: re.Match[str], *, find: Finder, scene: DescribedScene, earlier: str) -> str:
    """Return the names of the objects that the matched words mean, or these words if they mean none."""
    found = find(match, scene, earlier)
    return " and ".join(name_object(obj, scene.objects) for obj in found) or match[0]


# ---------------------------------------------------------------- which objects are meant


def is_meant(words: str, obj: ObjectRequest) -> bool:
    """Return whether words such as "the red one" or "the circle" name an object."""
    named = read_scene(tokenize(words)).objects
    if len(named) != 1:
        return False
    pairs = ((named[0].shape, obj.shape), (named[0].colour, obj.colour), (named[0].size, obj.size))
    return any(wanted for wanted, _ in pairs) and all(wanted in (None, found) for wanted, found in pairs)


def find_others(match: re.Match[str], scene: DescribedScene, earlier: str) -> list[ObjectRequest]:
    """Return all objects but those that are excepted: "everything but the circle"."""
    excepted = [obj for obj in scene.objects if any(is_meant(words, obj) for words in split_names(match["object"]))]
    return [obj for obj in scene.objects if obj not in excepted] if excepted else []


def find_by_value(match: re.Match[str], scene: DescribedScene, earlier: str) -> list[ObjectRequest]:
    """Return the objects that "whatever is red" or "anything that is not a star" means."""
    is_negated = bool(match["negation"])
    return [obj for obj in scene.objects if is_meant(match["value"], obj) != is_negated]


def find_rest(match: re.Match[str], scene: DescribedScene, earlier: str) -> list[ObjectRequest]:
    """Return the objects that are not named before "the rest": in the text itself, or else in the earlier one."""
    for text in (match.string[: match.start()], earlier):
        named = [obj for obj in scene.objects if any(is_meant(name, obj) for name in list_names(text))]
        if named:
            return [obj for obj in scene.objects if obj not in named]
    return []


def list_names(text: str) -> list[str]:
    """Return the names of objects in a text, such as "the red circle"."""
    tokens, names = tokenize(text), list[str]()
    for end, token in enumerate(tokens):
        if token.has("shape", "plural", "thing"):
            start = end
            while start and tokens[start - 1].has("colour", "size"):
                start -= 1
            names.append(name_target(tokens[start : end + 1]))
    return names


def find_named_objects(text: str, objects: Sequence[ObjectRequest]) -> list[ObjectRequest]:
    """Return the objects that an earlier text names; by their shapes alone if their colours have been changed."""
    names = list_names(text)
    found = [obj for obj in objects if any(is_meant(name, obj) for name in names)]
    shapes = {token.get("shape") for name in names for token in tokenize(name)} - {None}
    return found or [obj for obj in objects if obj.shape in shapes]


def find_by_place(match: re.Match[str], scene: DescribedScene, earlier: str) -> list[ObjectRequest]:
    """Return the object on a side: by its place, by its relation to the other one, or by the order of two."""
    side = SIDES[next(word for word in (match["side"], match["place"]) if word)]
    noun = match["noun"] or match["subject"] or match["subject2"] or "one"
    kind = [obj for obj in scene.objects if is_meant(noun, obj) or not tokenize(noun)[0].has("shape", "plural")]
    if scene.relation and len(scene.objects) == 2:
        sides = RELATION_SIDES[scene.relation[1]]
        ordered = [scene.objects[scene.relation[0]], scene.objects[1 - scene.relation[0]]]
        found = [obj for obj, own in zip(ordered, sides, strict=True) if own == side and obj in kind]
        return found
    found = [obj for obj in kind if side in (obj.region or "").split()]
    if len(found) == 1:
        return found
    is_in_a_row = len(scene.objects) in (2, 3) and not any(obj.region or (obj.count or 1) > 1 for obj in scene.objects)
    if is_in_a_row and side in ("left", "right") and len(kind) > 1:
        return [kind[0 if side == "left" else -1]]
    return []


def find_by_size(match: re.Match[str], scene: DescribedScene, earlier: str) -> list[ObjectRequest]:
    """Return the only object of the size that "the bigger one" means."""
    size = "large" if match["size"] in LARGER else "small"
    found = [
        obj
        for obj in scene.objects
        if obj.size == size and (is_meant(match["noun"], obj) or not tokenize(match["noun"])[0].has("shape", "plural"))
    ]
    return found if len(found) == 1 else []


def split_names(words: str) -> list[str]:
    return [part for part in re.split(r",? and |, ", words) if part]


FINDERS: dict[str, Finder] = {
    "excepted_objects": find_others,
    "objects_by_value": find_by_value,
    "objects_by_place": find_by_place,
    "objects_by_size": find_by_size,
    "other_objects": find_rest,
}

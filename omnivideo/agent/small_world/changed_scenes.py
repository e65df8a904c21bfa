"""What a scene shows after changes in the MLLM's words, for what is said of it before the changes are drawn."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from omnivideo.agent.small_world.changes import IMPERATIVE_MOTIONS, WordedChange
from omnivideo.agent.small_world.edits import read_edit
from omnivideo.agent.small_world.lexicon import tokenize
from omnivideo.agent.small_world.readings import Context
from omnivideo.agent.small_world.scenes import REGION_PHRASES, DescribedScene, ObjectRequest, read_scene
from omnivideo.contracts import Artifact

SPEEDS = ("slow", "normal", "fast")
MAX_CHANGES = 50  # of one result after the other


def describe_changed_scene(description: str, text: str, medium: str) -> str:
    """Return the description of a scene after a change."""
    scene = change_scene(read_scene(tokenize(description)), read_worded_changes(text, medium))
    return scene.to_text().partition(" of ")[2] if scene.objects else ""


def read_worded_changes(text: str, medium: str) -> Sequence[WordedChange]:
    """Return the changes of a request in the MLLM's words; "make it shrink" is a motion there."""
    for imperative in IMPERATIVE_MOTIONS.values():
        if (target := text.removeprefix("make ").removesuffix(f" {imperative}")) != text.removeprefix("make "):
            return [WordedChange("motion", text, target)]
    return read_edit(tokenize(text), is_still=medium == "image").changes


def change_scene(scene: DescribedScene, changes: Sequence[WordedChange]) -> DescribedScene:
    """Return the scene after the changes; one whose effect is not known leaves it as it is."""
    for change in changes:
        new = read_scene(tokenize(change.text))
        if change.kind == "background":
            scene = replace(scene, background=change.value)
        elif change.kind == "add":
            scene = replace(scene, objects=[*scene.objects, *new.objects])
        elif change.kind == "remove":
            scene = replace(scene, objects=[obj for obj in scene.objects if not is_target(obj, change.target)])
        elif change.kind == "swap":
            scene = swap_values(scene, change)
        elif change.kind in VALUE_READERS:
            read_values = VALUE_READERS[change.kind]
            objects = [
                replace(obj, **read_values(change, obj)) if is_target(obj, change.target) else obj
                for obj in scene.objects
            ]
            scene = replace(scene, objects=objects)
    return scene


# ---------------------------------------------------------------- the values of a changed object


def read_shape(change: WordedChange, obj: ObjectRequest) -> dict[str, Any]:
    return {"shape": read_scene(tokenize(change.text)).objects[-1].shape}


def read_replacement(change: WordedChange, obj: ObjectRequest) -> dict[str, Any]:
    """Return what the new object has of its own; it moves as the one in whose place it is."""
    (new, *_) = read_scene(tokenize(change.text.partition(" with ")[2])).objects or [ObjectRequest()]
    return {"shape": new.shape, "colour": new.colour or obj.colour, "size": new.size or obj.size}


def read_motion(change: WordedChange, obj: ObjectRequest) -> dict[str, Any]:
    words = change.text.removeprefix(f"make {change.target} ").split(" then ")
    motions = [next(name for name, imperative in IMPERATIVE_MOTIONS.items() if imperative == word) for word in words]
    return {"motion": motions[0], "second_motion": motions[1] if len(motions) > 1 else None}


def read_speed(change: WordedChange, obj: ObjectRequest) -> dict[str, Any]:
    index = SPEEDS.index(obj.speed or "normal") + (1 if change.value == "faster" else -1)
    return {"speed": SPEEDS[max(0, min(index, len(SPEEDS) - 1))]}


def read_region(change: WordedChange, obj: ObjectRequest) -> dict[str, Any]:
    words = change.text.removeprefix(f"put {change.target} ")
    return {"region": next((name for name, phrase in REGION_PHRASES.items() if phrase == words), words[7:])}


VALUE_READERS: dict[str, Callable[[WordedChange, ObjectRequest], dict[str, Any]]] = {
    "reshape": read_shape,
    "replace": read_replacement,
    "recolour": lambda change, obj: {"colour": change.value},
    "resize": lambda change, obj: {"size": "large" if change.value == "bigger" else "small"},
    "motion": read_motion,
    "path": read_motion,
    "speed": read_speed,
    "place": read_region,
}


def is_known(change: WordedChange) -> bool:
    return change.kind in ("background", "add", "remove", "swap", *VALUE_READERS)


def swap_values(scene: DescribedScene, change: WordedChange) -> DescribedScene:
    """Return the scene after two of its objects have exchanged their colours, shapes or places."""
    names = change.text.partition(" of ")[2].split(" and ")
    indices = [
        index
        for index, obj in enumerate(scene.objects)
        if len(names) == 1 or any(is_target(obj, name) for name in names)
    ]
    if len(indices) != 2:
        return scene
    field = next((name for name in ("colour", "shape") if f"{name}s" in change.text), "region")
    one, two = (scene.objects[index] for index in indices)
    objects = list(scene.objects)
    objects[indices[0]] = replace(one, **{field: getattr(two, field)})
    objects[indices[1]] = replace(two, **{field: getattr(one, field)})
    return replace(scene, objects=objects)


def is_target(obj: ObjectRequest, target: str) -> bool:
    """Return whether a change of "it", "them" or "the red circle" is one of this object."""
    if target in ("it", "them", ""):
        return True
    (named, *_) = read_scene(tokenize(re.sub(r"\b(?:one|object)$", "", target))).objects or [ObjectRequest()]
    pairs = ((named.shape, obj.shape), (named.colour, obj.colour), (named.size, obj.size))
    return all(wanted in (None, found) for wanted, found in pairs)


def read_known_scene(context: Context) -> DescribedScene:
    """Return what the current result shows: by the requests for it, or else by the MLLM's description."""
    planned = None if context.is_changed else read_planned_scene(context.artifacts, context.number)
    return planned or read_scene(tokenize(context.describe()))


def read_planned_scene(artifacts: Sequence[Artifact], number: int) -> DescribedScene | None:
    """Return what a result should show by the requests for it and for what it was made from; None if that is unclear.

    `number` is that of the result, from 1; 0 is none.
    """
    texts, medium = list[str](), ""
    while 0 < number <= len(artifacts) and len(texts) < MAX_CHANGES:
        artifact = artifacts[number - 1]
        texts.append(artifact.caption)
        medium = medium or artifact.medium
        if artifact.source is None:
            break
        number = next((index for index in range(number - 1, 0, -1) if artifacts[index - 1].key == artifact.source), 0)
    else:
        return None
    scene = read_scene(tokenize(texts.pop()))
    is_complete = bool(scene.objects) and all(obj.shape for obj in scene.objects)
    if not is_complete or scene.conflicts or scene.leftovers or scene.unknown:
        return None
    for text in reversed(texts):
        restated = read_scene(tokenize(text))
        changes = read_worded_changes(text, medium)
        if restated.background and restated.objects and all(obj.shape and obj.colour for obj in restated.objects):
            scene = restated  # think mode states the whole result
        elif changes and all(is_known(change) for change in changes):
            scene = change_scene(scene, changes)
        else:
            return None
    return scene

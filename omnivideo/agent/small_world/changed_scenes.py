"""What a scene shows after changes in the MLLM's words, for what is said of it before the changes are drawn."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omnivideo.agent.small_world.changes import IMPERATIVE_MOTIONS, WordedChange
from omnivideo.agent.small_world.edits import read_edit
from omnivideo.agent.small_world.lexicon import tokenize
from omnivideo.agent.small_world.readings import Context
from omnivideo.agent.small_world.scenes import DescribedScene, ObjectRequest, read_scene
from omnivideo.contracts import Artifact

KNOWN_CHANGES = ("background", "add", "remove", "reshape", "recolour", "motion")
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
    """Return the scene after the changes."""
    for change in changes:
        new = read_scene(tokenize(change.text))
        if change.kind == "background":
            scene = replace(scene, background=change.value)
        elif change.kind == "add":
            scene = replace(scene, objects=[*scene.objects, *new.objects])
        elif change.kind == "remove":
            scene = replace(scene, objects=[obj for obj in scene.objects if not is_target(obj, change.target)])
        elif change.kind == "reshape":
            shape = new.objects[-1].shape
            scene = change_objects(scene, change.target, shape=shape)
        elif change.kind == "recolour":
            scene = change_objects(scene, change.target, colour=change.value)
        elif change.kind == "motion":
            words = change.text.removeprefix(f"make {change.target} ")
            motion = next(motion for motion, imperative in IMPERATIVE_MOTIONS.items() if imperative == words)
            scene = change_objects(scene, change.target, motion=motion, second_motion=None)
    return scene


def change_objects(scene: DescribedScene, target: str, **values: Any) -> DescribedScene:
    return replace(scene, objects=[replace(obj, **values) if is_target(obj, target) else obj for obj in scene.objects])


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
        elif changes and all(change.kind in KNOWN_CHANGES for change in changes):
            scene = change_scene(scene, changes)
        else:
            return None
    return scene

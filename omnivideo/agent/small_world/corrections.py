"""Corrections of what was changed: after "make the circle green", "no, I meant the square" makes the square green."""

from collections.abc import Sequence

from omnivideo.agent.small_world.changed_scenes import change_scene, read_planned_scene
from omnivideo.agent.small_world.changes import WordedChange
from omnivideo.agent.small_world.edits import read_edit
from omnivideo.agent.small_world.lexicon import normalize_text, tokenize
from omnivideo.agent.small_world.readings import Context, Reading
from omnivideo.agent.small_world.referring import is_meant, name_object
from omnivideo.agent.small_world.scenes import ObjectRequest
from omnivideo.agent.small_world.wordings import load_pattern

RETARGETED_KINDS = ("recolour", "reshape", "remove", "motion")


def retarget_change(text: str, context: Context) -> list[Reading]:
    """Return the change of the last turn as one of another object, made from what there was before; [] for other texts.

    The object is named ("not the circle, the square"), or it is the other one of two.
    """
    normalized = normalize_text(text).strip(" .!")
    match = load_pattern("other_target").fullmatch(normalized)
    is_wrong_change = "you" in normalized.split() and " the wrong " in normalized  # "you changed the wrong one"
    is_named = match and (match["object"] or match["object2"] or is_wrong_change)
    if not is_named:  # "no", "that was the wrong one"
        return []
    source = find_source(context) if match else 0
    scene = read_planned_scene(context.artifacts, source) if source else None
    changes = read_edit(tokenize(context.last_request)).changes if scene else []
    if match is None or scene is None or len(changes) != 1 or changes[0].kind not in RETARGETED_KINDS:
        return []
    change, participle = changes[0], match["participle"] or ""
    if (participle in ("removed", "gone", "deleted")) != (change.kind == "remove") and participle not in (
        "",
        "changed",
    ):
        return []
    old = [obj for obj in scene.objects if is_meant(change.target, obj)]
    new = find_meant(match["object"] or match["object2"] or "", scene.objects, old)
    if len(old) != 1 or len(new) != 1 or new == old:
        return []
    name = name_object(new[0], scene.objects)
    changed = WordedChange(change.kind, change.text.replace(change.target, name, 1), name)
    if change_scene(scene, [changed]) == scene:
        return []
    medium = context.artifacts[source - 1].medium
    return [Reading("do", changed.text, (name,), goal="edit", medium=medium, reference=str(source))]


def find_meant(words: str, objects: Sequence[ObjectRequest], old: Sequence[ObjectRequest]) -> list[ObjectRequest]:
    """Return the objects that words name; without a name, the other one of two."""
    if words and "other" not in words:
        return [obj for obj in objects if is_meant(words, obj)]
    return [obj for obj in objects if obj not in old] if len(objects) == 2 else []


def find_source(context: Context) -> int:
    """Return the number of the result that the current one was made from; 0 if there is none."""
    key = context.artifacts[context.number - 1].source if context.number else None
    keys = [artifact.key for artifact in context.artifacts]
    return keys.index(key) + 1 if key in keys else 0

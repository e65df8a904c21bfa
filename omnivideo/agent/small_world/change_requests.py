"""Requests for changes: what is to be done for each, and which of them are impossible."""

import re
from collections.abc import Sequence
from dataclasses import replace

from omnivideo.agent import english_rules
from omnivideo.agent.small_world import replies
from omnivideo.agent.small_world.changed_scenes import change_scene, read_known_scene
from omnivideo.agent.small_world.changes import IMPERATIVE_MOTIONS, WordedChange
from omnivideo.agent.small_world.edits import read_edit
from omnivideo.agent.small_world.lexicon import Token, load_lexicon, tokenize
from omnivideo.agent.small_world.readings import Context, Reading, ReadingKind
from omnivideo.agent.small_world.referring import (
    find_named_objects,
    list_object_names,
    name_object,
    read_current_scene,
)
from omnivideo.agent.small_world.scenes import DescribedScene, read_scene
from omnivideo.agent.small_world.wordings import load_pattern
from omnivideo.presets import ContinuationTask

SECOND_MOTION = re.compile(r"\b(?:then|after that|afterwards|next)\b")
OPPOSITE_MOTIONS = {
    "left": "right", "right": "left", "up": "down", "down": "up", "growing": "shrinking", "shrinking": "growing",
}  # fmt: skip
TASK_BY_KIND = {"length": "video-extension"}
ALL_OBJECTS = re.compile(r"\b(?:all|both|every|each)\b")
SIZE_MOTION = re.compile(r"\b(?:shrink|grow)(?:s|ing)?\b", re.IGNORECASE)
CHANGES_OF_OBJECTS = ("recolour", "reshape", "resize", "motion", "speed", "path", "remove", "place", "replace")
MOTION_KINDS = ("motion", "speed", "path", "medium")  # of a picture, they make a clip


def read_changes(
    text: str, normalized: str, changes: Sequence[WordedChange], reference: str, context: Context
) -> list[Reading]:
    """Return a reading for each change; one refusal or question if any of them cannot be made."""
    named = list(changes)
    if not reference:
        named = [name_target_of_it(change, normalized, context) for change in changes]
    is_as_said, changes = named == list(changes), named
    expanded = [new for change in changes for new in expand_change(change, context)]
    expanded = order_by_visibility(expanded, context)
    for change in expanded:
        if problem := find_change_problem(change, context):
            kind: ReadingKind = "ask" if change.kind == "count" else "decline"
            return [Reading(kind, text, message=problem)]
    is_second_motion = bool(SECOND_MOTION.search(normalized)) and any(change.kind == "motion" for change in expanded)
    is_second_motion = is_second_motion and "path" in context.preset.edits
    if any(change.kind == "length" for change in expanded):
        return read_extension(text, expanded, reference, context)
    medium = context.artifacts[int(reference) - 1].medium if reference.isdigit() else context.medium
    if medium == "image" and any(change.kind in MOTION_KINDS for change in expanded):
        return read_animation(text, expanded, reference)
    if reference == "described" or is_second_motion:
        return [Reading("do", text)]
    if (
        is_as_said
        and expanded == changes
        and len(expanded) == 1
        and not reference
        and english_rules.is_plain_wording(text, normalized, load_pattern("edit_form"))
    ):
        if context.is_changed:  # whether the result before it is a clip is not known yet
            return [Reading("do", text)]
        return [Reading("do", text, goal="edit", medium=context.medium or "", reference="current")]
    return [
        Reading("do", change.text, goal="edit", medium=medium or "", reference=place)
        for change, place in zip(expanded, list_places(reference, len(expanded)), strict=True)
    ]


def order_by_visibility(changes: list[WordedChange], context: Context) -> list[WordedChange]:
    """Return changes in an order in which no object ever has the colour of the background, if there is one."""
    if {change.kind for change in changes} != {"background", "recolour"} or context.is_changed:
        return changes
    grounds_last = sorted(changes, key=lambda change: change.kind == "background")
    grounds_first = sorted(changes, key=lambda change: change.kind != "background")
    orders = (changes, grounds_last, grounds_first)
    return next((order for order in orders if stays_visible(read_known_scene(context), order)), changes)


def stays_visible(scene: DescribedScene, changes: Sequence[WordedChange]) -> bool:
    for change in changes:
        scene = change_scene(scene, [change])
        if any(obj.colour == scene.background for obj in scene.objects):
            return False
    return True


def list_places(reference: str, count: int) -> list[str]:
    """Return what each of several changes refers to: the first to what is meant, the others to the result before."""
    return [reference or "current", *["last"] * (count - 1)]


def read_extension(text: str, changes: Sequence[WordedChange], reference: str, context: Context) -> list[Reading]:
    """Return the readings of a request for a longer clip: it may go on otherwise, and other changes follow."""
    if context.medium == "image" and not reference:
        return [Reading("ask", text, message=replies.STILL_LENGTH_QUESTION)]
    others = [change for change in changes if change.kind not in ("length", "motion", "speed", "path")]
    extended = text if not others else replies.EXTENSION_REQUEST
    return [
        build_task_reading(extended, "video-extension", reference),
        *(Reading("do", change.text, goal="edit", medium="video", reference="last") for change in others),
    ]


def read_animation(text: str, changes: Sequence[WordedChange], reference: str) -> list[Reading]:
    """Return the readings of a request to animate a picture, which other changes of it precede."""
    moves = [change.text for change in changes if change.kind in ("motion", "speed", "path")]
    others = [change for change in changes if change.kind not in MOTION_KINDS]
    if not others:
        return [build_task_reading(text, "image-to-video", reference)]
    places = list_places(reference, len(others) + 1)
    readings = [
        Reading("do", change.text, goal="edit", medium="image", reference=place)
        for change, place in zip(others, places, strict=False)
    ]
    return [*readings, build_task_reading(" and ".join(moves) or "animate it", "image-to-video", places[-1])]


def join_motions(parts: Sequence[str], context: Context) -> list[str]:
    """Return the parts of a turn with those in one that say how a picture moves, since its clip is made at once."""
    if context.medium != "image" or "image-to-video" not in context.preset.sampling:
        return list(parts)
    joined = list[str]()
    for part in parts:
        if joined and says_motion(joined[-1]) and says_motion(part):
            joined[-1] = f"{joined[-1]} and {part}"
        else:
            joined.append(part)
    return joined


def says_motion(text: str) -> bool:
    """Return whether all that a text says is that a picture is animated, and how its objects move."""
    tokens = tokenize(text)
    if any(token.get("task") == "image-to-video" for token in tokens):
        return True
    changes = read_edit(tokens, is_still=True).changes
    return bool(changes) and all(
        change.kind in MOTION_KINDS or (change.kind == "resize" and SIZE_MOTION.search(text)) for change in changes
    )


def build_task_reading(text: str, task: ContinuationTask, reference: str = "", last_frame: int = 0) -> Reading:
    """Return the reading of a request for a clip that begins with what there is; a description is left to the words."""
    place = {"": "current", "described": ""}.get(reference, reference)
    return Reading("do", text, goal="edit", medium="video", reference=place, task=task, last_frame=last_frame)


def name_target_of_it(change: WordedChange, normalized: str, context: Context) -> WordedChange:
    """Return a change of "it", where there are several objects, as one of all or of what was named before."""
    if change.target != "it" or change.kind not in CHANGES_OF_OBJECTS or not context.last_request:
        return change
    objects = read_known_scene(context).objects
    is_of_all = ALL_OBJECTS.search(normalized) is not None
    found = find_named_objects(context.last_request, objects) if len(objects) > 1 and not is_of_all else []
    if len(objects) < 2 or (len(found) != 1 and not is_of_all):
        return change
    name = "them" if is_of_all else name_object(found[0], objects)
    return replace(change, text=re.sub(r"\bit\b", name, change.text, count=1), target=name)


def expand_change(change: WordedChange, context: Context) -> list[WordedChange]:
    """Return the changes that make up one change: of each object by itself, or of shape and colour."""
    edits = context.preset.edits
    if change.kind == "replace" and "replace" not in edits:
        scene = read_scene(tokenize(change.text.rpartition(" with ")[2]))
        obj = replace(scene.objects[0])
        shape = f"turn {change.target} into {'an' if (obj.shape or '')[0] in 'aeiou' else 'a'} {obj.shape}"
        parts = [WordedChange("reshape", shape, change.target)]
        renamed = change.target if change.target == "it" else f"the {obj.shape}"
        parts += [WordedChange("recolour", f"make {renamed} {obj.colour}", renamed)] if obj.colour else []
        parts += [WordedChange("resize", f"make {renamed} {obj.size}", renamed)] if obj.size else []
        if obj.motion and not obj.second_motion:
            motion = f"make {renamed} {IMPERATIVE_MOTIONS[obj.motion]}"
            parts.append(WordedChange("motion", motion, renamed))
        return [new for part in parts for new in expand_change(part, context)]
    if change.target == "them" and change.kind in ("recolour", "reshape", "resize", "motion", "speed"):
        names = list_object_names(context)
        if len(names) > 1:
            each = [replace(change, text=change.text.replace("them", name, 1), target=name) for name in names]
            scene = read_current_scene(context)
            return [new for new in each if change_scene(scene, [new]) != scene] or each
        if len(names) == 1 and " " in names[0] and not names[0].endswith("s"):
            return [replace(change, text=change.text.replace("them", "it", 1), target="it")]
    return [change]


def names_places(tokens: Sequence[Token], context: Context) -> bool:
    """Return whether places of several objects that there are already are named: "circle left, square right"."""
    named = {token.get("shape") for token in tokens if token.has("shape")}
    has_place = any(token.has("region", "relation") for token in tokens)
    return has_place and len(named) > 1 and named <= {obj.shape for obj in read_current_scene(context).objects}


def build_scene_of_count(change: WordedChange, context: Context) -> DescribedScene | None:
    """Return the current scene with another number of its objects, if all are alike; None otherwise."""
    scene = read_current_scene(context)
    if len(scene.objects) != 1 or not 1 <= int(change.value) <= load_lexicon().facts.max_objects:
        return None
    return replace(scene, objects=[replace(scene.objects[0], count=int(change.value))], medium=context.medium)


def find_missing_target(changes: Sequence[WordedChange], context: Context) -> str:
    """Return a question if the first change is of a shape that is not there; else ""."""
    named = read_scene(tokenize(changes[0].target)).objects
    if not named or named[0].shape is None or context.is_changed:
        return ""
    shapes = {obj.shape for obj in read_scene(tokenize(context.describe())).objects}
    is_missing = bool(shapes) and named[0].shape not in shapes
    return f"There is no {named[0].shape}: I see {context.describe()}. What should I change?" if is_missing else ""


def find_change_problem(change: WordedChange, context: Context) -> str:
    """Return what the user is told if a change is impossible; "" if it is possible."""
    preset = context.preset
    if change.kind == "count":
        return "I cannot change how many there are. Should I draw it anew, or add or remove one?"
    task = TASK_BY_KIND.get(change.kind)
    if change.kind == "medium" or (change.kind in ("motion", "speed", "path") and context.medium == "image"):
        task = "image-to-video"
    if task:
        is_possible = task in preset.sampling and change.text != "length shorter"
        return (
            ""
            if is_possible
            else replies.build_impossible_reply(task if "shorter" not in change.text else "length", preset)
        )
    if change.kind == "add" and read_scene(tokenize(change.text)).count > load_lexicon().facts.max_objects:
        return f"I can show at most four shapes. {load_lexicon().facts.contents}"
    if change.kind not in preset.edits:
        return replies.build_impossible_reply(change.kind, preset)
    value = change.value
    if change.kind == "recolour" and value not in load_lexicon().facts.object_colours:
        return f"{value.capitalize()} is no colour of my shapes. {load_lexicon().facts.contents}"
    if change.kind == "background" and value not in load_lexicon().facts.backgrounds:
        return f"I cannot draw a {value} background. {load_lexicon().facts.contents}"
    return ""


def read_reversal(
    text: str, normalized: str, tokens: Sequence[Token], reference: str, context: Context
) -> list[Reading] | None:
    """Return the readings of "the other way": the opposite of the clip's motion; None for other requests."""
    if context.medium != "video" or not load_pattern("reversal").search(normalized) or reference:
        return None
    if any(token.has("shape", "plural", "colour", "ground", "direction", "motion") for token in tokens):
        return None
    motions = [obj.motion for obj in read_scene(tokenize(context.describe())).objects if obj.motion in OPPOSITE_MOTIONS]
    if len(set(motions)) != 1:
        return [Reading("ask", text, message=replies.DIRECTION_QUESTION)]
    motion = IMPERATIVE_MOTIONS[OPPOSITE_MOTIONS[motions[0] or ""]]
    return read_changes(text, normalized, [WordedChange("motion", f"make it {motion}", "it")], reference, context)


def correct_background(change: WordedChange, context: Context) -> WordedChange:
    """Return a correction as one of the background, if that was changed last or only it can have the colour."""
    is_ground = change.value not in load_lexicon().facts.object_colours or "background" in context.last_request
    if (
        change.kind == "recolour"
        and change.target == "it"
        and change.value in load_lexicon().facts.backgrounds
        and is_ground
    ):
        return WordedChange("background", f"change the background to {change.value}")
    return change


def read_versions(normalized: str, context: Context) -> list[Reading]:
    """Return the readings of "two versions, one where it is blue and another where it is yellow"; [] for others."""
    match = load_pattern("versions").match(normalized) or load_pattern("versions_by_value").search(normalized)
    if match is None or not context.number:
        return []
    readings = list[Reading]()
    for part in (match[1], match[2]):
        edit = read_edit(tokenize(part), is_still=context.medium == "image")
        readings += read_changes(part, part, edit.changes, str(context.number), context) if edit.changes else []
    return readings if len(readings) == 2 or any(reading.kind != "do" for reading in readings) else []

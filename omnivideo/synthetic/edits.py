"""Edits of scenes by instruction: only what the instruction names changes."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from omnivideo.synthetic.captions import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    MOTION_WORDS,
    SHAPE_WORDS,
    add_article,
    is_group,
    pluralize,
    sample_noun_phrase,
)
from omnivideo.synthetic.facts import ObjectSpec, SceneSpec
from omnivideo.synthetic.scenes import (
    BACKGROUNDS,
    CLIP_FRAMES,
    COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    SceneObject,
    Split,
    find_lattice_points,
    get_initial_size,
    is_clear_of,
    is_in_split,
    sample_object,
    sample_scene,
)

IMAGE_EDITS = ("recolour", "reshape", "add", "remove", "background")
VIDEO_EDITS = (*IMAGE_EDITS, "motion")
MOTION_COMMANDS = {
    "still": ("stay still", "stand still", "stop moving"),
    "left": ("move left", "move to the left", "go left"),
    "right": ("move right", "move to the right", "go right"),
    "up": ("move up", "rise", "go up"),
    "down": ("move down", "fall", "go down"),
    "growing": ("grow", "get bigger"),
    "shrinking": ("shrink", "get smaller"),
}


@dataclass(frozen=True)
class SceneEdit:
    """A source, an instruction and its target; `changed_objects` are the objects that differ, before and after."""

    kind: str
    source: Scene
    target: Scene
    instruction: str
    changed_objects: tuple[SceneObject, ...]

    @property
    def target_spec(self) -> SceneSpec:
        """Return the target's content, as a prompt would describe it."""
        return spec_from_scene(self.target)


def spec_from_scene(scene: Scene) -> SceneSpec:
    """Return a scene's content without sizes and positions, as a prompt would describe it."""
    object_specs = (
        ObjectSpec(obj.shape, obj.colour, None, obj.motion if scene.is_video else None) for obj in scene.objects
    )
    return SceneSpec(tuple(object_specs), background=scene.background)


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
    return rng.choice(choices)


def refer_to_group(rng: random.Random, scene: Scene) -> str:
    """Return words for all objects of a group."""
    shapes = pluralize(rng.choice(SHAPE_WORDS[scene.objects[0].shape]))
    return rng.choice(("them", f"the {shapes}", f"all the {shapes}"))


SceneChange = tuple[Scene, str, tuple[SceneObject, ...]]  # target, instruction, changed objects


def recolour_object(rng: random.Random, scene: Scene) -> SceneChange | None:
    obj = rng.choice(scene.objects)
    excluded = {scene.background, *(other.colour for other in scene.objects if not is_group(scene))}
    colour = rng.choice([name for name in COLOURS if name not in excluded | {obj.colour}])
    word = rng.choice(COLOUR_WORDS[colour])
    targets = scene.objects if is_group(scene) else (obj,)
    reference = refer_to_group(rng, scene) if is_group(scene) else refer_to_object(rng, obj, scene)
    forms = (
        "make {} {}",
        "make {} {}",
        "turn {} {}",
        "paint {} {}",
        "change {} to {}",
        "change the colour of {} to {}",
        "recolour {} to {}",
    )
    return replace_objects(
        scene, {old: replace(old, colour=colour) for old in targets}, rng.choice(forms).format(reference, word)
    )


def reshape_object(rng: random.Random, scene: Scene) -> SceneChange | None:
    if is_group(scene):
        return None
    obj = rng.choice(scene.objects)
    excluded = {other.shape for other in scene.objects}
    shape = rng.choice([name for name in SHAPES if name not in excluded] or [""])
    if not shape:
        return None
    forms = ("turn {} into {}", "change {} into {}", "replace {} with {}", "make {} {}", "transform {} into {}")
    text = rng.choice(forms).format(refer_to_object(rng, obj, scene), add_article(rng.choice(SHAPE_WORDS[shape])))
    return replace_objects(scene, {obj: replace(obj, shape=shape)}, text)


def replace_objects(scene: Scene, replacements: dict[SceneObject, SceneObject], instruction: str) -> SceneChange:
    objects = tuple(replacements.get(obj, obj) for obj in scene.objects)
    return replace(scene, objects=objects), instruction, (*replacements.keys(), *replacements.values())


def add_object(rng: random.Random, scene: Scene) -> SceneChange | None:
    if len(scene.objects) > 2:
        return None
    obj = sample_object(rng, scene.background, scene.is_video, large_probability=0.25)
    if any(obj.shape == other.shape and obj.colour == other.colour for other in scene.objects):
        return None
    placed = place_farthest(obj, scene)
    if placed is None:
        return None
    text = f"{rng.choice(('add', 'add', 'put', 'draw'))} {add_article(sample_noun_phrase(rng, obj, with_size=True))}"
    motion = rng.choice(MOTION_WORDS[obj.motion]) if scene.is_video else ""
    return replace(scene, objects=(*scene.objects, placed)), f"{text} {motion}".strip(), (placed,)


def place_farthest(obj: SceneObject, scene: Scene) -> SceneObject | None:
    """Place the object farthest from the others halfway through a clip; return None if it does not fit."""
    candidates = [replace(obj, x=x, y=y) for x, y in find_lattice_points(obj.size, obj.motion, scene.frame_count)]
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
    forms = ("remove {}", "remove {}", "delete {}", "take away {}", "erase {}", "get rid of {}")
    text = rng.choice(forms).format(refer_to_object(rng, obj, scene))
    remaining_objects = tuple(other for other in scene.objects if other is not obj)
    return replace(scene, objects=remaining_objects), text, (obj,)


def change_background(rng: random.Random, scene: Scene) -> SceneChange | None:
    excluded = {scene.background, *(obj.colour for obj in scene.objects)}
    name = rng.choice([name for name in BACKGROUNDS if name not in excluded])
    forms = (
        "change the background to {}",
        "make the background {}",
        "turn the background {}",
        "put it on a {} background",
        "use a {} background",
        "set the background to {}",
    )
    text = rng.choice(forms).format(rng.choice(BACKGROUND_WORDS[name]))
    return replace(scene, background=name), text, ()


def change_motion(rng: random.Random, scene: Scene) -> SceneChange | None:
    if not scene.is_video or is_group(scene):
        return None
    obj = rng.choice(scene.objects)
    name = rng.choice([name for name in MOTIONS if name != obj.motion])
    moved = replace(obj, motion=name, size=get_initial_size(name, obj.size))
    others = [other for other in scene.objects if other is not obj]
    stays = (obj.x, obj.y) in find_lattice_points(moved.size, name, CLIP_FRAMES)
    if not stays or moved.size != obj.size or not all(is_clear_of(moved, other, CLIP_FRAMES) for other in others):
        return None
    forms = ("make {} {}", "make {} {}", "let {} {}", "now {} should {}", "have {} {} instead")
    text = rng.choice(forms).format(refer_to_object(rng, obj, scene), rng.choice(MOTION_COMMANDS[name]))
    return replace_objects(scene, {obj: moved}, text)


EDIT_MAKERS: dict[str, Callable[[random.Random, Scene], SceneChange | None]] = {
    "recolour": recolour_object,
    "reshape": reshape_object,
    "add": add_object,
    "remove": remove_object,
    "background": change_background,
    "motion": change_motion,
}


def sample_edit(
    rng: random.Random,
    is_video: bool,
    split: Split = "train",
    kinds: Sequence[str] | None = None,
    composed_share: float = 0.0,
) -> SceneEdit:
    """Return an edit of the split; a share `composed_share` of the sources has a composed layout.

    A held-out edit has a held-out object in its target, or in its source if the edit adds or changes no object.
    """
    kinds = kinds or (VIDEO_EDITS if is_video else IMAGE_EDITS)
    kind = rng.choice(kinds)
    while True:
        source = sample_scene(rng, is_video, split if kind in ("remove", "background") else "train", composed_share)
        change = EDIT_MAKERS[kind](rng, source)
        if change and (kind == "remove" or is_in_split(change[0], split)):
            return SceneEdit(kind, source, *change)

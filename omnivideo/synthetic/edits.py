"""Edits of scenes by instruction: only what the instruction names changes."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from omnivideo.synthetic.captions import (
    COLOUR_WORDS,
    SHAPE_WORDS,
    add_article,
    find_region,
    is_group,
)
from omnivideo.synthetic.facts import ObjectSpec, SceneSpec
from omnivideo.synthetic.object_edits import (
    SIZE_COMMANDS,
    SceneChange,
    add_object,
    change_background,
    change_motion,
    change_path,
    change_place,
    change_speed,
    is_possible,
    move_inside,
    recolour_object,
    refer_to_object,
    remove_object,
    replace_object,
    replace_objects,
    reshape_object,
    resize_object,
    swap_objects,
)
from omnivideo.synthetic.scenes import (
    COLOURS,
    SHAPES,
    Scene,
    SceneObject,
    Split,
    is_in_split,
    sample_scene,
)

IMAGE_EDITS = (
    "recolour", "reshape", "add", "remove", "background", "resize", "replace", "swap", "place", "several", "correction",
)  # fmt: skip
VIDEO_EDITS = (*IMAGE_EDITS, "motion", "speed", "path")

# Edits after which no object has another shape, size, colour or motion: only their source can hold a held-out one.
KINDS_THAT_KEEP_OBJECTS = ("remove", "background", "place", "speed")


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
        """Return the target's content, as a prompt would describe it, with the sizes and places that the edit sets."""
        changed = set(self.changed_objects)
        return spec_from_scene(
            self.target,
            sized_objects=changed if self.kind in ("resize", "replace", "several", "correction") else set(),
            placed_objects=changed if self.kind in ("place", "swap") else set(),
        )


def spec_from_scene(
    scene: Scene,
    sized_objects: set[SceneObject] = frozenset(),  # type: ignore[assignment]
    placed_objects: set[SceneObject] = frozenset(),  # type: ignore[assignment]
) -> SceneSpec:
    """Return a scene's content as a prompt would describe it, with size and place of the given objects only."""
    object_specs = []
    for obj in scene.objects:
        object_specs.append(
            ObjectSpec(
                obj.shape,
                obj.colour,
                obj.size if obj in sized_objects else None,
                obj.motion if scene.is_video else None,
                obj.speed if scene.is_video and obj.changes_place else None,
                obj.second_motion if scene.is_video else None,
                find_region(obj) if obj in placed_objects else None,
            )
        )
    return SceneSpec(tuple(object_specs), background=scene.background)


# ---------------------------------------------------------------- several changes


SIMPLE_EDITS: dict[str, Callable[[random.Random, Scene], SceneChange | None]] = {
    "recolour": recolour_object,
    "reshape": reshape_object,
    "resize": resize_object,
    "remove": remove_object,
    "background": change_background,
    "motion": change_motion,
    "speed": change_speed,
    "add": add_object,
}


def change_several(rng: random.Random, scene: Scene) -> SceneChange | None:
    """Apply two edits that one instruction names."""
    kinds = rng.sample(list(SIMPLE_EDITS if scene.is_video else [*list(SIMPLE_EDITS)[:5], "add"]), 2)
    first = SIMPLE_EDITS[kinds[0]](rng, scene)
    if first is None:
        return None
    second = SIMPLE_EDITS[kinds[1]](rng, first[0])
    if second is None or not is_possible(second[0].objects, scene.frame_count):
        return None
    text = f"{first[1]}{rng.choice((' and ', ' and ', ', ', ' and then ', ' and also '))}{second[1]}"
    return second[0], text.replace("and and", "and").replace("also and also", "also"), (*first[2], *second[2])


def correct_edit(rng: random.Random, scene: Scene) -> SceneChange | None:
    """Correct an edit of the wrong object or with the wrong value; the instruction holds both messages."""
    if is_group(scene):
        return None
    if len(scene.objects) < 2 or rng.random() < 0.4:
        return correct_value(rng, scene)
    wrong, right = rng.sample(scene.objects, 2)
    excluded = {scene.background, *(obj.colour for obj in scene.objects)}
    colour = rng.choice([name for name in COLOURS if name not in excluded])
    shape = rng.choice([name for name in SHAPES if name not in {obj.shape for obj in scene.objects}] or [""])
    commands = [(f"make {{}} {rng.choice(COLOUR_WORDS[colour])}", replace(right, colour=colour))]
    if shape:
        commands.append((f"turn {{}} into {add_article(shape)}", replace(right, shape=shape)))
    if right.motion not in ("growing", "shrinking"):
        size = "small" if right.size == "large" else "large"
        commands.append((f"make {{}} {SIZE_COMMANDS[size][0]}", move_inside(replace(right, size=size))))
    command, new = rng.choice(commands)
    forms = ["no, i meant {}", "i meant {}", "not that one, {}", "no, {}", "sorry, i mean {}", "wrong one, {} please"]
    if len(scene.objects) == 2:
        forms += ["no, the other one", "the other one", "not that one, the other one", "i meant the other one"]
    correction = rng.choice(forms).format(refer_to_object(rng, right, scene))
    return replace_objects(scene, {right: new}, f"{command.format(refer_to_object(rng, wrong, scene))}. {correction}")


def correct_value(rng: random.Random, scene: Scene) -> SceneChange | None:
    """Correct the colour or the shape that an edit gave to an object."""
    obj = rng.choice(scene.objects)
    reference = refer_to_object(rng, obj, scene)
    free_shapes = [name for name in SHAPES if name not in {other.shape for other in scene.objects}]
    if rng.random() < 0.7 or len(free_shapes) < 2:
        excluded = {scene.background, *(other.colour for other in scene.objects)}
        wrong, right = rng.sample([name for name in COLOURS if name not in excluded], 2)
        command, new = f"make {reference} {rng.choice(COLOUR_WORDS[wrong])}", replace(obj, colour=right)
        words, wrong_words = rng.choice(COLOUR_WORDS[right]), wrong
    else:
        wrong, right = rng.sample(free_shapes, 2)
        command, new = f"turn {reference} into {add_article(wrong)}", replace(obj, shape=right)
        words, wrong_words = add_article(rng.choice(SHAPE_WORDS[right])), add_article(wrong)
    forms = ("no, {0}", "i meant {0}", "not {1}, {0}", "no, make it {0}", "{0}, not {1}", "sorry, {0}")
    return replace_objects(scene, {obj: new}, f"{command}. {rng.choice(forms).format(words, wrong_words)}")


EDIT_MAKERS: dict[str, Callable[[random.Random, Scene], SceneChange | None]] = {
    **SIMPLE_EDITS,
    "replace": replace_object,
    "swap": swap_objects,
    "place": change_place,
    "path": change_path,
    "several": change_several,
    "correction": correct_edit,
}


def sample_edit(
    rng: random.Random,
    is_video: bool,
    split: Split = "train",
    kinds: Sequence[str] | None = None,
    composed_share: float = 0.0,
    frame_count: int | None = None,
) -> SceneEdit:
    """Return an edit of the split; a share `composed_share` of the sources has a composed layout.

    A held-out edit has a held-out object in its target, or in its source if the edit adds or changes no object.
    """
    kinds = kinds or (VIDEO_EDITS if is_video else IMAGE_EDITS)
    kind = rng.choice(kinds)
    while True:
        source_split = split if kind in KINDS_THAT_KEEP_OBJECTS else "train"
        source = sample_scene(rng, is_video, source_split, composed_share, frame_count)
        change = EDIT_MAKERS[kind](rng, source)
        if change and (kind == "remove" or is_in_split(change[0], split)):
            return SceneEdit(kind, source, *change)

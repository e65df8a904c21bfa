"""The prompts of an evaluation: held-out combinations in GenEval's six categories, and motion for clips."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from omnivideo.synthetic.captions import (
    BACKGROUND_PHRASES,
    BACKGROUND_WORDS,
    MOTION_WORDS,
    NUMBER_WORDS,
    RELATION_WORDS,
    add_article,
    find_relation,
    sample_noun_phrase,
)
from omnivideo.synthetic.facts import ObjectSpec, SceneSpec
from omnivideo.synthetic.scenes import (
    BACKGROUNDS,
    CLIP_FRAMES,
    Scene,
    SceneObject,
    is_in_split,
    place_randomly,
    sample_object,
)

IMAGE_CATEGORIES = ("single", "two", "counting", "colours", "position", "colour attribution")
CATEGORIES = (*IMAGE_CATEGORIES, "motion")


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt of a category, with the content that a clip must show to meet it."""

    category: str
    text: str
    scene_spec: SceneSpec
    is_video: bool = False


def sample_objects(rng: random.Random, category: str, background: str) -> list[SceneObject]:
    """Return objects for a category: one, a group, or two that differ in shape and in colour."""
    video = category == "motion"
    if category in ("single", "colours", "motion"):
        return [sample_object(rng, background, video)]
    if category == "counting":
        return [sample_object(rng, background, video, large_probability=0.0)] * rng.randint(1, 4)
    first_object = sample_object(rng, background, video, large_probability=0.3)
    while True:
        second_object = sample_object(rng, background, video, large_probability=0.3)
        if second_object.shape != first_object.shape and second_object.colour != first_object.colour:
            return [first_object, second_object]


def sample_held_out_scene(rng: random.Random, category: str) -> Scene:
    """Return a scene of the category with at least one held-out object."""
    while True:
        background = rng.choice(list(BACKGROUNDS))
        frames = CLIP_FRAMES if category == "motion" else 1
        placed = place_randomly(rng, sample_objects(rng, category, background), frames)
        if placed is None:
            continue
        scene = Scene(background, placed, frames)
        if is_in_split(scene, "held_out") and (category != "position" or find_relation(*placed)):
            return scene


def describe_object(rng: random.Random, scene_object: SceneObject, plural: bool = False) -> str:
    return sample_noun_phrase(
        rng, scene_object, with_size=scene_object.motion not in ("growing", "shrinking"), is_plural=plural
    )


def describe_scene(rng: random.Random, category: str, scene: Scene) -> str:
    """Describe the objects with size, colour and shape, so that the text contains the held-out combination."""
    first = scene.objects[0]
    if category == "counting":
        count = len(scene.objects)
        return (
            add_article(describe_object(rng, first))
            if count == 1
            else f"{NUMBER_WORDS[count]} {describe_object(rng, first, plural=True)}"
        )
    if category == "motion":
        return f"{add_article(describe_object(rng, first))} {rng.choice(MOTION_WORDS[first.motion])}".strip()
    if len(scene.objects) == 1:
        return add_article(describe_object(rng, first))
    joining_words = "and"
    if category == "position":
        relation = find_relation(*scene.objects)
        assert relation is not None
        joining_words = rng.choice(RELATION_WORDS[relation])
    first_phrase = add_article(describe_object(rng, first))
    return f"{first_phrase} {joining_words} {add_article(describe_object(rng, scene.objects[1]))}"


OBJECT_SPEC_BUILDERS: dict[str, Callable[[SceneObject], ObjectSpec]] = {
    "single": lambda obj: ObjectSpec(obj.shape),
    "two": lambda obj: ObjectSpec(obj.shape),
    "counting": lambda obj: ObjectSpec(obj.shape),
    "colours": lambda obj: ObjectSpec(None, obj.colour),
    "position": lambda obj: ObjectSpec(obj.shape),
    "colour attribution": lambda obj: ObjectSpec(obj.shape, obj.colour),
    "motion": lambda obj: ObjectSpec(None, obj.colour, None, obj.motion),
}


def sample_prompt(rng: random.Random, category: str) -> EvaluationPrompt:
    scene = sample_held_out_scene(rng, category)
    text = describe_scene(rng, category, scene)
    if rng.random() < 0.5:
        text += " " + rng.choice(BACKGROUND_PHRASES).format(rng.choice(BACKGROUND_WORDS[scene.background]))
    scene_spec = SceneSpec(tuple(OBJECT_SPEC_BUILDERS[category](obj) for obj in scene.objects))
    if category == "position":
        scene_spec = replace(scene_spec, relation=find_relation(*scene.objects))
    return EvaluationPrompt(category, text, scene_spec, is_video=scene.is_video)


def sample_prompts(count: int, categories: Sequence[str] = CATEGORIES) -> list[EvaluationPrompt]:
    """Return `count` prompts of each category, the same in every call."""
    prompts = list[EvaluationPrompt]()
    for category in categories:
        rng = random.Random(f"evaluation/{category}")
        prompts += [sample_prompt(rng, category) for _ in range(count)]
    return prompts

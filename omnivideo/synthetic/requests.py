"""Requests for images, videos, edits and continuations in a user's words, each with the scene that fulfils it."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import numpy as np

from omnivideo.contracts import Medium, get_task_medium, is_editing_task
from omnivideo.presets import ContinuationTask, StandardTask, Task
from omnivideo.synthetic.captions import (
    CLIP_PREFIXES,
    STILL_PREFIXES,
    describe_scene,
    sample_caption,
    to_canonical_text,
)
from omnivideo.synthetic.edits import EDIT_MAKERS, sample_edit
from omnivideo.synthetic.facts import SceneSpec
from omnivideo.synthetic.indirect_requests import sample_indirect_request
from omnivideo.synthetic.object_edits import MOTION_COMMANDS, can_move, is_possible, refer_to_object
from omnivideo.synthetic.rendering import render_scene
from omnivideo.synthetic.scenes import (
    CLIP_FRAMES,
    EXTENSION_FRAMES,
    LONG_CLIP_FRAMES,
    MOTIONS,
    Scene,
    SceneObject,
    Split,
    get_initial_size,
    is_in_split,
    sample_scene,
)

CONTINUATION_TASKS: tuple[ContinuationTask, ...] = get_args(ContinuationTask)
REQUEST_TEMPLATES = (
    "{}", "{}", "{}", "draw {}", "generate {}", "make {}", "create {}", "show me {}", "i want {}", "please draw {}",
    "can you make {}?", "i would like to see {}",
)  # fmt: skip
LONG_CLIP_TEMPLATES = ("a long {}", "a two second {}", "a 2 second {}", "a longer {}")
REWRITE_PROBABILITY = 0.25  # share of requests in the canonical wording of think mode
EDIT_REWRITE_PROBABILITY = 0.7  # think mode rewrites nearly all edits
COMPOSED_SHARE = 0.9  # share of composed scenes for generation; edits have 0.5, since their source shows the layout


def get_medium_prefix(is_video: bool) -> str:
    return "video of " if is_video else "picture of "


def phrase_request(rng: random.Random, text: str) -> str:
    """Return a prompt unchanged, or in a sentence that requests it."""
    return rng.choice(REQUEST_TEMPLATES).format(text)


def phrase_still_request(rng: random.Random, text: str) -> str:
    """Return a request for an image."""
    names_medium = text.startswith(STILL_PREFIXES) or rng.random() < 0.7
    return phrase_request(rng, text if names_medium else rng.choice(STILL_PREFIXES) + text)


def phrase_clip_request(rng: random.Random, text: str, has_motion: bool) -> str:
    """Return a request for a video; a text with motion often does not name the medium."""
    if text.startswith(CLIP_PREFIXES) or (has_motion and rng.random() < 0.7):
        return phrase_request(rng, text)
    return phrase_request(rng, rng.choice(CLIP_PREFIXES) + text)


def has_moving_object(spec: SceneSpec) -> bool:
    return any(obj.motion not in (None, "still") for obj in spec.objects)


def phrase_scene_request(rng: random.Random, text: str, scene: Scene) -> str:
    """Return a request for a scene whose caption is `text`."""
    if not scene.is_video:
        return phrase_still_request(rng, text)
    return phrase_clip_request(rng, text, any(obj.motion != "still" for obj in scene.objects))


def make_caption_prompt(rng: random.Random, is_video: bool) -> tuple[str, str]:
    """Return a direct request for an image or a video, and its plain restatement."""
    scene = sample_scene(rng, is_video)
    caption = sample_caption(rng, scene)
    text = phrase_scene_request(rng, caption.text, scene)
    return text, get_medium_prefix(is_video) + to_canonical_text(caption.scene_spec)


def make_indirect_prompt(rng: random.Random, is_video: bool) -> tuple[str, str, str]:
    """Return an indirect request, the reasoning that solves it, and its plain restatement."""
    request = sample_indirect_request(rng, is_video)
    if is_video:
        text = phrase_clip_request(rng, request.prompt, has_moving_object(request.scene_spec))
    else:
        text = phrase_still_request(rng, request.prompt)
    return text, request.reasoning, get_medium_prefix(is_video) + request.rewrite


@dataclass(frozen=True)
class SceneRequest:
    """A request for one of the generative tasks.

    `source` is the scene to edit, to animate, to continue or to begin with, None for generation; `last_frame` is the
    still to end with. The target of a continuation begins with the source's last frame.
    """

    task: Task
    text: str
    target: Scene
    source: Scene | None = None
    last_frame: Scene | None = None

    @property
    def medium(self) -> Medium:
        return "video" if self.target.is_video else "image"

    @property
    def frame_count(self) -> int:
        """Return the number of frames of the result; a continued clip has its source in front."""
        given = self.source.frame_count - 1 if self.task == "video-extension" and self.source else 0
        return given + self.target.frame_count

    @property
    def given_frame_count(self) -> int:
        """Return the number of frames of the result that the source gives; 0 for generation and edits."""
        return self.source.frame_count if self.task in CONTINUATION_TASKS and self.source else 0

    def render_target(self) -> np.ndarray:
        """Return the pixels of the result, uint8 [F, 64, 64, 3]; a continued clip comes with its source in front."""
        target = render_scene(self.target)
        if self.task != "video-extension":
            return target
        assert self.source is not None
        return np.concatenate([render_scene(self.source), target[1:]])


def restate_scene(scene: Scene, *, with_places: bool = False) -> str:
    """Return the plain restatement of a request for a scene."""
    return get_medium_prefix(scene.is_video) + describe_scene(scene, with_places=with_places)


def sample_request(rng: random.Random, task: StandardTask, frame_count: int | None = None) -> SceneRequest:
    """Return a request for generation or for an edit; a clip has 9 frames unless `frame_count` is given."""
    is_video = get_task_medium(task) == "video"
    if is_editing_task(task):
        edit = sample_edit(rng, is_video, composed_share=0.5, frame_count=frame_count)
        is_rewritten = rng.random() < EDIT_REWRITE_PROBABILITY
        text = restate_scene(edit.target, with_places=True) if is_rewritten else edit.instruction
        return SceneRequest(task, text, edit.target, edit.source)
    scene = sample_scene(rng, is_video, composed_share=COMPOSED_SHARE, frame_count=frame_count)
    caption = sample_caption(rng, scene, is_composed=True)
    if rng.random() < REWRITE_PROBABILITY:
        return SceneRequest(task, get_medium_prefix(is_video) + to_canonical_text(caption.scene_spec), scene)
    return SceneRequest(task, phrase_scene_request(rng, caption.text, scene), scene)


def sample_requests(seed: int, task: Task, count: int, frame_count: int | None = None) -> list[SceneRequest]:
    """Return the same list of requests for the same arguments."""
    rng = random.Random(f"requests/{seed}/{task}/{frame_count}" if frame_count else f"requests/{seed}/{task}")
    if task == "image-to-video" or task == "video-extension" or task == "keyframes-to-video":
        return [sample_continuation_request(rng, task) for _ in range(count)]
    return [sample_request(rng, task, frame_count) for _ in range(count)]


# ---------------------------------------------------------------- clips that begin with given frames

EXTENSION_PHRASES = (
    "continue", "continue it", "make it longer", "extend it", "extend the clip", "keep going", "longer please",
    "what happens next?", "show what happens next", "go on", "let it go on", "add another second",
)  # fmt: skip
ANIMATION_TEMPLATES = (
    "animate it: {}", "bring it to life, {}", "turn it into a video in which {}", "make a clip of it where {}", "{}",
    "now as a video: {}", "animate the picture so that {}",
)  # fmt: skip
KEYFRAMES_PHRASES = (
    "start with the first picture and end with the second", "a clip from the first picture to the second",
    "go from the first picture to the second one", "a video that begins like this and ends like that",
)  # fmt: skip


def sample_continuation_request(
    rng: random.Random,
    task: ContinuationTask,
    rewrite_probability: float = EDIT_REWRITE_PROBABILITY,
    split: Split = "train",
) -> SceneRequest:
    """Return a request for a clip that begins with a still or a clip, or with one still and ends with another.

    In training nothing that is shown or generated has a held-out object; a held-out request generates one.
    """
    samplers: dict[ContinuationTask, Callable[[random.Random], SceneRequest]] = {
        "image-to-video": sample_animation_request,
        "video-extension": sample_extension_request,
        "keyframes-to-video": partial(sample_keyframes_request, split=split),  # the motions are those of the scene
    }
    while True:
        request = samplers[task](rng)
        scenes = [scene for scene in (request.target, request.source, request.last_frame) if scene is not None]
        if is_in_split(request.target, split) and (
            split == "held_out" or all(is_in_split(scene, "train") for scene in scenes)
        ):
            break
    if rng.random() < rewrite_probability:
        return replace(request, text=restate_scene(request.target, with_places=True))
    return request


def sample_animation_request(rng: random.Random) -> SceneRequest:
    """Return a request to animate a still: one or two of its objects begin to move."""
    while True:
        still = sample_scene(rng, is_video=False, composed_share=0.5)
        if len({(obj.shape, obj.colour) for obj in still.objects}) < len(still.objects):
            continue
        movers = rng.sample(still.objects, min(len(still.objects), rng.choice((1, 1, 2))))
        moved = {obj: new for obj in movers if (new := sample_new_motion(rng, obj))}
        target = Scene(still.background, tuple(moved.get(obj, obj) for obj in still.objects), CLIP_FRAMES)
        if len(moved) < len(movers) or not is_possible(target.objects, CLIP_FRAMES):
            continue
        clauses = [
            f"{refer_to_object(rng, obj, still)} should {rng.choice(MOTION_COMMANDS[new.motion])}"
            if rng.random() < 0.5
            else f"make {refer_to_object(rng, obj, still)} {rng.choice(MOTION_COMMANDS[new.motion])}"
            for obj, new in moved.items()
        ]
        text = rng.choice(ANIMATION_TEMPLATES).format(" and ".join(clauses))
        return SceneRequest("image-to-video", text, target, still)


def sample_new_motion(rng: random.Random, obj: SceneObject) -> SceneObject | None:
    """Return the object with another motion that it can make from its place, or None if the drawn one is impossible."""
    motion = rng.choice([name for name in MOTIONS if name != obj.motion])
    if get_initial_size(motion, obj.size) != obj.size:
        return None
    moved = SceneObject(obj.shape, obj.colour, obj.size, motion, obj.x, obj.y)
    return moved if can_move(moved, CLIP_FRAMES) else None


def sample_extension_request(rng: random.Random) -> SceneRequest:
    """Return a request to continue a clip of 9 frames by 8: as it was, or with one object in another motion."""
    while True:
        source = sample_scene(rng, is_video=True, composed_share=0.5, frame_count=LONG_CLIP_FRAMES)
        source = source.take_frames(CLIP_FRAMES)
        target = source.continue_from(CLIP_FRAMES - 1, EXTENSION_FRAMES + 1)
        text = rng.choice(EXTENSION_PHRASES)
        if rng.random() < 0.4:
            change = EDIT_MAKERS["motion"](rng, target)
            if change is None:
                continue
            target, text = (
                change[0],
                rng.choice(("then {}", "{} next", "and then {}", "continue: {}")).format(change[1]),
            )
        return SceneRequest("video-extension", text, target, source)


def sample_keyframes_request(rng: random.Random, split: Split) -> SceneRequest:
    """Return a request for the clip between two stills: its first and its last frame."""
    target = sample_scene(rng, is_video=True, split=split, composed_share=0.5)
    return SceneRequest(
        "keyframes-to-video", rng.choice(KEYFRAMES_PHRASES), target, target.freeze(0), target.freeze(CLIP_FRAMES - 1)
    )

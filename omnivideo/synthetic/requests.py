"""Requests for images, videos and edits in a user's words, each with the scene that fulfils it."""

import random
from dataclasses import dataclass

from omnivideo.contracts import Medium, get_task_medium, is_editing_task
from omnivideo.presets import Task
from omnivideo.synthetic.captions import (
    CLIP_PREFIXES,
    STILL_PREFIXES,
    describe_scene,
    sample_caption,
    to_canonical_text,
)
from omnivideo.synthetic.edits import sample_edit
from omnivideo.synthetic.facts import SceneSpec
from omnivideo.synthetic.indirect_requests import sample_indirect_request
from omnivideo.synthetic.scenes import Scene, sample_scene

REQUEST_TEMPLATES = (
    "{}", "{}", "{}", "draw {}", "generate {}", "make {}", "create {}", "show me {}", "i want {}", "please draw {}",
    "can you make {}?", "i would like to see {}",
)  # fmt: skip
REWRITE_PROBABILITY = 0.25  # share of requests in the canonical wording of think mode
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
    """A request for one of the generative tasks. `source` is the scene to edit, None for generation."""

    task: Task
    text: str
    target: Scene
    source: Scene | None = None

    @property
    def medium(self) -> Medium:
        return "video" if self.target.is_video else "image"


def sample_request(rng: random.Random, task: Task) -> SceneRequest:
    is_video = get_task_medium(task) == "video"
    is_rewritten = rng.random() < REWRITE_PROBABILITY
    if is_editing_task(task):
        edit = sample_edit(rng, is_video, composed_share=0.5)
        text = get_medium_prefix(is_video) + describe_scene(edit.target) if is_rewritten else edit.instruction
        return SceneRequest(task, text, edit.target, edit.source)
    scene = sample_scene(rng, is_video, composed_share=COMPOSED_SHARE)
    caption = sample_caption(rng, scene, is_composed=True)
    if is_rewritten:
        return SceneRequest(task, get_medium_prefix(is_video) + to_canonical_text(caption.scene_spec), scene)
    return SceneRequest(task, phrase_scene_request(rng, caption.text, scene), scene)


def sample_requests(seed: int, task: Task, count: int) -> list[SceneRequest]:
    """Return the same list of requests for the same arguments."""
    rng = random.Random(f"requests/{seed}/{task}")
    return [sample_request(rng, task) for _ in range(count)]

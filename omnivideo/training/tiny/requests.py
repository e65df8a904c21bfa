"""Requests of the four generative tasks, as the user would say them, with the scene that answers them.

A quarter of them are said as think mode rewrites them: the plain description of what is to be seen.
"""

import random
from dataclasses import dataclass
from typing import Literal

from omnivideo.models.mllm import MLLMMessage
from omnivideo.synthetic.captions import describe_scene, sample_caption, to_canonical_text
from omnivideo.synthetic.edits import sample_edit
from omnivideo.synthetic.scenes import Scene, sample_scene
from omnivideo.training.tiny.mllm import get_medium_prefix, media_from_scene, phrase_clip_request, phrase_still_request

Task = Literal["text-to-image", "text-to-video", "image-editing", "video-editing"]
TASKS: tuple[Task, ...] = ("text-to-image", "text-to-video", "image-editing", "video-editing")

REWRITE_PROBABILITY = 0.25
COMPOSED_SHARE = 0.9  # of the scenes that are generated; of those that are edited, half: there the source says where


@dataclass(frozen=True)
class TrainingRequest:
    """What is said (and shown) to the model, and the target; `source` only where something is edited."""

    task: Task
    text: str
    target: Scene
    source: Scene | None = None

    @property
    def medium(self) -> Literal["image", "video"]:
        return "video" if self.target.is_video else "image"

    @property
    def message(self) -> MLLMMessage:
        return MLLMMessage(self.text, () if self.source is None else (media_from_scene(self.source),))


def sample_request(rng: random.Random, task: Task) -> TrainingRequest:
    is_video = task in ("text-to-video", "video-editing")
    is_rewritten = rng.random() < REWRITE_PROBABILITY
    if task in ("image-editing", "video-editing"):
        edit = sample_edit(rng, is_video, composed_share=0.5)
        text = get_medium_prefix(is_video) + describe_scene(edit.target) if is_rewritten else edit.instruction
        return TrainingRequest(task, text, edit.target, edit.source)
    scene = sample_scene(rng, is_video, composed_share=COMPOSED_SHARE)
    caption = sample_caption(rng, scene, is_composed=True)
    if is_rewritten:
        return TrainingRequest(task, get_medium_prefix(is_video) + to_canonical_text(caption.scene_spec), scene)
    has_motion = any(obj.motion != "still" for obj in scene.objects)
    return TrainingRequest(
        task,
        phrase_clip_request(rng, caption.text, has_motion) if is_video else phrase_still_request(rng, caption.text),
        scene,
    )


def sample_requests(seed: int, task: Task, count: int) -> list[TrainingRequest]:
    """The same list for the same arguments."""
    rng = random.Random(f"requests/{seed}/{task}")
    return [sample_request(rng, task) for _ in range(count)]

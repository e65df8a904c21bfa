"""Requests of the four generative tasks, as the user would say them, with the scene that answers them.

A quarter of them are said as think mode rewrites them: the plain description of what is to be seen.
"""

import random
from dataclasses import dataclass
from typing import Literal

from omnivideo.models.mllm import Message
from omnivideo.training.edits import random_edit
from omnivideo.training.language import caption, description, plain
from omnivideo.training.recipes.mllm import clip_prompt, media_of, medium, still_prompt
from omnivideo.training.world import Scene, random_scene

Task = Literal["text-to-image", "text-to-video", "image-editing", "video-editing"]
TASKS: tuple[Task, ...] = ("text-to-image", "text-to-video", "image-editing", "video-editing")

REWRITTEN = 0.25
COMPOSED = 0.9  # of the scenes that are generated; of those that are edited, half: there the source says where


@dataclass(frozen=True)
class Request:
    """What is said (and shown) to the model, and the target; `source` only where something is edited."""

    task: Task
    text: str
    target: Scene
    source: Scene | None = None

    @property
    def kind(self) -> Literal["image", "video"]:
        return "video" if self.target.is_video else "image"

    @property
    def message(self) -> Message:
        return Message(self.text, () if self.source is None else (media_of(self.source),))


def random_request(rng: random.Random, task: Task) -> Request:
    video = task in ("text-to-video", "video-editing")
    rewritten = rng.random() < REWRITTEN
    if task in ("image-editing", "video-editing"):
        edit = random_edit(rng, video, composed=0.5)
        text = medium(video) + description(edit.target) if rewritten else edit.instruction
        return Request(task, text, edit.target, edit.source)
    scene = random_scene(rng, video, composed=COMPOSED)
    said = caption(rng, scene, composed=True)
    if rewritten:
        return Request(task, medium(video) + plain(said.demand), scene)
    moves = any(thing.motion != "still" for thing in scene.things)
    return Request(task, clip_prompt(rng, said.text, moves) if video else still_prompt(rng, said.text), scene)


def requests(seed: int, task: Task, count: int) -> list[Request]:
    """The same list for the same arguments."""
    rng = random.Random(f"requests/{seed}/{task}")
    return [random_request(rng, task) for _ in range(count)]

"""The Python SDK in-process: one preset, loaded once, that generates, edits and understands."""

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from omnivideo.backends.decoder.painter import manifest_of
from omnivideo.backends.decoder.pipeline import Clip, draw
from omnivideo.backends.decoder.video import check_output, fit, read_media, write_media
from omnivideo.backends.media import encoded
from omnivideo.batch import Outcome, items, run
from omnivideo.contracts import Artifact, Manifest, Routed, Settings, Step, check_prompt, settings
from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.models import checkpoint
from omnivideo.models.mllm import Media, Message, answer, route
from omnivideo.models.omni import Omni
from omnivideo.presets import Task, preset
from omnivideo.settings import service
from omnivideo.storage.local import LocalStore

if TYPE_CHECKING:
    from omnivideo.agent.thread import Thread
    from omnivideo.conversations import Conversations

OnStep = Callable[[Step], None]


def nothing(step: Step) -> None:
    """The default listener."""


@dataclass(frozen=True)
class Result:
    """A clip [F, H, W, 3] or a still (F = 1), with the manifest of how it came to be."""

    frames: np.ndarray
    manifest: Manifest

    def _repr_html_(self) -> str:
        """How a notebook shows it: the clip itself, looping."""
        data, suffix = encoded(self.frames, self.manifest.settings.fps)
        source = f"data:{'video/mp4' if suffix == 'mp4' else 'image/png'};base64,{base64.b64encode(data).decode()}"
        if suffix == "png":
            return f'<img src="{source}" width="256">'
        return f'<video src="{source}" width="256" controls loop autoplay muted></video>'

    def save(self, path: str | Path) -> Path:
        """Writes the media by the file's ending, and the manifest beside it as JSON; both or neither."""
        path = Path(path)
        check_output(path, len(self.frames))
        write_media(path, self.frames, self.manifest.settings.fps)
        beside = path.with_name(path.name + ".json")
        partial = beside.with_name(f".{beside.name}.partial")
        try:
            partial.write_text(json.dumps(self.manifest.model_dump(), indent=2) + "\n")
            os.replace(partial, beside)
        except OSError as error:
            path.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)
            raise InvalidInput("output", "the manifest cannot be written beside it") from error
        return path


class Studio:
    """A model in this process.

    `weights` is a folder in our layout, by default the shipped one of the preset; `device` is "auto" (a GPU where
    there is one), "cpu" or "cuda:N"; `home` keeps threads and their artifacts (default: OMNIVIDEO_HOME, or a folder
    of the user's).  Raises CheckpointError where weights are missing or do not fit.
    """

    def __init__(
        self,
        preset: str = "tiny",
        weights: str | Path | None = None,
        device: str = "auto",
        home: str | Path | None = None,
    ):
        self.settings = service(home=home)
        self.folder = Path(weights) if weights else shipped(preset)
        self.omni: Omni = checkpoint.load(self.folder, pick_device(device))
        self.digest = checkpoint.weights_digest(self.folder)

    @cached_property
    def conversations(self) -> "Conversations":
        """The threads of this home; LangGraph is loaded, and the folder made, with the first use only."""
        from omnivideo.wiring import in_process

        return in_process(self.omni, self.digest, self.settings)

    def thread(self, name: str | None = None, create: bool = False) -> "Thread":
        """A conversation: a new one, or the one of that id (made if `create`)."""
        return self.conversations.thread(name, create)

    def file(self, artifact: Artifact) -> Path:
        """Where a thread's artifact lies."""
        return LocalStore(self.settings.home / "store").path(artifact.key)

    def replay(self, artifact: Artifact) -> str:
        """Draws a kept artifact again from its manifest; the key of what came out (the same, on the same machine)."""
        return self.conversations.replay(artifact)

    def batch(self, prompts: Iterable[str | dict], folder: str | Path) -> Iterator[Outcome]:
        """Draws each prompt into the folder, with a line in its results.jsonl; run again, it does what is left."""
        yield from run(self, items(prompts), Path(folder))

    def route(self, prompt: str, source: str | Path | None = None) -> Routed:
        """What the model takes the request for: text, image or video, with the probability."""
        media = () if source is None else (self.look(source),)
        message = Message(check_prompt("prompt", prompt), media)
        return route(self.omni.mllm, self.omni.mllm_tokenizer, message, self.omni.pixels)

    def generate(self, prompt: str, *, image: bool | None = None, on_step: OnStep = nothing, **given: object) -> Result:
        """A clip, or a still if `image`; where `image` is None the model's own routing decides.

        `given` may hold width, height, frames, fps, steps, guidance_scale, flow_shift, negative_prompt and seed;
        what it does not name comes from the preset.
        """
        prompt = check_prompt("prompt", prompt)
        if image is None:
            image = self.route(prompt).kind == "image" if given.get("frames") is None else given["frames"] == 1
        task: Task = "text-to-image" if image else "text-to-video"
        return self.run(prompt, settings(self.omni.preset, task, **given), None, None, on_step)

    def edit(self, source: str | Path, instruction: str, *, on_step: OnStep = nothing, **given: object) -> Result:
        """The source changed as told; what is not named stays.  An image stays an image, a clip a clip."""
        instruction = check_prompt("instruction", instruction)
        media = read_media(source)
        task: Task = "image-editing" if media.kind == "image" else "video-editing"
        chosen = settings(self.omni.preset, task, **given)
        frames = fit(media, chosen.width, chosen.height, chosen.frames, chosen.fps)
        return self.run(instruction, chosen, frames, Path(source).name, on_step)

    def understand(
        self,
        source: str | Path,
        question: str,
        *,
        on_text: Callable[[str], None] = lambda piece: None,
        temperature: float = 0.2,
        top_p: float = 0.6,
        seed: int = 0,
    ) -> str:
        """The answer to a question about an image or a clip; `on_text` is told each piece as it comes."""
        message = Message(check_prompt("question", question), (self.look(source),))
        pieces = []
        for piece in answer(
            self.omni.mllm,
            self.omni.mllm_tokenizer,
            message,
            self.omni.pixels,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        ):
            pieces.append(piece)
            on_text(piece)
        return "".join(pieces).strip()

    def look(self, source: str | Path) -> Media:
        """A source as the MLLM takes it."""
        media = read_media(source)
        return Media(media.frames, media.fps or 1.0, media.kind == "video")

    def run(
        self, prompt: str, chosen: Settings, source: np.ndarray | None, name: str | None, on_step: OnStep
    ) -> Result:
        for event in draw(self.omni, prompt, chosen, source):
            if isinstance(event, Clip):
                return Result(event.frames, manifest_of(self.omni, self.digest, prompt, chosen, event.seconds, name))
            on_step(event.step)
        raise AssertionError("draw ends with a clip")


def shipped(name: str) -> Path:
    """The folder of a preset's shipped weights; raises where the preset is unknown or ships none."""
    folder = checkpoint.SHIPPED / preset(name).name
    if not (folder / checkpoint.INDEX).is_file():
        raise CheckpointError(f"preset {name!r} ships no weights; give a folder of them (--weights)")
    return folder


def pick_device(name: str) -> torch.device:
    """ "auto" is the first GPU, else the CPU; raises InvalidInput for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InvalidInput("device", f"{name!r} is not here; use auto, cpu or cuda:N") from None
    return device

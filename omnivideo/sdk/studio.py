"""The SDK in this process: one preset, loaded once, that generates, edits and understands."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omnivideo.backends.decoder.pipeline import GeneratedClip, generate_clip
from omnivideo.backends.decoder.renderer import build_manifest, identify_model
from omnivideo.backends.mllm.media import read_mllm_media
from omnivideo.contracts import (
    Artifact,
    ModelIdentity,
    Route,
    SamplingParams,
    StepProgress,
    get_editing_task,
    get_generation_task,
    resolve_sampling_params,
)
from omnivideo.cpu_threads import configure_cpu_threads
from omnivideo.media.read import measure_media, read_fitted_media
from omnivideo.media.sound import SoundSource
from omnivideo.models.device import pick_device
from omnivideo.models.mllm import MLLMMedia, MLLMMessage
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.text_limits import TokenLimits
from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.digests import compute_folder_digest
from omnivideo.models.weights.shipped import check_preset, find_shipped_weights
from omnivideo.presets.shapes import get_file_length
from omnivideo.sdk.batch import BatchOutcome, run_batch
from omnivideo.sdk.batch_items import parse_items
from omnivideo.sdk.result import Result
from omnivideo.settings import load_settings
from omnivideo.startup import pause_collection
from omnivideo.storage.objects.local import LocalObjectStore

if TYPE_CHECKING:
    from omnivideo.agent.conversations import Conversations
    from omnivideo.agent.thread import Thread

DEFAULT_PRESET = "tiny"
StepCallback = Callable[[StepProgress], None]


def ignore_step(step: StepProgress) -> None:
    """Do nothing; the default of `on_step`."""


class Studio:
    """A model in this process.

    `weights` is a folder in our format, by default the preset's shipped weights. `device` is "auto" (a GPU if there is
    one), "cpu" or "cuda:N". `home` is the folder of threads and their artifacts, by default OMNIVIDEO_HOME. The
    setting OMNIVIDEO_PRECISION is "preset", each part in the type that the preset states, or "float32".

    Raises CheckpointError if the weights are missing or damaged, and InvalidInput if they are of another preset than
    the one that is named.
    """

    def __init__(
        self,
        preset: str = DEFAULT_PRESET,
        weights: str | Path | None = None,
        device: str = "auto",
        home: str | Path | None = None,
    ):
        configure_cpu_threads()
        self.settings = load_settings(home=home)
        self.weights_folder = Path(weights) if weights else find_shipped_weights(preset)
        if preset != DEFAULT_PRESET:  # by default, it is that of the weights
            check_preset(self.weights_folder, preset, "preset")
        digest = compute_folder_digest(self.weights_folder, self.settings.home)
        with pause_collection():
            self.omni: OmniVideoModel = checkpoint.load(
                self.weights_folder, pick_device(device), self.settings.precision
            )
        self.text_limits = TokenLimits(self.omni.preset, self.weights_folder)
        digest.check_unchanged()
        self.weights_digest = digest.value

    @property
    def model(self) -> ModelIdentity:
        """What manifests name: the preset, the digest of the weights and the precision."""
        return identify_model(self.omni, self.weights_digest)

    @cached_property
    def conversations(self) -> "Conversations":
        """The threads of this home. The first use loads LangGraph and creates the folder."""
        from omnivideo.wiring import build_local_conversations

        return build_local_conversations(self.omni, self.weights_digest, self.settings, self.text_limits)

    def open_thread(self, thread_id: str | None = None, create: bool = False) -> "Thread":
        """Return a new thread, or the thread with the given id, which is created if `create` is set.

        Raises InvalidInput if it does not exist.
        """
        return self.conversations.open_thread(thread_id, create)

    def artifact_path(self, artifact: Artifact) -> Path:
        """Return the path of a thread's artifact."""
        return LocalObjectStore(self.settings.home / "store").path_for_key(artifact.key)

    def replay(self, artifact: Artifact) -> str:
        """Generate an artifact again from its manifest and return its key (the same one on the same machine).

        Raises InvalidInput if it was generated with another preset, other weights or another precision.
        """
        return self.conversations.replay_artifact(artifact)

    def batch(self, prompts: Iterable[str | dict[str, Any]], folder: str | Path) -> Iterator[BatchOutcome]:
        """Generate each prompt into the folder, with a line in its results.jsonl; skip what an earlier run did."""
        yield from run_batch(self, parse_items(prompts, self.omni.preset, self.text_limits), Path(folder))

    def route(self, prompt: str, source: str | Path | None = None) -> Route:
        """Return what the model would answer the request with: text, an image or a video, with its probability."""
        media = () if source is None else (self.load_media(source),)
        message = MLLMMessage(self.text_limits.check_message("prompt", prompt), media)
        return self.omni.bound_mllm.route(message)

    def generate(
        self, prompt: str, *, image: bool | None = None, on_step: StepCallback = ignore_step, **overrides: object
    ) -> Result:
        """Generate an image if `image` is True, a clip if it is False; by default the model decides.

        `overrides` are width, height, frames, fps, seconds, steps, guidance_scale, flow_shift, negative_prompt and
        seed; the others come from the preset. Raises an InvalidInput that names the setting.
        """
        if image is None:
            has_length = any(overrides.get(name) is not None for name in ("frames", "fps", "seconds"))
            image = overrides.get("frames") == 1 if has_length else self.route(prompt).kind == "image"
        task = get_generation_task("image" if image else "video")
        params = resolve_sampling_params(self.omni.preset, task, **overrides)
        self.text_limits.check_negative_prompt("negative_prompt", params.negative_prompt)
        prompt = self.text_limits.check_prompt("prompt", prompt, params)
        return self.generate_result(prompt, params, None, None, on_step)

    def edit(
        self, source: str | Path, instruction: str, *, on_step: StepCallback = ignore_step, **overrides: object
    ) -> Result:
        """Edit a source as the instruction says. An image is edited to an image, a clip to a clip of its length."""
        info = measure_media(source)
        task, preset = get_editing_task(info.kind), self.omni.preset
        length = get_file_length(preset, info.frames, info.fps)
        params = resolve_sampling_params(preset, task, length, **overrides)
        self.text_limits.check_negative_prompt("negative_prompt", params.negative_prompt)
        instruction = self.text_limits.check_prompt("instruction", instruction, params)
        size = (params.width, params.height, params.frames, params.fps)
        frames = read_fitted_media(source, *size, config=preset.source, delivery=params.delivery)
        result = self.generate_result(instruction, params, frames, Path(source).name, on_step)
        sound = SoundSource(Path(source), info.frames / info.fps) if info.fps else None
        return replace(result, sound=sound)

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
        """Answer a question about an image or a clip; call `on_text` with each new piece of the answer."""
        message = MLLMMessage(self.text_limits.check_message("question", question), (self.load_media(source),))
        pieces = []
        for piece in self.omni.bound_mllm.stream_text(message, temperature=temperature, top_p=top_p, seed=seed):
            pieces.append(piece)
            on_text(piece)
        return "".join(pieces).strip()

    def load_media(self, source: str | Path) -> MLLMMedia:
        """Read a source in the form that the MLLM accepts."""
        return read_mllm_media(source, self.omni.bound_mllm.visual_inputs)

    def generate_result(
        self,
        prompt: str,
        params: SamplingParams,
        source_frames: np.ndarray | None,
        source_name: str | None,
        on_step: StepCallback,
    ) -> Result:
        for event in generate_clip(self.omni, prompt, params, source_frames):
            if isinstance(event, GeneratedClip):
                return Result(
                    event.frames,
                    build_manifest(self.model, prompt, params, event.seconds_by_stage, source_name),
                )
            on_step(event.step)
        raise AssertionError("generate_clip ends with a clip")

"""The SDK in this process: one preset, loaded once, that generates, edits and understands."""

from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
from pydantic import ValidationError

from omnivideo.backends.decoder.pipeline import GeneratedClip, generate_clip
from omnivideo.backends.decoder.renderer import build_manifest, identify_model
from omnivideo.backends.mllm.media import read_mllm_media
from omnivideo.contracts import (
    Artifact,
    ModelIdentity,
    Route,
    SamplingParams,
    TextSampling,
    get_editing_task,
    get_generation_task,
    invalid_input_from_validation,
    resolve_sampling_params,
)
from omnivideo.cpu_threads import configure_cpu_threads
from omnivideo.errors import InvalidInput
from omnivideo.media.extension import join_extension, read_last_frames
from omnivideo.media.read import measure_media, read_fitted_media, read_media
from omnivideo.media.sound import SoundSource
from omnivideo.models.device import pick_device
from omnivideo.models.mllm import MLLMMedia, MLLMMessage
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.text_limits import TokenLimits
from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.digests import compute_folder_digest
from omnivideo.models.weights.shipped import check_preset, find_shipped_weights
from omnivideo.presets import get_animation_task, get_sampling_defaults
from omnivideo.presets.shapes import SourceLength, get_file_length
from omnivideo.sdk.batch import BatchOutcome, run_batch
from omnivideo.sdk.batch_items import parse_items
from omnivideo.sdk.options import (
    CLIP_TO_ANIMATE,
    PICTURE_TO_EXTEND,
    GenerationOptions,
    SamplingOptions,
    Source,
    SourceFile,
    StepCallback,
    TextCallback,
    choose_seeds,
    find_requested_medium,
    ignore_text,
    to_source_file,
)
from omnivideo.sdk.progress import follow_steps
from omnivideo.sdk.result import Result
from omnivideo.settings import load_settings
from omnivideo.startup import pause_collection
from omnivideo.storage.objects.local import LocalObjectStore

if TYPE_CHECKING:
    from omnivideo.agent.conversations import Conversations
    from omnivideo.sdk.thread import StudioThread

DEFAULT_PRESET = "tiny"


def parse_text_sampling(**options: float) -> TextSampling:
    """Return how an answer is sampled. Raises an InvalidInput that names the option and the allowed range."""
    try:
        return TextSampling.model_validate(options)
    except ValidationError as error:
        raise invalid_input_from_validation(error, TextSampling.model_fields) from None


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
        from omnivideo.sdk.local_conversations import build_local_conversations

        return build_local_conversations(self.omni, self.weights_digest, self.settings, self.text_limits)

    def open_thread(self, thread_id: str | None = None, create: bool = False) -> "StudioThread":
        """Return a new thread, or the thread with the given id, which is created if `create` is set.

        Raises InvalidInput if it does not exist.
        """
        from omnivideo.sdk.thread import StudioThread

        return StudioThread.wrap(self.conversations.open_thread(thread_id, create), self.conversations.store)

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

    def route(self, prompt: str, source: Source | None = None) -> Route:
        """Return what the model would answer the request with: text, an image or a video, with its probability."""
        media = () if source is None else (self.load_media(source),)
        message = MLLMMessage(self.text_limits.check_message("prompt", prompt), media)
        return self.omni.bound_mllm.route(message)

    def generate(
        self,
        prompt: str,
        *,
        image: bool | None = None,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        fps: float | None = None,
        seconds: float | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        progress: bool | None = None,
        on_step: StepCallback | None = None,
    ) -> Result:
        """Generate an image if `image` is True, a clip if it is False; by default the model decides.

        What is None comes from the preset; a seed of -1 is any seed. In a terminal or a notebook a progress bar is
        shown unless `progress` is False. Raises an InvalidInput that names the option.
        """
        image = find_requested_medium(image, frames, fps, seconds)
        if image is None:
            image = self.route(prompt).kind == "image"
        params = resolve_sampling_params(
            self.omni.preset,
            get_generation_task("image" if image else "video"),
            width=width,
            height=height,
            frames=frames,
            fps=fps,
            seconds=seconds,
            steps=steps,
            guidance_scale=guidance_scale,
            flow_shift=flow_shift,
            negative_prompt=negative_prompt,
            seed=seed,
        )
        prompt = self.check_texts(prompt, params)
        with follow_steps(prompt, progress, on_step) as report:
            return self.generate_result(prompt, params, None, None, report)

    def generate_many(self, prompt: str, n: int, **options: Unpack[GenerationOptions]) -> list[Result]:
        """Generate `n` results with consecutive seeds, with the options of `generate`."""
        seeds = choose_seeds(options.get("seed", 0), n)
        return [self.generate(prompt, **cast(GenerationOptions, {**options, "seed": seed})) for seed in seeds]

    def edit(
        self,
        source: Source,
        instruction: str,
        *,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        fps: float | None = None,
        seconds: float | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        progress: bool | None = None,
        on_step: StepCallback | None = None,
    ) -> Result:
        """Edit a source as the instruction says. An image is edited to an image, a clip to a clip of its length.

        The source is a path, a PIL image, an array or a result. The options are those of `generate`.
        """
        source_file = to_source_file(source)
        info = measure_media(source_file.file)
        params = resolve_sampling_params(
            self.omni.preset,
            get_editing_task(info.kind),
            get_file_length(self.omni.preset, info.frames, info.fps),
            width=width,
            height=height,
            frames=frames,
            fps=fps,
            seconds=seconds,
            steps=steps,
            guidance_scale=guidance_scale,
            flow_shift=flow_shift,
            negative_prompt=negative_prompt,
            seed=seed,
        )
        self.text_limits.check_negative_prompt("negative_prompt", params.negative_prompt)
        instruction = self.text_limits.check_prompt("instruction", instruction, params)
        size = (params.width, params.height, params.frames, params.fps)
        config = self.omni.preset.source
        pixels = read_fitted_media(source_file.file, *size, config=config, delivery=params.delivery)
        with follow_steps(instruction, progress, on_step) as report:
            result = self.generate_result(instruction, params, pixels, source_file, report)
        result.sound = SoundSource(source_file.file, info.frames / info.fps) if info.fps else None
        return result

    def edit_many(self, source: Source, instruction: str, n: int, **options: Unpack[SamplingOptions]) -> list[Result]:
        """Edit a source `n` times with consecutive seeds, with the options of `edit`."""
        seeds = choose_seeds(options.get("seed", 0), n)
        return [self.edit(source, instruction, **cast(SamplingOptions, {**options, "seed": seed})) for seed in seeds]

    def animate(
        self,
        source: Source,
        prompt: str,
        *,
        last_image: Source | None = None,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        fps: float | None = None,
        seconds: float | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        progress: bool | None = None,
        on_step: StepCallback | None = None,
    ) -> Result:
        """Generate a clip that begins with a picture, and with `last_image` also ends with one.

        Pictures are a path, a PIL image, an array or a result. The options are those of `generate`. Raises an
        InvalidInput if the preset's weights cannot do it.
        """
        preset, source_file = self.omni.preset, to_source_file(source)
        if measure_media(source_file.file).kind != "image":
            raise InvalidInput("source", CLIP_TO_ANIMATE)
        task = get_animation_task(preset) if last_image is None else "keyframes-to-video"
        get_sampling_defaults(preset, task, "task" if last_image is None else "last_image")
        params = resolve_sampling_params(
            preset,
            task,
            None,
            width=width,
            height=height,
            frames=frames,
            fps=fps,
            seconds=seconds,
            steps=steps,
            guidance_scale=guidance_scale,
            flow_shift=flow_shift,
            negative_prompt=negative_prompt,
            seed=seed,
        )
        last_file = None if last_image is None else to_source_file(last_image, "last_image")
        if last_file is not None and measure_media(last_file.file, field="last_image").kind != "image":
            raise InvalidInput("last_image", "it is a clip; give a picture")
        prompt = self.check_texts(prompt, params)
        size = (params.width, params.height, params.given_frames or params.frames, params.fps)
        fit = partial(read_fitted_media, config=preset.source, delivery=params.delivery)
        last = None if last_file is None else fit(last_file.file, *size)
        with follow_steps(prompt, progress, on_step) as report:
            pixels = fit(source_file.file, *size)
            result = self.generate_result(prompt, params, pixels, source_file, report, last)
        if last_file is None:
            return result
        return Result(result.manifest.model_copy(update={"last_frame": last_file.name}), frames=result.frames)

    def extend(
        self,
        source: Source,
        prompt: str,
        *,
        frames: int | None = None,
        seconds: float | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        progress: bool | None = None,
        on_step: StepCallback | None = None,
    ) -> Result:
        """Continue a clip as the prompt says, and return it with what follows.

        `frames` or `seconds` are added, at the clip's size and frame rate; by default what the model adds in one pass.
        The other options are those of `generate`. Raises an InvalidInput if the preset's weights cannot do it.
        """
        preset, source_file = self.omni.preset, to_source_file(source)
        get_sampling_defaults(preset, "video-extension", "source")
        info = measure_media(source_file.file)
        if info.fps is None:
            raise InvalidInput("source", PICTURE_TO_EXTEND)
        params = resolve_sampling_params(
            preset,
            "video-extension",
            SourceLength(info.frames, info.fps),
            width=info.width,
            height=info.height,
            frames=frames,
            seconds=seconds,
            steps=steps,
            guidance_scale=guidance_scale,
            flow_shift=flow_shift,
            negative_prompt=negative_prompt,
            seed=seed,
        )
        prompt, data = self.check_texts(prompt, params), source_file.read()
        given = read_last_frames(data, params.given_frames, params.width, params.height, preset.source, params.delivery)
        with follow_steps(prompt, progress, on_step) as report:
            result = self.generate_result(prompt, params, given, source_file, report)
        whole = join_extension(read_media(data).frames, result.frames, params.given_frames)
        sound = SoundSource(source_file.file, info.frames / info.fps, is_beginning=True)
        return Result(result.manifest, frames=whole, sound=sound)

    def check_texts(self, prompt: str, params: SamplingParams) -> str:
        """Return the prompt without surrounding whitespace. Raises InvalidInput for a text that is too long."""
        self.text_limits.check_negative_prompt("negative_prompt", params.negative_prompt)
        return self.text_limits.check_prompt("prompt", prompt, params)

    def understand(
        self,
        source: Source,
        question: str,
        *,
        on_text: TextCallback = ignore_text,
        temperature: float = 0.2,
        top_p: float = 0.6,
        seed: int = 0,
    ) -> str:
        """Answer a question about an image or a clip; call `on_text` with each new piece of the answer."""
        sampling = parse_text_sampling(temperature=temperature, top_p=top_p, seed=seed)
        message = MLLMMessage(self.text_limits.check_message("question", question), (self.load_media(source),))
        pieces = []
        options = sampling.model_dump(exclude={"max_tokens"})
        for piece in self.omni.bound_mllm.stream_text(message, **options):
            pieces.append(piece)
            on_text(piece)
        return "".join(pieces).strip()

    def load_media(self, source: Source) -> MLLMMedia:
        """Read a source in the form that the MLLM accepts."""
        return read_mllm_media(to_source_file(source).file, self.omni.bound_mllm.visual_inputs)

    def generate_result(
        self,
        prompt: str,
        params: SamplingParams,
        source_frames: np.ndarray | None,
        source_file: SourceFile | None,
        on_step: StepCallback,
        last_frame: np.ndarray | None = None,
    ) -> Result:
        features = None
        if source_file is not None and params.given_frames:  # the MLLM sees all of it, and not only what is given
            media = read_mllm_media(source_file.file, self.omni.bound_mllm.visual_inputs)
            features = self.omni.compute_mllm_features(MLLMMessage(prompt, (media,)), "video")
        for event in generate_clip(self.omni, prompt, params, source_frames, features, last_frame=last_frame):
            if isinstance(event, GeneratedClip):
                name = None if source_file is None else source_file.name
                manifest = build_manifest(self.model, prompt, params, event.seconds_by_stage, name)
                return Result(manifest, frames=event.frames)
            on_step(event.step)
        raise AssertionError("generate_clip ends with a clip")

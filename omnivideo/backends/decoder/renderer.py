"""Render a job with the decoder and store its artifact. Every queue and worker renders through this module."""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from omnivideo import __version__
from omnivideo.backends.decoder.pipeline import (
    DenoisingProgress,
    GeneratedClip,
    generate_clip,
    generate_clip_batch,
    medium_from_params,
)
from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.contracts import (
    Artifact,
    Job,
    MLLMRequest,
    ModelIdentity,
    Preview,
    SamplingParams,
    check_sampling_params,
    compute_latent_grid,
)
from omnivideo.errors import ArtifactNotFound, InvalidInput
from omnivideo.manifests import Manifest, encode_manifest
from omnivideo.media.artifacts import encode_clip, load_frames, to_png_bytes
from omnivideo.media.extension import join_extension, read_last_frames
from omnivideo.media.masks import keep_masked_pixels, read_mask
from omnivideo.media.read import measure_media, read_fitted_media
from omnivideo.media.sound import SoundSource, keep_sound
from omnivideo.media.thumbnails import encode_animation
from omnivideo.models.features import MLLMFeatures, check_features, decode_features
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.sampling import DenoisingState
from omnivideo.models.vae import decode_latents, pixels_to_bytes
from omnivideo.ports import MLLM, SweepableObjectStore
from omnivideo.storage.objects.tensors import get_tensors, put_tensors


class Renderer:
    """Renders jobs with one model. `weights_digest` identifies the weights in manifests.

    `mllm` runs on the same model, unless it is given: a server's, where the model was loaded without its own. With
    `persist_tokens` the visual tokens that the model predicts are also written to the store, for jobs that outlive this
    process.
    """

    def __init__(
        self,
        omni: OmniVideoModel,
        store: SweepableObjectStore,
        weights_digest: str,
        persist_tokens: bool = True,
        mllm: MLLM | None = None,
    ):
        self.omni = omni
        self.store = store
        self.model = identify_model(omni, weights_digest)
        self.mllm: MLLM = mllm or LocalMLLM(omni, store, persist_tokens)

    # ------------------------------------------------------------ preparing

    def prepare_job(self, job: Job) -> tuple[Job, SamplingParams]:
        """Return the job with a reference to its visual tokens, and its settings.

        Raises InvalidInput if this model cannot render the job.
        """
        check_sampling_params(self.omni.preset, job.params)
        return self.add_visual_tokens(job, job.params), job.params

    def add_visual_tokens(self, job: Job, params: SamplingParams) -> Job:
        """Return the job with a reference to its visual tokens, which are predicted here if it has none."""
        if job.visual_tokens is not None:
            return job
        request = MLLMRequest(text=job.prompt, artifacts=(job.source,) if job.source else ())
        reference = self.mllm.predict_visual_tokens(request, medium_from_params(params))
        return job.model_copy(update={"visual_tokens": reference})

    def load_features(self, job: Job) -> MLLMFeatures:
        """Return the MLLM's features for a prepared job. Raises ArtifactNotFound."""
        assert job.visual_tokens
        features = self.mllm.find_features(job.visual_tokens) if isinstance(self.mllm, LocalMLLM) else None
        features = features or decode_features(get_tensors(self.store, job.visual_tokens))
        check_features(features, self.omni.preset)
        return replace(features, values=features.values.to(self.omni.device))

    def load_source(self, source: Artifact | None, params: SamplingParams) -> np.ndarray | Tensor | None:
        """Return a source's latents [z, T, h, w] if they are stored and have the job's size, or its fitted pixels.

        Of the clip that an extension continues, these are the last frames, which are given.
        """
        if source is None:
            return None
        is_extension, frames = params.task == "video-extension", params.given_frames or params.frames
        grid = compute_latent_grid(params.width, params.height, frames)
        has_job_size = (source.width, source.height) == (params.delivered_shape.width, params.delivered_shape.height)
        if source.latents and has_job_size and not (is_extension and source.frames != frames):
            latents = get_tensors(self.store, source.latents)["latents"]
            if latents.shape[1:] == grid:
                return latents
        config, data = self.omni.preset.source, self.store.get(source.key)
        if is_extension:
            return read_last_frames(data, frames, params.width, params.height, config, params.delivery)
        size = (params.width, params.height, frames, params.fps)
        return read_fitted_media(data, *size, config=config, delivery=params.delivery)

    def compute_batch_key(self, job: Job) -> tuple[str, int] | None:
        """Return what jobs must share to be rendered in one pass, or None if the job must be rendered alone.

        They share all settings but the seed, and the length of the condition, whose padding is attended to.
        """
        if job.source is not None:
            return None
        try:
            check_sampling_params(self.omni.preset, job.params)
        except InvalidInput:
            return None
        params = job.params.model_copy(update={"seed": 0})
        return params.model_dump_json(), self.omni.compute_condition_length(job.prompt, medium_from_params(params))

    # ------------------------------------------------------------ rendering

    def render_job(
        self, job: Job, params: SamplingParams, initial_state: DenoisingState | None = None
    ) -> Iterator[DenoisingProgress | GeneratedClip]:
        """Yield the events of `generate_clip` for a prepared job."""
        source, last_frame = self.load_source(job.source, params), self.load_source(job.last_frame, params)
        features = self.load_features(job)
        for event in generate_clip(self.omni, job.prompt, params, source, features, initial_state, last_frame):
            # The latents of a whole clip give its exact frames; its file has lost something.
            if isinstance(event, GeneratedClip) and params.new_frames is not None and not isinstance(source, Tensor):
                assert job.source is not None, "an extension has a source"
                whole = join_extension(load_frames(self.store, job.source), event.frames, params.given_frames)
                event = replace(event, frames=whole)
            yield event

    def render_batch(
        self, prepared_jobs: Sequence[tuple[Job, SamplingParams]], initial_state: DenoisingState | None = None
    ) -> Iterator[DenoisingProgress | list[GeneratedClip]]:
        """Yield the events of `generate_clip_batch` for prepared jobs with one batch key."""
        features = [self.load_features(job) for job, _ in prepared_jobs]
        prompts, seeds = [job.prompt for job, _ in prepared_jobs], [job.seed for job, _ in prepared_jobs]
        yield from generate_clip_batch(self.omni, prompts, seeds, prepared_jobs[0][1], features, initial_state)

    @torch.no_grad()
    def render_preview(self, clean_latents_1zThw: Tensor) -> Preview:
        """Return the middle frame of predicted clean latents."""
        frames = pixels_to_bytes(decode_latents(self.omni.vae, clean_latents_1zThw.to(self.omni.vae.dtype)))[0]
        return Preview(png=base64.b64encode(to_png_bytes(frames[len(frames) // 2])).decode())

    def replay_manifest(self, manifest: Manifest) -> str:
        """Render a manifest's clip again and return its object key.

        Visual tokens that are no longer stored are predicted again from the prompt and the source. Raises InvalidInput
        if the clip was generated by another model, whose bytes this one cannot reproduce.
        """
        check_same_model(manifest, self.model)
        params = manifest.settings
        source = self.find_replayed_source(manifest.source, manifest.source_latents)
        reference = manifest.visual_tokens
        has_tokens = self.mllm.has_visual_tokens if isinstance(self.mllm, LocalMLLM) else self.store.has
        if reference is not None and not has_tokens(reference):
            reference = None
        job = Job(
            id="replay",
            prompt=manifest.prompt,
            visual_tokens=reference,
            source=source,
            params=params,
            mask=manifest.mask,
            last_frame=self.find_replayed_source(manifest.last_frame, manifest.last_frame_latents),
            preset=manifest.preset,
        )
        for event in self.render_job(self.add_visual_tokens(job, params), params):
            if isinstance(event, GeneratedClip):
                media_bytes, suffix, _ = self.encode_result(job, event)
                return self.store.put(media_bytes, suffix)
        raise AssertionError("rendering ends with a clip")

    def find_replayed_source(self, key: str | None, latents: str | None) -> Artifact | None:
        """Return a source that a manifest names as an artifact, with its stored latents."""
        if key is None:
            return None
        info = measure_media(self.store.get(key))
        return Artifact(
            key=key, medium=info.kind, width=info.width, height=info.height, frames=info.frames, fps=info.fps or 1.0,
            caption="", latents=latents, created_by="replay",
        )  # fmt: skip

    # ------------------------------------------------------------ storing

    def encode_result(self, job: Job, clip: GeneratedClip) -> tuple[bytes, str, str | None]:
        """Return a clip's file and suffix, with its source's sound where it can be kept, and a note about that."""
        fps, source = job.params.fps, job.source
        media_bytes, suffix = encode_clip(self.apply_mask(job, clip.frames), fps)
        if source is None or source.medium != "video" or suffix != "mp4":
            return media_bytes, suffix, None
        try:
            is_beginning = job.task == "video-extension"
            sound = SoundSource(self.store.get(source.key), source.frames / source.fps, is_beginning)
        except ArtifactNotFound:  # the latents of the source were enough to edit it
            return media_bytes, suffix, None
        edited_bytes, note = keep_sound(media_bytes, sound, len(clip.frames) / fps, fps)
        return edited_bytes, suffix, note

    def apply_mask(self, job: Job, frames: np.ndarray) -> np.ndarray:
        """Return an edited picture [1, H, W, 3] with the source's pixels where the job's mask keeps them."""
        if job.mask is None or job.source is None:
            return frames
        source = load_frames(self.store, job.source)[0]
        may_change = read_mask(self.store.get(job.mask), source.shape[1], source.shape[0])
        return keep_masked_pixels(frames[0], source, may_change)[None]

    def store_result(self, job: Job, params: SamplingParams, clip: GeneratedClip) -> Artifact:
        """Write the clip, its latents, its manifest and its preview to the store and return the artifact.

        The artifact depends only on the job, not on where or when it is rendered.
        """
        media_bytes, suffix, sound = self.encode_result(job, clip)
        manifest = build_manifest(self.model, job.prompt, params, clip.seconds_by_stage)
        source = {} if job.source is None else {"source": job.source.key, "source_latents": job.source.latents}
        details = {"visual_tokens": job.visual_tokens, "mask": job.mask, "sound": sound}
        if job.last_frame is not None:
            details |= {"last_frame": job.last_frame.key, "last_frame_latents": job.last_frame.latents}
        # Those of an extension are of its last pass, which is the whole clip if its source was given completely.
        has_all_latents = params.new_frames is None or len(clip.frames) == params.given_frames + params.new_frames
        has_all_latents = has_all_latents and job.mask is None and params.passes == 1
        manifest = manifest.model_copy(update=details | source)
        return Artifact(
            key=self.store.put(media_bytes, suffix),
            medium="video" if suffix == "mp4" else "image",
            width=params.delivered_shape.width,
            height=params.delivered_shape.height,
            frames=len(clip.frames),
            fps=params.fps,
            caption=job.prompt,
            manifest=self.store.put(encode_manifest(manifest), "json"),
            latents=put_tensors(self.store, {"latents": clip.latents}) if has_all_latents else None,
            source=None if job.source is None else job.source.key,
            preview=self.store.put(encode_animation(clip.frames, params.fps), "webp") if suffix == "mp4" else None,
            created_by=job.id,
        )


def identify_model(omni: OmniVideoModel, weights_digest: str) -> ModelIdentity:
    """Return the identity of a loaded model."""
    return ModelIdentity(preset=omni.preset.name, weights=weights_digest, precision=omni.precision)


def check_same_model(manifest: Manifest, model: ModelIdentity) -> None:
    """Raise InvalidInput unless the model is the one that a manifest names."""
    ours = {"preset": model.preset, "weights": model.weights, "precision": model.precision}
    theirs = {"preset": manifest.preset, "weights": manifest.weights, "precision": manifest.precision}
    for field, value in ours.items():
        if theirs[field] not in (None, value):
            text = f"the clip was generated with {theirs[field]}, and {value} is loaded; load the same to replay it"
            raise InvalidInput(field, text)


def build_manifest(
    model: ModelIdentity,
    prompt: str,
    params: SamplingParams,
    seconds_by_stage: dict[str, float],
    source: str | None = None,
) -> Manifest:
    """Return the manifest of a clip; `source` is the file name or object key of an edit's source."""
    versions = {"omnivideo": __version__} | {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return Manifest(
        prompt=prompt,
        task=params.task,
        settings=params,
        delivered=params.delivered_shape,
        source=source,
        preset=model.preset,
        weights=model.weights,
        precision=model.precision,
        versions=versions,
        seconds=seconds_by_stage,
    )

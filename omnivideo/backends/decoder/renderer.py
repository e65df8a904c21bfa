"""A job in, its artifact in the store: what every queue and worker that draws has in common."""

import base64
import json
from collections.abc import Iterator, Sequence
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
    Manifest,
    Medium,
    MLLMRequest,
    Preview,
    SamplingParams,
    resolve_sampling_params,
)
from omnivideo.errors import InvalidInput
from omnivideo.media.artifacts import encode_clip, load_frames, to_png_bytes
from omnivideo.media.read import DecodedMedia, fit_media
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.sampling import DenoisingState
from omnivideo.models.vae import decode_latents, pixels_to_bytes
from omnivideo.ports import ObjectStore
from omnivideo.presets import compute_latent_grid
from omnivideo.storage.objects.tensors import get_tensors, put_tensors


class Renderer:
    """Draws jobs with one model.  `weights_digest` names the weights in manifests."""

    def __init__(self, omni: OmniVideoModel, store: ObjectStore, weights_digest: str):
        self.omni = omni
        self.store = store
        self.weights_digest = weights_digest
        self.mllm = LocalMLLM(omni, store)

    def prepare_job(self, job: Job) -> tuple[Job, SamplingParams]:
        """The job with its visual tokens, read here where it comes without, and its settings.

        Raises InvalidInput for what this model cannot draw.
        """
        params = resolve_sampling_params(self.omni.preset, job.task, seed=job.seed, **job.overrides.model_dump())
        if job.visual_tokens is None:
            attachments = () if job.source is None else (job.source,)
            tokens = self.mllm.predict_visual_tokens(
                MLLMRequest(text=job.prompt, artifacts=attachments), medium_from_params(params)
            )
            job = job.model_copy(update={"visual_tokens": tokens})
        return job, params

    def render_job(
        self, job: Job, params: SamplingParams, initial_state: DenoisingState | None = None
    ) -> Iterator[DenoisingProgress | GeneratedClip]:
        """As `generate_clip`, for a job that is ready."""
        yield from generate_clip(
            self.omni,
            job.prompt,
            params,
            self.load_source(job.source, params),
            self.load_visual_tokens(job),
            initial_state,
        )

    def load_visual_tokens(self, job: Job) -> Tensor:
        """V_o [1, Q, E] of a job that is ready."""
        assert job.visual_tokens
        return get_tensors(self.store, job.visual_tokens)["visual_tokens"].to(self.omni.device)

    def compute_batch_key(self, job: Job) -> tuple[str, int] | None:
        """What jobs that can be drawn in one pass have in common: all settings but the seed, and the length of the
        condition, whose padding is attended to.  None for what is drawn alone."""
        if job.source is not None:
            return None
        try:
            params = resolve_sampling_params(self.omni.preset, job.task, seed=0, **job.overrides.model_dump())
        except InvalidInput:
            return None
        return params.model_dump_json(), self.omni.compute_condition_length(job.prompt, medium_from_params(params))

    def render_batch(
        self, prepared_jobs: Sequence[tuple[Job, SamplingParams]], initial_state: DenoisingState | None = None
    ) -> Iterator[DenoisingProgress | list[GeneratedClip]]:
        """As `render_job`, several jobs of one shape in one pass."""
        visual_tokens = torch.cat([self.load_visual_tokens(job) for job, _ in prepared_jobs])
        prompts, seeds = [job.prompt for job, _ in prepared_jobs], [job.seed for job, _ in prepared_jobs]
        yield from generate_clip_batch(self.omni, prompts, seeds, prepared_jobs[0][1], visual_tokens, initial_state)

    def load_source(self, source: Artifact | None, params: SamplingParams) -> np.ndarray | Tensor | None:
        """Its latents where they are kept and of the right size, else its pixels."""
        if source is None:
            return None
        grid = compute_latent_grid(params.width, params.height, params.frames)
        if source.latents and (latents := get_tensors(self.store, source.latents)["latents"]).shape[1:] == grid:
            return latents
        media = DecodedMedia(load_frames(self.store, source), source.fps, source.medium)
        return fit_media(media, params.width, params.height, params.frames, params.fps)

    @torch.no_grad()
    def render_preview(self, clean_latents: Tensor) -> Preview:
        """The middle frame of a guess [1, z, T, h, w]."""
        frames = pixels_to_bytes(decode_latents(self.omni.vae, clean_latents))[0]
        return Preview(png=base64.b64encode(to_png_bytes(frames[len(frames) // 2])).decode())

    def store_result(self, job: Job, params: SamplingParams, clip: GeneratedClip) -> Artifact:
        """The clip and its manifest in the store; the artifact is the same wherever and whenever the job is drawn."""
        media_bytes, suffix = encode_clip(clip.frames, params.fps)
        manifest = build_manifest(self.omni, self.weights_digest, job.prompt, params, clip.seconds_by_stage)
        source = {} if job.source is None else {"source": job.source.key, "source_latents": job.source.latents}
        manifest = manifest.model_copy(update={"visual_tokens": job.visual_tokens} | source)
        return Artifact(
            key=self.store.put(media_bytes, suffix),
            medium="video" if suffix == "mp4" else "image",
            width=params.width,
            height=params.height,
            frames=len(clip.frames),
            fps=params.fps,
            caption=job.prompt,
            manifest=self.store.put(json.dumps(manifest.model_dump(), indent=2).encode(), "json"),
            latents=put_tensors(self.store, {"latents": clip.latents}),
            source=None if job.source is None else job.source.key,
            created_by=job.id,
        )

    def replay_manifest(self, manifest: Manifest) -> str:
        """The key of the clip that a manifest draws."""
        params, source = manifest.settings, None
        if manifest.source:
            medium: Medium = "video" if params.frames > 1 else "image"
            source = Artifact(
                key=manifest.source, medium=medium, width=params.width, height=params.height, frames=params.frames,
                fps=params.fps, caption="", latents=manifest.source_latents, created_by="replay",
            )  # fmt: skip
        job = Job(
            id="replay",
            task=manifest.task,
            prompt=manifest.prompt,
            visual_tokens=manifest.visual_tokens,
            source=source,
            seed=params.seed,
        )
        for event in self.render_job(job, params):
            if isinstance(event, GeneratedClip):
                return self.store.put(*encode_clip(event.frames, params.fps))
        raise AssertionError("draw ends with a clip")


def build_manifest(
    omni: OmniVideoModel,
    weights_digest: str,
    prompt: str,
    params: SamplingParams,
    seconds_by_stage: dict[str, float],
    source: str | None = None,
) -> Manifest:
    """What every clip's manifest says; `weights_digest` names the weights."""
    versions = {"omnivideo": __version__} | {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return Manifest(
        prompt=prompt,
        task=params.task,
        settings=params,
        source=source,
        preset=omni.preset.name,
        weights=weights_digest,
        versions=versions,
        seconds=seconds_by_stage,
    )

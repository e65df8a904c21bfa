"""Clips drawn in this process, behind the planner's job queue port."""

import base64
import json
from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from omnivideo import __version__
from omnivideo.backends.decoder.pipeline import Clip, Guess, draw
from omnivideo.backends.decoder.video import Media, fit
from omnivideo.backends.media import encoded, frames_of, png
from omnivideo.contracts import Artifact, Job, Manifest, Medium, Preview, Settings, Step, settings
from omnivideo.errors import JobCancelled
from omnivideo.models.omni import Omni
from omnivideo.models.vae import decode, to_bytes
from omnivideo.ports import ObjectStore
from omnivideo.presets import latent_grid
from omnivideo.storage.tensors import get_tensors, put_tensors

PREVIEWS = (0.4, 0.7)  # shares of the steps after which a preview is shown


class LocalQueue:
    """Draws a job while it is followed.  `digest` names the weights in manifests."""

    def __init__(self, omni: Omni, store: ObjectStore, digest: str):
        self.omni = omni
        self.store = store
        self.digest = digest
        self.cancelled: set[str] = set()

    def cancel(self, job_id: str) -> None:
        self.cancelled.add(job_id)

    def run(self, job: Job) -> Iterator[Step | Preview | Artifact]:
        chosen = settings(self.omni.preset, job.task, seed=job.seed, steps=job.steps, guidance_scale=job.guidance_scale)
        for event in self.drawn(job.prompt, chosen, job.source, job.visual_tokens):
            if job.id in self.cancelled:
                self.cancelled.discard(job.id)
                raise JobCancelled("the clip was cancelled")
            if isinstance(event, Clip):
                yield self.keep(job, chosen, event)
            elif isinstance(event, Guess):
                yield self.preview(event)
            else:
                yield event

    def drawn(
        self, prompt: str, chosen: Settings, source: Artifact | None, visual_tokens: str
    ) -> Iterator[Step | Guess | Clip]:
        visual = get_tensors(self.store, visual_tokens)["visual_tokens"].to(self.omni.device)
        guess_at = {round(share * chosen.steps) for share in PREVIEWS}
        yield from draw(self.omni, prompt, chosen, self.source(source, chosen), visual, guess_at)

    def source(self, source: Artifact | None, chosen: Settings) -> np.ndarray | Tensor | None:
        """Its latents where they are kept and of the right size, else its pixels."""
        if source is None:
            return None
        grid = latent_grid(chosen.width, chosen.height, chosen.frames)
        if source.latents and (latents := get_tensors(self.store, source.latents)["latents"]).shape[1:] == grid:
            return latents
        media = Media(frames_of(self.store, source), source.fps, source.medium)
        return fit(media, chosen.width, chosen.height, chosen.frames, chosen.fps)

    @torch.no_grad()
    def preview(self, guess: Guess) -> Preview:
        frames = to_bytes(decode(self.omni.vae, guess.latents[None]))[0]
        return Preview(png=base64.b64encode(png(frames[len(frames) // 2])).decode())

    def keep(self, job: Job, chosen: Settings, clip: Clip) -> Artifact:
        """The clip and its manifest in the store; the artifact is the same wherever and whenever the job is drawn."""
        data, suffix = encoded(clip.frames, chosen.fps)
        manifest = manifest_of(self.omni, self.digest, job.prompt, chosen, clip.seconds)
        source = {} if job.source is None else {"source": job.source.key, "source_latents": job.source.latents}
        manifest = manifest.model_copy(update={"visual_tokens": job.visual_tokens} | source)
        return Artifact(
            key=self.store.put(data, suffix),
            medium="video" if suffix == "mp4" else "image",
            width=chosen.width,
            height=chosen.height,
            frames=len(clip.frames),
            fps=chosen.fps,
            about=job.prompt,
            manifest=self.store.put(json.dumps(manifest.model_dump(), indent=2).encode(), "json"),
            latents=put_tensors(self.store, {"latents": clip.latents}),
            source=None if job.source is None else job.source.key,
            made_by=job.id,
        )

    def redrawn(self, manifest: Manifest) -> str:
        """The key of the clip that a manifest draws."""
        source, chosen = None, manifest.settings
        if manifest.source:
            medium: Medium = "video" if chosen.frames > 1 else "image"
            source = Artifact(
                key=manifest.source, medium=medium, width=chosen.width, height=chosen.height, frames=chosen.frames,
                fps=chosen.fps, about="", latents=manifest.source_latents, made_by="replay",
            )  # fmt: skip
        assert manifest.visual_tokens
        for event in self.drawn(manifest.prompt, chosen, source, manifest.visual_tokens):
            if isinstance(event, Clip):
                return self.store.put(*encoded(event.frames, chosen.fps))
        raise AssertionError("draw ends with a clip")


def manifest_of(
    omni: Omni, digest: str, prompt: str, chosen: Settings, seconds: dict[str, float], source: str | None = None
) -> Manifest:
    """What every clip's manifest says; `digest` names the weights."""
    versions = {"omnivideo": __version__} | {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return Manifest(
        prompt=prompt,
        task=chosen.task,
        settings=chosen,
        source=source,
        preset=omni.preset.name,
        weights=digest,
        versions=versions,
        seconds=seconds,
    )

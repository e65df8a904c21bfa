"""A job in, its artifact in the store: what every queue and worker that draws has in common."""

import base64
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from omnivideo import __version__
from omnivideo.backends.decoder.pipeline import Clip, Drawing, draw, draw_together, target_of
from omnivideo.backends.decoder.video import Media, fit
from omnivideo.backends.media import encoded, frames_of, png
from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.contracts import Artifact, Ask, Job, Manifest, Medium, Preview, Settings, settings
from omnivideo.errors import InvalidInput
from omnivideo.models.omni import Omni
from omnivideo.models.sampling import Point
from omnivideo.models.vae import decode, to_bytes
from omnivideo.ports import ObjectStore
from omnivideo.presets import latent_grid
from omnivideo.storage.tensors import get_tensors, put_tensors


class Painter:
    """Draws jobs with one model.  `digest` names the weights in manifests."""

    def __init__(self, omni: Omni, store: ObjectStore, digest: str):
        self.omni = omni
        self.store = store
        self.digest = digest
        self.mllm = LocalMLLM(omni, store)

    def ready(self, job: Job) -> tuple[Job, Settings]:
        """The job with its visual tokens, read here where it comes without, and its settings.

        Raises InvalidInput for what this model cannot draw.
        """
        chosen = settings(self.omni.preset, job.task, seed=job.seed, **job.given.model_dump())
        if job.visual_tokens is None:
            shown = () if job.source is None else (job.source,)
            tokens = self.mllm.visual_tokens(Ask(text=job.prompt, shown=shown), target_of(chosen))
            job = job.model_copy(update={"visual_tokens": tokens})
        return job, chosen

    def drawn(self, job: Job, chosen: Settings, begin: Point | None = None) -> Iterator[Drawing | Clip]:
        """As `draw`, for a job that is ready."""
        yield from draw(self.omni, job.prompt, chosen, self.source(job.source, chosen), self.visual(job), begin)

    def visual(self, job: Job) -> Tensor:
        """V_o [1, Q, E] of a job that is ready."""
        assert job.visual_tokens
        return get_tensors(self.store, job.visual_tokens)["visual_tokens"].to(self.omni.device)

    def shape(self, job: Job) -> tuple[str, int] | None:
        """What jobs that can be drawn in one pass have in common: all settings but the seed, and the length of the
        condition, whose padding is attended to.  None for what is drawn alone."""
        if job.source is not None:
            return None
        try:
            chosen = settings(self.omni.preset, job.task, seed=0, **job.given.model_dump())
        except InvalidInput:
            return None
        return chosen.model_dump_json(), self.omni.condition_length(job.prompt, target_of(chosen))

    def drawn_together(
        self, ready: Sequence[tuple[Job, Settings]], begin: Point | None = None
    ) -> Iterator[Drawing | list[Clip]]:
        """As `drawn`, several jobs of one shape in one pass."""
        visual = torch.cat([self.visual(job) for job, _ in ready])
        prompts, seeds = [job.prompt for job, _ in ready], [job.seed for job, _ in ready]
        yield from draw_together(self.omni, prompts, seeds, ready[0][1], visual, begin)

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
    def preview(self, guess: Tensor) -> Preview:
        """The middle frame of a guess [1, z, T, h, w]."""
        frames = to_bytes(decode(self.omni.vae, guess))[0]
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
        chosen, source = manifest.settings, None
        if manifest.source:
            medium: Medium = "video" if chosen.frames > 1 else "image"
            source = Artifact(
                key=manifest.source, medium=medium, width=chosen.width, height=chosen.height, frames=chosen.frames,
                fps=chosen.fps, about="", latents=manifest.source_latents, made_by="replay",
            )  # fmt: skip
        job = Job(
            id="replay",
            task=manifest.task,
            prompt=manifest.prompt,
            visual_tokens=manifest.visual_tokens,
            source=source,
            seed=chosen.seed,
        )
        for event in self.drawn(job, chosen):
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

"""In-memory twins of the MLLM, the queue and the decoder, for tests of the modules that use them."""

import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from omnivideo.backends.decoder.pipeline import DenoisingProgress, GeneratedClip
from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.contracts import (
    Artifact,
    Job,
    Medium,
    MLLMRequest,
    Preview,
    Route,
    SamplingParams,
    StepProgress,
)
from omnivideo.models.sampling import DenoisingState
from omnivideo.storage.objects.memory import MemoryObjectStore


class ScriptedMLLM:
    """Follow fixed rules: questions are text, "picture" an image, the rest a video; think mode prepends "plainly"."""

    def __init__(self) -> None:
        self.store = MemoryObjectStore()
        self.asks: list[MLLMRequest] = []
        self.doubt: set[str] = set()  # texts whose route is uncertain
        self.agreements: list[float] = []

    def route(self, request: MLLMRequest) -> Route:
        self.asks.append(request)
        if request.text.endswith("?") or request.text.startswith(("how", "describe", "hello")):
            return Route(kind="text", probability=0.99)
        kind = (
            "image"
            if "picture" in request.text or (request.artifacts and request.artifacts[0].medium == "image")
            else "video"
        )
        return Route(kind=kind, probability=0.3 if request.text in self.doubt else 0.99)

    def stream_text(self, request: MLLMRequest) -> Iterator[str]:
        if request.system:
            yield from ("<think>", "because", "</think>", f"plainly {request.text}")
        elif request.text.startswith("describe"):
            yield request.artifacts[0].caption
        else:
            yield from ("it is ", request.artifacts[0].caption if request.artifacts else "me")

    def score_agreement(self, request: MLLMRequest) -> float:
        return self.agreements.pop(0)

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def predict_visual_tokens(self, request: MLLMRequest, medium: Medium) -> str:
        return self.store.put(f"{request.model_dump_json()}{medium}".encode(), "safetensors")


class MLLMWithScriptedText(LocalMLLM):
    """A model with real visual tokens and scripted text."""

    script = ScriptedMLLM()

    def route(self, request: MLLMRequest) -> Route:
        return self.script.route(request)

    def stream_text(self, request: MLLMRequest):
        yield from self.script.stream_text(request)

    def score_agreement(self, request: MLLMRequest) -> float:
        return 0.4 if "red" in request.text else 0.9


class InstantQueue:
    """Render a job in two steps; its file is JSON with the prompt, the seed, the visual tokens and the source."""

    def __init__(self) -> None:
        self.store = MemoryObjectStore()
        self.jobs: list[Job] = []
        self.fails: Exception | None = None

    def cancel(self, job_id: str) -> None: ...

    def run(self, job: Job) -> Iterator[StepProgress | Preview | Artifact]:
        self.jobs.append(job)
        yield StepProgress(step=1, steps=2, eta_seconds=0.1)
        if self.fails:
            raise self.fails
        yield StepProgress(step=2, steps=2, eta_seconds=0.0)
        medium: Medium = "video" if "video" in job.task else "image"
        content = json.dumps([job.prompt, job.seed, job.visual_tokens, job.source and job.source.key])
        yield Artifact(
            key=self.store.put(content.encode(), "mp4"), medium=medium, width=64, height=64, frames=9, fps=8.0,
            caption=job.prompt, source=job.source.key if job.source else None, created_by=job.id,
        )  # fmt: skip


class InstantDecoder:
    """A decoder without a model: clips are black, and their files contain the job's prompt and seed."""

    def __init__(self) -> None:
        self.store = MemoryObjectStore()

    def prepare_job(self, job: Job) -> tuple[Job, SamplingParams]:
        return job, job.params

    def compute_batch_key(self, job: Job) -> str:
        return job.task

    def render_job(
        self, job: Job, params: SamplingParams, initial_state: DenoisingState | None = None
    ) -> Iterator[DenoisingProgress | GeneratedClip]:
        latents = torch.zeros(1, 1, 1, 1, 1)
        for step in range(1 + (initial_state.step if initial_state else 0), params.steps + 1):
            state = DenoisingState(step, latents, latents, ())
            yield DenoisingProgress(StepProgress(step=step, steps=params.steps, eta_seconds=0.0), latents, state)
        yield GeneratedClip(np.zeros((params.frames, params.height, params.width, 3), np.uint8), latents[0])

    def render_batch(
        self, prepared_jobs: Sequence[tuple[Job, SamplingParams]], initial_state: DenoisingState | None = None
    ) -> Iterator[DenoisingProgress | list[GeneratedClip]]:
        for event in self.render_job(*prepared_jobs[0], initial_state):
            yield event if isinstance(event, DenoisingProgress) else [event] * len(prepared_jobs)

    def render_preview(self, clean_latents: Tensor, /) -> Preview:
        return Preview(png="")

    def store_result(self, job: Job, params: SamplingParams, clip: GeneratedClip) -> Artifact:
        frames, height, width, _ = clip.frames.shape
        return Artifact(
            key=self.store.put(json.dumps([job.prompt, params.seed]).encode(), "mp4"), medium="video", width=width,
            height=height, frames=frames, fps=params.fps, caption=job.prompt, created_by=job.id,
        )  # fmt: skip

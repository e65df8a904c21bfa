"""In-memory twins of the ports, for tests of the rooms that use them."""

import json
from collections.abc import Iterator

from omnivideo.contracts import Artifact, Ask, Job, Medium, Preview, Routed, Step
from omnivideo.storage.memory import MemoryStore


class ScriptedMLLM:
    """Answers by rule: a question is text, "picture" an image, the rest a video; think mode puts "plainly" before."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.asks: list[Ask] = []
        self.doubt: set[str] = set()  # texts whose route is a toss-up
        self.agreements: list[float] = []

    def route(self, ask: Ask) -> Routed:
        self.asks.append(ask)
        if ask.text.endswith("?") or ask.text.startswith(("how", "describe", "hello")):
            return Routed(kind="text", probability=0.99)
        kind = "image" if "picture" in ask.text or (ask.shown and ask.shown[0].medium == "image") else "video"
        return Routed(kind=kind, probability=0.3 if ask.text in self.doubt else 0.99)

    def write(self, ask: Ask) -> Iterator[str]:
        if ask.system:
            yield from ("<think>", "because", "</think>", f"plainly {ask.text}")
        elif ask.text.startswith("describe"):
            yield ask.shown[0].about
        else:
            yield from ("it is ", ask.shown[0].about if ask.shown else "me")

    def agreement(self, ask: Ask) -> float:
        return self.agreements.pop(0)

    def visual_tokens(self, ask: Ask, medium: Medium) -> str:
        return self.store.put(f"{ask.model_dump_json()}{medium}".encode(), "safetensors")


class InstantQueue:
    """Draws a job as the JSON of what it was asked for, in two steps."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.jobs: list[Job] = []
        self.fails: Exception | None = None

    def cancel(self, job_id: str) -> None: ...

    def run(self, job: Job) -> Iterator[Step | Preview | Artifact]:
        self.jobs.append(job)
        yield Step(step=1, steps=2, left=0.1)
        if self.fails:
            raise self.fails
        yield Step(step=2, steps=2, left=0.0)
        medium: Medium = "video" if "video" in job.task else "image"
        drawn = json.dumps([job.prompt, job.seed, job.visual_tokens, job.source and job.source.key])
        yield Artifact(
            key=self.store.put(drawn.encode(), "mp4"), medium=medium, width=64, height=64, frames=9, fps=8.0,
            about=job.prompt, source=job.source.key if job.source else None, made_by=job.id,
        )  # fmt: skip

"""A worker: claims a job, draws it, keeps the database informed at every step, and can take over another's job."""

import base64
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from opentelemetry import trace
from opentelemetry.propagate import extract
from safetensors.torch import load, save

from omnivideo.backends.decoder.local import PREVIEWS
from omnivideo.backends.decoder.painter import Painter
from omnivideo.backends.decoder.pipeline import Clip, Drawing
from omnivideo.backends.jobs import patiently
from omnivideo.contracts import Artifact, Claim, Job, Settings, Step
from omnivideo.errors import InvalidInput, JobLost, NotStored, OmniVideoError, StoreError
from omnivideo.models.sampling import Point
from omnivideo.storage.jobs import Jobs

log = logging.getLogger("omnivideo.worker")
TRACER = trace.get_tracer("omnivideo.worker")
INTERNAL = "something went wrong on our side; the worker's log has it under this job's id"
NO_MEMORY = "it needs more memory than this worker has; ask for a smaller size or fewer frames"


@dataclass(frozen=True)
class Habits:
    """How often a worker leaves a point to go on from: every so many steps, and no more often than so many seconds
    of drawing; when a silent worker counts as lost, in seconds; and how many clips of the batch lane it may draw in
    one pass."""

    every: int = 8
    apart: float = 2.0
    silent: float = 15.0
    together: int = 1


class Cancelled(Exception):
    """The job is not wanted any more."""


class Worker:
    """Draws one job at a time with one model."""

    def __init__(self, painter: Painter, jobs: Jobs, habits: Habits | None = None):
        self.painter = painter
        self.jobs = jobs
        self.habits = habits or Habits()
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def work(self) -> bool:
        """Draws the next job, if there is one; whether there was.  Nothing that a job does stops the worker."""
        claim = patiently(lambda: self.jobs.claim(self.name))
        if claim is None:
            return False
        claims = self.joined(claim)
        for one in claims:
            log.info("job %s, attempt %d, %s", one.job.id, one.attempt, "goes on" if one.point else "begins")
        context = extract({"traceparent": claim.trace}) if claim.trace else None
        about: dict[str, str | int] = {"job": claim.job.id, "attempt": claim.attempt, "task": claim.job.task}
        with TRACER.start_as_current_span("job", context, attributes=about | {"together": len(claims)}):
            if claims[0].pack:
                self.ended_together(claims)
            else:
                with lost(claim):
                    self.ended(claim)
        return True

    def joined(self, claim: Claim) -> list[Claim]:
        """What is drawn in one pass with it, itself first."""
        shape = None if claim.lane != "batch" or self.habits.together < 2 else self.painter.shape(claim.job)
        if shape is None and not claim.pack:
            return [claim]
        alike = lambda job: self.painter.shape(job) == shape  # noqa: E731
        return patiently(lambda: self.jobs.joined(claim, self.name, self.habits.together, alike))

    def ended(self, claim: Claim) -> None:
        """Draws it and says what became of it; raises JobLost."""
        try:
            with self.alive([claim]):
                result = self.draw(claim)
            patiently(lambda: self.jobs.finish(claim, result))
        except Exception as error:
            self.judged(claim, error)

    def ended_together(self, claims: list[Claim]) -> None:
        """Draws a pack in one pass, whole, whichever of its jobs these are: a result hangs on who is in the pass."""
        mine = {claim.job.id: claim for claim in claims}
        try:
            with self.alive(claims):
                for job, chosen, clip in self.draw_together(mine, claims[0]):
                    result = patiently(partial(self.painter.keep, job, chosen, clip))
                    claim = mine.pop(job.id)
                    with lost(claim):
                        patiently(partial(self.jobs.finish, claim, result))
        except (torch.OutOfMemoryError, MemoryError):
            torch.cuda.empty_cache()
            for claim in list(mine.values()):  # there may be room for one
                with lost(claim):
                    self.ended(patiently(partial(self.jobs.alone, claim)))
        except Exception as error:
            for claim in list(mine.values()):
                with lost(claim):
                    self.judged(claim, error)

    def judged(self, claim: Claim, error: Exception) -> None:
        """Says what becomes of a job whose drawing ended with an error; raises JobLost."""
        try:
            raise error
        except Cancelled:
            patiently(lambda: self.jobs.stop(claim))
        except JobLost:
            raise
        except NotStored as error:
            self.failed(claim, "failed", str(error))
        except StoreError:
            log.exception("job %s goes back: the store or the database stayed away", claim.job.id)
            self.jobs.give_back(claim)
        except OmniVideoError as error:
            code = "invalid_input" if isinstance(error, InvalidInput) else "failed"
            self.failed(claim, code, str(error))
        except (torch.OutOfMemoryError, MemoryError):
            self.failed(claim, "out_of_memory", NO_MEMORY)
            torch.cuda.empty_cache()
        except Exception:
            log.exception("job %s failed", claim.job.id)
            self.failed(claim, "internal", INTERNAL)

    def failed(self, claim: Claim, code: str, error: str) -> None:
        patiently(lambda: self.jobs.fail(claim, code, error))

    @contextmanager
    def alive(self, claims: list[Claim]) -> Iterator[None]:
        """Beats while no step does: a long VAE pass is no sign of death."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self.habits.silent / 4):
                try:
                    self.jobs.beat_all(claims)
                except OmniVideoError:
                    continue  # the next step meets it too

        beating = threading.Thread(target=beat, daemon=True)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()

    def draw(self, claim: Claim) -> Artifact:
        job, chosen = patiently(lambda: self.painter.ready(claim.job))
        kept, span = time.monotonic(), TRACER.start_span("condition")
        for event in self.painter.drawn(job, chosen, self.point(claim)):
            span.end()
            if isinstance(event, Clip):
                return patiently(partial(self.painter.keep, job, chosen, event))
            span = TRACER.start_span("denoising step", attributes={"step": event.step.step})
            leave = self.leaves(event.step, kept)
            self.told(claim, chosen, event, leave)
            kept = time.monotonic() if leave else kept
        raise AssertionError("draw ends with a clip")

    def draw_together(self, mine: dict[str, Claim], first: Claim) -> Iterator[tuple[Job, Settings, Clip]]:
        """The jobs of a pack that are this worker's, with their clips; those that are lost or cancelled on the way go
        from `mine`."""
        bodies = {one.id: one.job for one in patiently(lambda: self.jobs.statuses(first.pack))}
        ready = [patiently(partial(self.painter.ready, bodies[name])) for name in first.pack]
        kept = time.monotonic()
        for event in self.painter.drawn_together(ready, self.point(first)):
            if isinstance(event, list):
                yield from ((*pair, clip) for pair, clip in zip(ready, event, strict=True) if pair[0].id in mine)
                return
            leave = self.leaves(event.step, kept)
            self.told_together(mine, event, leave)
            kept = time.monotonic() if leave else kept
            if not mine:
                return

    def told_together(self, mine: dict[str, Claim], drawing: Drawing, leave: bool) -> None:
        due = {"point": self.kept_point(drawing.point)} if leave else {}
        wanted = patiently(lambda: self.jobs.beat_all(list(mine.values()), drawing.step, **due))
        for name, claim in list(mine.items()):
            if not wanted.get(name):
                del mine[name]
                with lost(claim):
                    self.judged(claim, Cancelled() if name in wanted else JobLost(name))

    def leaves(self, step: Step, kept: float) -> bool:
        """Whether a point is left after the step, where the last one was at the moment `kept`."""
        return step.step % self.habits.every == 0 and time.monotonic() - kept >= self.habits.apart

    def kept_point(self, point: Point) -> str:
        return patiently(lambda: self.painter.store.put(packed(point), "safetensors"))

    def told(self, claim: Claim, chosen: Settings, drawing: Drawing, leave: bool) -> None:
        """The heartbeat of a step, with a point or a preview where one is due; nobody looks on at a batch."""
        due: dict[str, str] = {}
        if claim.lane == "interactive" and drawing.step.step in {round(share * chosen.steps) for share in PREVIEWS}:
            png = base64.b64decode(self.painter.preview(drawing.guess).png)
            due["preview"] = patiently(lambda: self.painter.store.put(png, "png"))
        if leave:
            due["point"] = self.kept_point(drawing.point)
        if not patiently(lambda: self.jobs.beat(claim, drawing.step, **due)):
            raise Cancelled

    def point(self, claim: Claim) -> Point | None:
        """Where an earlier attempt was; None where it left nothing, or what it left is gone."""
        if claim.point is None or not self.painter.store.has(claim.point):
            return None
        return unpacked(self.painter.store.get(claim.point), self.painter.omni.device)


@contextmanager
def lost(claim: Claim) -> Iterator[None]:
    """A job that is another worker's by now is no trouble."""
    try:
        yield
    except JobLost:
        log.warning("job %s: attempt %d came too late", claim.job.id, claim.attempt)


def packed(point: Point) -> bytes:
    tensors = {"latents": point.latents, "before": point.before, "step": torch.tensor(point.step)}
    tensors |= {f"output{at}": output for at, output in enumerate(point.outputs)}
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def unpacked(data: bytes, device: torch.device) -> Point:
    # Cloned for the alignment, as in storage.tensors.
    held = {name: tensor.clone().to(device) for name, tensor in load(data).items()}
    outputs = tuple(held[f"output{at}"] for at in range(2) if f"output{at}" in held)
    return Point(int(held["step"]), held["latents"], held["before"], outputs)

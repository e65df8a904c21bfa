"""A look at a model while it trains: held-out prompts and edits from fixed seeds, drawn on one sheet and scored.

So that sheets and scores of different steps differ by the model alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omnivideo.backends.decoder.video import contact_sheet
from omnivideo.evaluation.prompts import IMAGE_CATEGORIES, prompts
from omnivideo.evaluation.suite import clips_of, edited, held_out_edits
from omnivideo.models.mllm import Message
from omnivideo.models.omni import Omni
from omnivideo.presets import TINY, Task
from omnivideo.training.facts import Demand
from omnivideo.training.scorer import read
from omnivideo.training.watch import DRAWN
from omnivideo.training.world import render

COUNT = 6  # samples of each kind; stills have one of each category
SHOWN = 2  # of each kind, on the sheet


@dataclass(frozen=True)
class Sample:
    """What was drawn, uint8 [F, H, W, 3], and what should be seen; of an edit, also what it was made from."""

    text: str
    frames: np.ndarray
    demand: Demand
    source: np.ndarray | None = None

    @property
    def right(self) -> bool:
        return self.demand.met_by(read(self.frames))


def look(omni: Omni, sheet: Path | None) -> dict[str, float]:
    """Writes the sheet, and returns the share of right samples of each kind and of all.

    A preset whose world has no scorer draws two prompts and has no scores.  Without a path it only draws.
    """
    scored = omni.preset.name == TINY.name
    kinds = dict(samples(omni, COUNT if scored else 1, edits=scored))
    if sheet is None:
        return {}
    sheet.parent.mkdir(parents=True, exist_ok=True)
    verdicts = {kind: [one.right for one in found] for kind, found in kinds.items()} if scored else {}
    rows = [row for kind, found in kinds.items() for row in rows_of(found, verdicts.get(kind, [None] * len(found)))]
    contact_sheet([list(frames) for _, frames in rows], [caption for caption, _ in rows], 2 if scored else 1).save(
        sheet
    )
    scores = {f"{kind} right": float(np.mean(found)) for kind, found in verdicts.items()}
    return scores | ({DRAWN: float(np.mean(list(scores.values())))} if scored else {})


def samples(omni: Omni, count: int, edits: bool) -> Iterator[tuple[str, list[Sample]]]:
    """As many of each kind, by the names of the losses that training has for them."""
    for kind, categories in (("stills", IMAGE_CATEGORIES[:count]), ("clips", ("motion",))):
        wanted = prompts(count // len(categories), categories)
        texts = [one.text for one in wanted]
        task: Task = "text-to-video" if kind == "clips" else "text-to-image"
        drawn = clips_of(omni, texts, [Message(text) for text in texts], task, 1000)
        yield kind, [Sample(one.text, clip, one.demand) for one, clip in zip(wanted, drawn, strict=True)]
    for kind, video in (("stills edited", False), ("clips edited", True)) if edits else ():
        asked = held_out_edits(count, video)
        pairs = zip(asked, edited(omni, asked, video, 2000), strict=True)
        yield kind, [Sample(one.instruction, clip, one.demand, render(one.source)) for one, clip in pairs]


def rows_of(found: list[Sample], verdicts: list[bool] | list[None]) -> Iterator[tuple[str, np.ndarray]]:
    """Captions and frames of the first ones, an edit's source above it."""
    for sample, right in list(zip(found, verdicts, strict=True))[:SHOWN]:
        if sample.source is not None:
            yield f"to be edited: {sample.text}", sample.source
        yield sample.text + ("" if right is None else f" - {'right' if right else 'wrong'}"), sample.frames

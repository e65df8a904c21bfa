"""A look at a model while it trains: held-out prompts and edits from fixed seeds, drawn on one sheet and scored.

So that sheets and scores of different steps differ by the model alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omnivideo.evaluation.prompts import IMAGE_CATEGORIES, sample_prompts
from omnivideo.evaluation.suite import apply_edits, sample_clips, sample_held_out_edits
from omnivideo.media.contact_sheet import make_contact_sheet
from omnivideo.models.mllm import MLLMMessage
from omnivideo.models.omni import OmniVideoModel
from omnivideo.presets import TINY, Task
from omnivideo.synthetic.facts import SceneSpec
from omnivideo.synthetic.scenes import render_scene
from omnivideo.synthetic.scorer import detect_scene
from omnivideo.training.engine.monitor import OVERALL_SCORE

SAMPLES_PER_KIND = 6  # samples of each kind; stills have one of each category
SHEET_ROWS_PER_KIND = 2  # of each kind, on the sheet


@dataclass(frozen=True)
class ScoredSample:
    """What was drawn, uint8 [F, H, W, 3], and what should be seen; of an edit, also what it was made from."""

    text: str
    frames: np.ndarray
    scene_spec: SceneSpec
    source: np.ndarray | None = None

    @property
    def is_right(self) -> bool:
        return self.scene_spec.is_met_by(detect_scene(self.frames))


def render_sample_sheet(omni: OmniVideoModel, sheet_path: Path | None) -> dict[str, float]:
    """Writes the sheet, and returns the share of right samples of each kind and of all.

    A preset whose world has no scorer draws two prompts and has no scores.  Without a path it only draws.
    """
    scored = omni.preset.name == TINY.name
    kinds = dict(generate_samples(omni, SAMPLES_PER_KIND if scored else 1, with_edits=scored))
    if sheet_path is None:
        return {}
    sheet_path.parent.mkdir(parents=True, exist_ok=True)
    verdicts = {kind: [one.is_right for one in found] for kind, found in kinds.items()} if scored else {}
    rows = [
        row for kind, found in kinds.items() for row in build_sheet_rows(found, verdicts.get(kind, [None] * len(found)))
    ]
    make_contact_sheet([list(frames) for _, frames in rows], [caption for caption, _ in rows], 2 if scored else 1).save(
        sheet_path
    )
    scores = {f"{kind} right": float(np.mean(found)) for kind, found in verdicts.items()}
    return scores | ({OVERALL_SCORE: float(np.mean(list(scores.values())))} if scored else {})


def generate_samples(omni: OmniVideoModel, count: int, with_edits: bool) -> Iterator[tuple[str, list[ScoredSample]]]:
    """As many of each kind, by the names of the losses that training has for them."""
    for kind, categories in (("stills", IMAGE_CATEGORIES[:count]), ("clips", ("motion",))):
        eval_prompts = sample_prompts(count // len(categories), categories)
        texts = [one.text for one in eval_prompts]
        task: Task = "text-to-video" if kind == "clips" else "text-to-image"
        generated = sample_clips(omni, texts, [MLLMMessage(text) for text in texts], task, 1000)
        yield (
            kind,
            [ScoredSample(one.text, clip, one.scene_spec) for one, clip in zip(eval_prompts, generated, strict=True)],
        )
    for kind, video in (("stills edited", False), ("clips edited", True)) if with_edits else ():
        held_out = sample_held_out_edits(count, video)
        pairs = zip(held_out, apply_edits(omni, held_out, video, 2000), strict=True)
        yield (
            kind,
            [ScoredSample(one.instruction, clip, one.target_spec, render_scene(one.source)) for one, clip in pairs],
        )


def build_sheet_rows(
    scored_samples: list[ScoredSample], verdicts: list[bool] | list[None]
) -> Iterator[tuple[str, np.ndarray]]:
    """Captions and frames of the first ones, an edit's source above it."""
    for sample, right in list(zip(scored_samples, verdicts, strict=True))[:SHEET_ROWS_PER_KIND]:
        if sample.source is not None:
            yield f"to be edited: {sample.text}", sample.source
        yield sample.text + ("" if right is None else f" - {'right' if right else 'wrong'}"), sample.frames

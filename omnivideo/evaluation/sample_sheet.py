"""Sample a model while it trains: held-out prompts and edits with fixed seeds, on one sheet, with scores.

Sheets and scores of different steps differ only because of the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omnivideo.contracts import Medium, get_generation_task
from omnivideo.evaluation.editing import apply_edits, sample_held_out_edits
from omnivideo.evaluation.prompts import IMAGE_CATEGORIES, sample_prompts
from omnivideo.evaluation.suite import sample_clips
from omnivideo.media.contact_sheet import make_contact_sheet
from omnivideo.models.mllm import MLLMMessage
from omnivideo.models.omni import OmniVideoModel
from omnivideo.synthetic.facts import SceneSpec
from omnivideo.synthetic.rendering import render_scene
from omnivideo.synthetic.scorer import detect_scene

SAMPLES_PER_KIND = 6  # images have one sample of each category
SHEET_ROWS_PER_KIND = 2


@dataclass(frozen=True)
class ScoredSample:
    """Generated frames, uint8 [F, H, W, 3], with what they should show; `source` holds the frames before an edit."""

    text: str
    frames: np.ndarray
    scene_spec: SceneSpec
    source: np.ndarray | None = None

    @property
    def is_correct(self) -> bool:
        return self.scene_spec.is_met_by(detect_scene(self.frames))


def render_sample_sheet(omni: OmniVideoModel, sheet_path: Path | None) -> dict[str, float]:
    """Write the sheet, and return the share of correct samples of each kind.

    A preset whose world has no scorer generates two samples and has no scores. Without a path, the samples are
    generated but neither scored nor written.
    """
    has_scorer = omni.preset.has_scorer
    samples_by_kind = dict(generate_samples(omni, SAMPLES_PER_KIND if has_scorer else 1, with_edits=has_scorer))
    if sheet_path is None:
        return {}
    sheet_path.parent.mkdir(parents=True, exist_ok=True)
    rows, scores = list[tuple[str, np.ndarray]](), dict[str, float]()
    for kind, samples in samples_by_kind.items():
        verdicts = [sample.is_correct for sample in samples] if has_scorer else [None] * len(samples)
        rows += build_sheet_rows(samples, verdicts)
        if has_scorer:
            scores[f"{kind} correct"] = float(np.mean([verdict is True for verdict in verdicts]))
    clips, captions = [list(frames) for _, frames in rows], [caption for caption, _ in rows]
    make_contact_sheet(clips, captions, 2 if has_scorer else 1).save(sheet_path)
    return scores


def generate_samples(omni: OmniVideoModel, count: int, with_edits: bool) -> Iterator[tuple[str, list[ScoredSample]]]:
    """Yield `count` samples of each kind; a kind has the name of its loss in the training log."""
    generation_kinds: tuple[tuple[str, Medium, tuple[str, ...]], ...] = (
        ("stills", "image", IMAGE_CATEGORIES[:count]),
        ("clips", "video", ("motion",)),
    )
    for kind, medium, categories in generation_kinds:
        prompts = sample_prompts(count // len(categories), categories)
        texts = [prompt.text for prompt in prompts]
        clips = sample_clips(omni, texts, [MLLMMessage(text) for text in texts], get_generation_task(medium), 1000)
        yield (
            kind,
            [ScoredSample(prompt.text, clip, prompt.scene_spec) for prompt, clip in zip(prompts, clips, strict=True)],
        )
    for kind, video in (("stills edited", False), ("clips edited", True)) if with_edits else ():
        edits = sample_held_out_edits(count, video)
        sources = [render_scene(edit.source) for edit in edits]
        clips = apply_edits(omni, [edit.instruction for edit in edits], sources, 2000, think=False)
        yield (
            kind,
            [
                ScoredSample(edit.instruction, clip, edit.target_spec, source)
                for edit, clip, source in zip(edits, clips, sources, strict=True)
            ],
        )


def build_sheet_rows(
    samples: list[ScoredSample], verdicts: list[bool] | list[None]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield captions and frames of the first samples; the source of an edit comes before its result."""
    for sample, verdict in list(zip(samples, verdicts, strict=True))[:SHEET_ROWS_PER_KIND]:
        if sample.source is not None:
            yield f"to be edited: {sample.text}", sample.source
        suffix = "" if verdict is None else f" - {'correct' if verdict else 'wrong'}"
        yield sample.text + suffix, sample.frames

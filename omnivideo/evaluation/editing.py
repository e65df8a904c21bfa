"""Evaluate edits: single ones, several in a row, and the area that should not change."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from omnivideo.contracts import THINK_END, get_editing_task
from omnivideo.evaluation.suite import (
    EvaluationProgress,
    JudgedCase,
    RecordCase,
    Score,
    ignore_case,
    iterate_chunks,
    sample_clips,
    score_verdicts,
    write_answer,
)
from omnivideo.models.mllm import MLLMMedia, MLLMMessage
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.vae import encode_pixels, pixels_from_bytes
from omnivideo.synthetic.chat import THINK_SYSTEM_PROMPT
from omnivideo.synthetic.edits import EDIT_MAKERS, IMAGE_EDITS, VIDEO_EDITS, SceneEdit, sample_edit
from omnivideo.synthetic.rendering import render_object_mask, render_scene
from omnivideo.synthetic.scenes import FPS
from omnivideo.synthetic.scorer import detect_scene

CHAIN_LENGTH = 5
CHAINED_KINDS = ("recolour", "reshape", "resize", "background", "swap")


def compute_untouched_psnr(edit: SceneEdit, source: np.ndarray, result: np.ndarray) -> float | None:
    """Return the PSNR in dB over the pixels outside of all objects that the edit changes.

    An edit that changes the background leaves nothing untouched: the result is None.
    """
    if edit.source.background != edit.target.background:
        return None
    untouched_mask = ~render_object_mask(replace(edit.source, objects=edit.changed_objects))
    error = np.mean((source[untouched_mask].astype(float) - result[untouched_mask].astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def sample_held_out_edits(count: int, video: bool) -> list[SceneEdit]:
    """Return the same edits in every call; the kinds alternate."""
    kinds = VIDEO_EDITS if video else IMAGE_EDITS
    rng = random.Random(f"evaluation/editing/{video}")
    return [sample_edit(rng, video, "held_out", [kinds[index % len(kinds)]]) for index in range(count)]


def restate_request(omni: OmniVideoModel, message: MLLMMessage) -> str:
    """Return what think mode makes of a request; the request itself if that does not end, or is too long a prompt."""
    thinking = replace(message, system=THINK_SYSTEM_PROMPT)
    answer = write_answer(omni, thinking)
    rewrite = answer.rpartition(THINK_END)[2].strip() if THINK_END in answer else ""
    is_prompt = 0 < len(omni.tokenizer(rewrite, verbose=False).input_ids) <= omni.preset.text.max_tokens
    return rewrite if rewrite and is_prompt else message.text


@torch.no_grad()
def apply_edits(
    omni: OmniVideoModel, instructions: Sequence[str], sources: Sequence[np.ndarray], seed: int, think: bool = True
) -> np.ndarray:
    """Return the edited clips that the model generates, uint8 [B, F, H, W, 3]; sources are [F, H, W, 3]."""
    is_video = len(sources[0]) > 1
    source = encode_pixels(omni.vae, pixels_from_bytes(np.stack(sources)).to(omni.device))
    media = [MLLMMedia(pixels, FPS, is_video) for pixels in sources]
    messages = [MLLMMessage(text, (shown,)) for text, shown in zip(instructions, media, strict=True)]
    if think:
        messages = [replace(message, text=restate_request(omni, message)) for message in messages]
    texts = [message.text for message in messages]
    return sample_clips(omni, texts, messages, get_editing_task("video" if is_video else "image"), seed, source=source)


def evaluate_editing(
    omni: OmniVideoModel,
    count: int,
    on_progress: EvaluationProgress,
    video: bool,
    think: bool = True,
    record_case: RecordCase = ignore_case,
) -> dict[str, Score]:
    """Score held-out edits by kind and by the number of objects, and the PSNR of the area that should not change."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    untouched_psnrs: list[float] = []
    name = "video" if video else "image"
    for first, chunk in iterate_chunks(sample_held_out_edits(count, video)):
        sources = [render_scene(edit.source) for edit in chunk]
        clips = apply_edits(omni, [edit.instruction for edit in chunk], sources, 2000 + first, think)
        for edit, source, clip in zip(chunk, sources, clips, strict=True):
            is_right = edit.target_spec.is_met_by(detect_scene(clip))
            record_case(JudgedCase(f"{name}-editing", edit.kind, edit.instruction, clip, is_right, source))
            for row in ("s", f": {edit.kind}", f"s of {len(edit.source.objects)} objects"):
                verdicts[f"{name} edit{row}"].append(is_right)
            psnr = compute_untouched_psnr(edit, source, clip)
            untouched_psnrs += [] if psnr is None else [psnr]
        on_progress(f"{name}-editing", first + len(chunk), count)
    scores = {row: score_verdicts(results) for row, results in sorted(verdicts.items())}
    median = float(np.median(untouched_psnrs))
    return scores | {f"{name} edits: untouched area, median dB": Score(median, len(untouched_psnrs))}


def sample_edit_chain(rng: random.Random, video: bool) -> list[SceneEdit]:
    """Return edits in a row: each has the target of the one before as its source."""
    chain = [sample_edit(rng, video, "held_out", CHAINED_KINDS)]
    while len(chain) < CHAIN_LENGTH:
        kind = rng.choice(CHAINED_KINDS)
        if change := EDIT_MAKERS[kind](rng, chain[-1].target):
            chain.append(SceneEdit(kind, chain[-1].target, *change))
    return chain


def evaluate_edit_chains(
    omni: OmniVideoModel, count: int, on_progress: EvaluationProgress, video: bool
) -> dict[str, Score]:
    """Score edits of edits: every result is the source of the next edit, and must show the target of its depth.

    At each depth the same edits are also scored alone, from the rendered source.
    """
    rng = random.Random(f"evaluation/edit chains/{video}")
    chains = [sample_edit_chain(rng, video) for _ in range(count)]
    scores: dict[str, Score] = {}
    name = "video" if video else "image"
    current = [render_scene(chain[0].source) for chain in chains]
    for depth in range(CHAIN_LENGTH):
        edits = [chain[depth] for chain in chains]
        instructions = [edit.instruction for edit in edits]
        rendered = [render_scene(edit.source) for edit in edits]
        current = list(apply_edits(omni, instructions, current, 3000 + count * depth))
        alone = current if depth == 0 else apply_edits(omni, instructions, rendered, 3000 + count * depth)
        for row, clips in (("edit", current), ("alone", alone)):
            verdicts = [edit.target_spec.is_met_by(detect_scene(clip)) for edit, clip in zip(edits, clips, strict=True)]
            scores[f"{name} {row} {depth + 1} of {CHAIN_LENGTH}"] = score_verdicts(verdicts)
        on_progress(f"{name} edits of edits", depth + 1, CHAIN_LENGTH)
    return scores

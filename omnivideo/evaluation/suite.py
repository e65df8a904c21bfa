"""The evaluation of a preset of the rendered world: held-out prompts in, the scorer's verdicts out.

Nothing here looks at the model's own opinion: clips are read by `training.scorer`, answers are compared with the
ground truth of their scenes.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from omnivideo.evaluation.prompts import CATEGORIES, sample_prompts
from omnivideo.models.mllm import MLLMMessage, generate_answer, predict_route
from omnivideo.models.omni import OmniVideoModel, TargetMedium
from omnivideo.models.sampling import denoise, sample_initial_noise
from omnivideo.models.vae import decode_latents, encode_pixels, pixels_to_bytes
from omnivideo.presets import Task, compute_latent_grid
from omnivideo.synthetic.edits import IMAGE_EDITS, VIDEO_EDITS, SceneEdit, sample_edit
from omnivideo.synthetic.questions import sample_question
from omnivideo.synthetic.scenes import render_object_mask, render_scene, sample_scene
from omnivideo.synthetic.scorer import detect_scene
from omnivideo.training.tiny.latents import pixels_from_scenes
from omnivideo.training.tiny.mllm import (
    make_caption_prompt,
    make_indirect_prompt,
    make_knowledge_sample,
    make_question_sample,
    make_talk_sample,
    media_from_scene,
)

# What the decoder is told: everything; no visual tokens; visual tokens without the text; another prompt's tokens.
ConditionMode = Literal["full", "text only", "visual only", "swapped"]
EvaluationProgress = Callable[[str, int, int], None]
CHUNK_SIZE = 25
T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """Share of right ones among `count`."""

    mean: float
    count: int


def score_verdicts(verdicts: Iterable[bool]) -> Score:
    results = list(verdicts)
    return Score(float(np.mean(results)), len(results))


def iterate_chunks(items: Sequence[T]) -> Iterator[tuple[int, Sequence[T]]]:
    for first in range(0, len(items), CHUNK_SIZE):
        yield first, items[first : first + CHUNK_SIZE]


def build_conditions(
    omni: OmniVideoModel,
    texts: Sequence[str],
    messages: Sequence[MLLMMessage],
    target: TargetMedium,
    mode: ConditionMode,
    source: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The condition and the null condition of a batch, under an ablation's mode."""
    negative = omni.preset.negative_prompt
    null = omni.build_null_condition(negative, len(texts), source)
    if mode == "text only":
        return omni.build_condition(texts, [None] * len(texts), source), null
    visual = omni.compute_visual_tokens([(message, target) for message in messages])
    if mode == "swapped":
        visual = visual.roll(1, dims=0)
    decoder_texts = [negative] * len(texts) if mode == "visual only" else texts
    return omni.build_condition(
        decoder_texts, list(omni.adapt_visual_tokens(visual, [target] * len(texts))), source
    ), null


@torch.no_grad()
def sample_clips(
    omni: OmniVideoModel,
    texts: Sequence[str],
    messages: Sequence[MLLMMessage],
    task: Task,
    seed: int,
    mode: ConditionMode = "full",
    source: Tensor | None = None,
) -> np.ndarray:
    """uint8 [B, F, H, W, 3] by the preset's steps and guidance for the task; seeds count up from `seed`."""
    sampling = omni.preset.sampling[task]
    target: TargetMedium = "video" if sampling.frames > 1 else "image"
    condition, null = build_conditions(omni, texts, messages, target, mode, source)
    grid = compute_latent_grid(sampling.width, sampling.height, sampling.frames)
    x = sample_initial_noise(list(range(seed, seed + len(texts))), (omni.vae.config.z_dim, *grid), omni.device)
    for state in denoise(
        omni.decoder, x, condition, null, sampling.steps, sampling.guidance_scale, sampling.flow_shift
    ):
        x = state.state.latents
    return pixels_to_bytes(decode_latents(omni.vae, x))


def evaluate_generation(
    omni: OmniVideoModel, count: int, on_progress: EvaluationProgress, mode: ConditionMode = "full"
) -> dict[str, Score]:
    """GenEval's six categories and motion, `count` held-out prompts each; and how steady the clips are."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    steady: list[float] = []
    for category in CATEGORIES:
        wanted = sample_prompts(count, [category])
        task: Task = "text-to-video" if wanted[0].is_video else "text-to-image"
        for first, chunk in iterate_chunks(wanted):
            texts = [one.text for one in chunk]
            drawn = sample_clips(omni, texts, [MLLMMessage(text) for text in texts], task, 1000 + first, mode)
            readings = [detect_scene(clip) for clip in drawn]
            verdicts[category] += [
                one.scene_spec.is_met_by(reading) for one, reading in zip(chunk, readings, strict=True)
            ]
            steady += [reading.steadiness for reading in readings if wanted[0].is_video]
            on_progress(category, first + len(chunk), count)
    scores = {name: score_verdicts(found) for name, found in verdicts.items()}
    return scores | {"temporal steadiness": Score(float(np.mean(steady)), len(steady))}


def compute_untouched_psnr(edit: SceneEdit, source: np.ndarray, result: np.ndarray) -> float | None:
    """PSNR in dB over the pixels that belong to nothing that the edit names; None for a
    new background, which touches all of it."""
    if edit.kind == "background":
        return None
    untouched_mask = ~render_object_mask(replace(edit.source, objects=edit.changed_objects))
    error = np.mean((source[untouched_mask].astype(float) - result[untouched_mask].astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def sample_held_out_edits(count: int, video: bool) -> list[SceneEdit]:
    """Of every kind in turn, the same every time."""
    kinds = VIDEO_EDITS if video else IMAGE_EDITS
    rng = random.Random(f"evaluation/editing/{video}")
    return [sample_edit(rng, video, "held_out", [kinds[at % len(kinds)]]) for at in range(count)]


@torch.no_grad()
def apply_edits(omni: OmniVideoModel, edits: Sequence[SceneEdit], video: bool, seed: int) -> np.ndarray:
    """uint8 [B, F, H, W, 3] of their sources as the model changes them."""
    source = encode_pixels(omni.vae, pixels_from_scenes(edit.source for edit in edits).to(omni.device))
    messages = [MLLMMessage(edit.instruction, (media_from_scene(edit.source),)) for edit in edits]
    task: Task = "video-editing" if video else "image-editing"
    return sample_clips(omni, [edit.instruction for edit in edits], messages, task, seed, source=source)


def evaluate_editing(
    omni: OmniVideoModel, count: int, on_progress: EvaluationProgress, video: bool
) -> dict[str, Score | float]:
    """Held-out edits of every kind: success, and PSNR of what should have stayed."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    untouched_psnrs: list[float] = []
    name = "video" if video else "image"
    for first, chunk in iterate_chunks(sample_held_out_edits(count, video)):
        for edit, clip in zip(chunk, apply_edits(omni, chunk, video, 2000 + first), strict=True):
            verdicts[edit.kind].append(edit.target_spec.is_met_by(detect_scene(clip)))
            psnr = compute_untouched_psnr(edit, render_scene(edit.source), clip)
            untouched_psnrs += [] if psnr is None else [psnr]
        on_progress(f"{name}-editing", first + len(chunk), count)
    scores: dict[str, Score | float] = {
        f"{name} edit: {kind}": score_verdicts(found) for kind, found in verdicts.items()
    }
    scores[f"{name} edits"] = score_verdicts(verdict for found in verdicts.values() for verdict in found)
    scores[f"{name} edits: untouched area, median dB"] = float(np.median(untouched_psnrs))
    return scores


def evaluate_understanding(omni: OmniVideoModel, count: int, on_progress: EvaluationProgress) -> dict[str, Score]:
    """Questions of every kind about held-out stills and clips; an answer is right if it is the ground truth's."""
    rng = random.Random("evaluation/understanding")
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for at in range(count):
        scene = sample_scene(rng, is_video=at % 2 == 1, split="held_out")
        question = sample_question(rng, scene)
        message = MLLMMessage(question.text, (media_from_scene(scene),))
        text = "".join(generate_answer(omni.mllm, omni.mllm_tokenizer, message, omni.vision_config, max_tokens=60))
        verdicts[question.kind].append(text.strip() == question.answer)
        on_progress("understanding", at + 1, count)
    scores = {f"understanding: {kind}": score_verdicts(found) for kind, found in sorted(verdicts.items())}
    return scores | {"understanding": score_verdicts(one for found in verdicts.values() for one in found)}


def sample_routing_case(rng: random.Random) -> tuple[MLLMMessage, str]:
    """A request with the route that it should take."""
    kind = rng.choice(("image", "video", "image edit", "video edit", "question", "knowledge", "talk"))
    if kind in ("image", "video"):
        make = make_caption_prompt if rng.random() < 0.7 else make_indirect_prompt
        return MLLMMessage(make(rng, kind == "video")[0]), kind
    if kind in ("image edit", "video edit"):
        video = kind == "video edit"
        edit = sample_edit(rng, video, "held_out")
        return MLLMMessage(edit.instruction, (media_from_scene(edit.source),)), "video" if video else "image"
    make_text = {"question": make_question_sample, "knowledge": make_knowledge_sample, "talk": make_talk_sample}[kind]
    return make_text(rng, rng.random() < 0.5)[0], "text"


def evaluate_routing(omni: OmniVideoModel, count: int, on_progress: EvaluationProgress) -> dict[str, Score]:
    rng = random.Random("evaluation/routing")
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for at in range(count):
        message, expected = sample_routing_case(rng)
        found = predict_route(omni.mllm, omni.mllm_tokenizer, message, omni.vision_config).kind
        verdicts[expected].append(found == expected)
        on_progress("routing", at + 1, count)
    scores = {f"routing: {kind}": score_verdicts(found) for kind, found in sorted(verdicts.items())}
    return scores | {"routing": score_verdicts(one for found in verdicts.values() for one in found)}


def evaluate_all(omni: OmniVideoModel, count: int, on_progress: EvaluationProgress) -> dict[str, Score | float]:
    """All of the above, `count` a category."""
    scores: dict[str, Score | float] = {}
    scores |= evaluate_generation(omni, count, on_progress)
    scores |= evaluate_editing(omni, 2 * count, on_progress, video=False)
    scores |= evaluate_editing(omni, 2 * count, on_progress, video=True)
    scores |= evaluate_understanding(omni, 8 * count, on_progress)
    return scores | evaluate_routing(omni, 8 * count, on_progress)

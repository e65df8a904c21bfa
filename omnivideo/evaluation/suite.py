"""Evaluate a preset of the synthetic world: generate from held-out prompts, and score the results.

No score depends on the model's own judgement: `synthetic.scorer` reads the clips, and answers are compared with the
ground truth of their scenes.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from omnivideo.contracts import Medium, compute_latent_grid, get_generation_task
from omnivideo.evaluation.prompts import CATEGORIES, sample_prompts
from omnivideo.models.mllm import MLLMMedia, MLLMMessage
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.sampling import Expert, denoise, sample_initial_noise
from omnivideo.models.vae import decode_latents, pixels_to_bytes
from omnivideo.presets import Task, get_sampling_defaults
from omnivideo.synthetic.chat import make_knowledge_example, make_question_example, make_talk_example
from omnivideo.synthetic.edits import sample_edit
from omnivideo.synthetic.questions import sample_question
from omnivideo.synthetic.rendering import render_scene
from omnivideo.synthetic.requests import make_caption_prompt, make_indirect_prompt
from omnivideo.synthetic.scenes import FPS, Scene, sample_scene
from omnivideo.synthetic.scorer import detect_scene

# The parts of the condition that the decoder sees: all; the text; the visual tokens; another prompt's visual tokens
# with the text.
ConditionMode = Literal["full", "text only", "visual only", "swapped"]
EvaluationProgress = Callable[[str, int, int], None]  # what is evaluated, the number of items done, the total


@dataclass(frozen=True)
class JudgedCase:
    """A held-out request of a task, what the model made of it, and its source, uint8 [F, H, W, 3]."""

    task: str
    kind: str
    text: str
    result: np.ndarray
    is_right: bool
    source: np.ndarray | None = None


RecordCase = Callable[[JudgedCase], None]


def ignore_case(case: JudgedCase) -> None:
    """Do nothing with a case whose verdict counts."""


CHUNK_SIZE = 25
MAX_ANSWER_TOKENS = 160
T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """The mean of `count` verdicts or values, with its standard error."""

    mean: float
    count: int
    standard_error: float = 0.0


def score_values(values: Iterable[float]) -> Score:
    """Return the mean of values or verdicts, with its standard error."""
    results = np.array(list(values), dtype=float)
    return Score(float(results.mean()), len(results), float(results.std() / len(results) ** 0.5))


def score_verdicts(verdicts: Iterable[bool]) -> Score:
    return score_values(verdicts)


def score_by_kind(prefix: str, verdicts: Mapping[str, Sequence[bool]]) -> dict[str, Score]:
    """Return a score for each kind, and one over all kinds, named by the prefix alone."""
    scores = {f"{prefix}: {kind}": score_verdicts(results) for kind, results in sorted(verdicts.items())}
    return scores | {prefix: score_verdicts(verdict for results in verdicts.values() for verdict in results)}


def iterate_chunks(items: Sequence[T]) -> Iterator[tuple[int, Sequence[T]]]:
    """Yield the items in chunks, each with the index of its first item."""
    for first in range(0, len(items), CHUNK_SIZE):
        yield first, items[first : first + CHUNK_SIZE]


def write_answer(omni: OmniVideoModel, message: MLLMMessage) -> str:
    """Return the MLLM's answer to a message, long enough for the reasoning and the rewrite of think mode."""
    return "".join(omni.bound_mllm.stream_text(message, max_tokens=MAX_ANSWER_TOKENS))


def build_message(text: str, shown: Scene | None = None) -> MLLMMessage:
    """Return a user's message with the rendered scene that the user attaches."""
    media = () if shown is None else (MLLMMedia(render_scene(shown), FPS, shown.is_video),)
    return MLLMMessage(text, media)


# ---------------------------------------------------------------- generation


def build_conditions(
    omni: OmniVideoModel,
    texts: Sequence[str],
    messages: Sequence[MLLMMessage],
    medium: Medium,
    mode: ConditionMode,
    source: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the condition and the null condition of a batch, under an ablation's mode."""
    negative = omni.preset.null.negative_prompt
    null = omni.build_null_condition(negative, len(texts), source, medium)
    if mode == "text only":
        return omni.build_condition(texts, [None] * len(texts), source), null
    visual = omni.compute_visual_tokens([(message, medium) for message in messages])
    if mode == "swapped":
        visual = visual.roll(1, dims=0)
    decoder_texts = [negative] * len(texts) if mode == "visual only" else texts
    adapted = list(omni.adapt_visual_tokens(visual, [medium] * len(texts)))
    return omni.build_condition(decoder_texts, adapted, source), null


@torch.no_grad()
def sample_clips(
    omni: OmniVideoModel,
    texts: Sequence[str],
    messages: Sequence[MLLMMessage],
    task: Task,
    seed: int,
    mode: ConditionMode = "full",
    source: Tensor | None = None,
    given: Tensor | None = None,
    frames: int | None = None,
) -> np.ndarray:
    """Generate clips, uint8 [B, F, H, W, 3], with the preset's steps and guidance; seeds count up from `seed`.

    `given` are the latents of the first frames; `frames` is the length, by default that of the task.
    """
    sampling = get_sampling_defaults(omni.preset, task)
    medium: Medium = "video" if sampling.frames > 1 else "image"
    condition, null = build_conditions(omni, texts, messages, medium, mode, source)
    grid = compute_latent_grid(sampling.width, sampling.height, frames or sampling.frames)
    x = sample_initial_noise(list(range(seed, seed + len(texts))), (omni.vae.config.z_dim, *grid), omni.device)
    experts, settings = [Expert(omni.decoder, condition, null)], (sampling.steps, sampling.guidance_scale)
    for step in denoise(experts, x, *settings, sampling.flow_shift, given_BzThw=given):
        x = step.state.latents
    return pixels_to_bytes(decode_latents(omni.vae, x))


def evaluate_generation(
    omni: OmniVideoModel,
    count: int,
    on_progress: EvaluationProgress,
    mode: ConditionMode = "full",
    record_case: RecordCase = ignore_case,
) -> dict[str, Score]:
    """Score GenEval's six categories and motion, with `count` held-out prompts each, and the steadiness of clips."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    steadiness: list[float] = []
    for category in CATEGORIES:
        prompts = sample_prompts(count, [category])
        is_video = prompts[0].is_video
        task = get_generation_task("video" if is_video else "image")
        for first, chunk in iterate_chunks(prompts):
            texts = [prompt.text for prompt in chunk]
            clips = sample_clips(omni, texts, [MLLMMessage(text) for text in texts], task, 1000 + first, mode)
            detections = [detect_scene(clip) for clip in clips]
            for prompt, clip, detection in zip(chunk, clips, detections, strict=True):
                is_right = prompt.scene_spec.is_met_by(detection)
                verdicts[category].append(is_right)
                record_case(JudgedCase(task, category, prompt.text, clip, is_right))
            steadiness += [detection.steadiness for detection in detections if is_video]
            on_progress(category, first + len(chunk), count)
    scores = {category: score_verdicts(results) for category, results in verdicts.items()}
    scores["mean of the categories"] = Score(
        float(np.mean([score.mean for score in scores.values()])),
        count * len(CATEGORIES),
        float(np.sqrt(np.sum([score.standard_error**2 for score in scores.values()]))) / len(CATEGORIES),
    )
    return scores | {"temporal steadiness": score_values(steadiness)}


# ---------------------------------------------------------------- understanding and routing


def evaluate_understanding(omni: OmniVideoModel, count: int, on_progress: EvaluationProgress) -> dict[str, Score]:
    """Score questions of every kind about held-out images and clips; an answer must equal the ground truth."""
    rng = random.Random("evaluation/understanding")
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for index in range(count):
        scene = sample_scene(rng, is_video=index % 2 == 1, split="held_out")
        question = sample_question(rng, scene)
        message = build_message(question.text, scene)
        text = "".join(omni.bound_mllm.stream_text(message, max_tokens=60))
        verdicts[question.kind].append(text.strip() == question.answer)
        on_progress("understanding", index + 1, count)
    return score_by_kind("understanding", verdicts)


def sample_routing_case(rng: random.Random) -> tuple[MLLMMessage, str]:
    """Return a message and the route that it should take: text, image or video."""
    kind = rng.choice(("image", "video", "image edit", "video edit", "question", "knowledge", "talk"))
    if kind in ("image", "video"):
        make_prompt = make_caption_prompt if rng.random() < 0.7 else make_indirect_prompt
        return MLLMMessage(make_prompt(rng, kind == "video")[0]), kind
    if kind in ("image edit", "video edit"):
        video = kind == "video edit"
        edit = sample_edit(rng, video, "held_out")
        return build_message(edit.instruction, edit.source), "video" if video else "image"
    makers = {"question": make_question_example, "knowledge": make_knowledge_example, "talk": make_talk_example}
    example = makers[kind](rng, rng.random() < 0.5)
    return build_message(example.text, example.shown), "text"


def evaluate_routing(omni: OmniVideoModel, count: int, on_progress: EvaluationProgress) -> dict[str, Score]:
    """Score the MLLM's routes of requests, edits, questions and small talk."""
    rng = random.Random("evaluation/routing")
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for index in range(count):
        message, expected = sample_routing_case(rng)
        route = omni.bound_mllm.route(message).kind
        verdicts[expected].append(route == expected)
        on_progress("routing", index + 1, count)
    return score_by_kind("routing", verdicts)

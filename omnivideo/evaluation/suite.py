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

from omnivideo.evaluation.prompts import CATEGORIES, prompts
from omnivideo.models.mllm import Message, answer, route
from omnivideo.models.omni import Omni, Target
from omnivideo.models.sampling import denoise, noise
from omnivideo.models.vae import decode, encode, to_bytes
from omnivideo.presets import Task, latent_grid
from omnivideo.training.edits import IMAGE_EDITS, VIDEO_EDITS, Edit, random_edit
from omnivideo.training.latents import to_pixels
from omnivideo.training.questions import random_question
from omnivideo.training.recipes.mllm import (
    caption_prompt,
    knowledge_sample,
    media_of,
    question_sample,
    riddle_prompt,
    talk_sample,
)
from omnivideo.training.scorer import read
from omnivideo.training.world import object_mask, random_scene, render

# What the decoder is told: everything; no visual tokens; visual tokens without the text; another prompt's tokens.
Mode = Literal["full", "text only", "visual only", "swapped"]
Tell = Callable[[str, int, int], None]
CHUNK = 25
T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """Share of right ones among `count`."""

    right: float
    count: int


def score(verdicts: Iterable[bool]) -> Score:
    found = list(verdicts)
    return Score(float(np.mean(found)), len(found))


def chunks(items: Sequence[T]) -> Iterator[tuple[int, Sequence[T]]]:
    for first in range(0, len(items), CHUNK):
        yield first, items[first : first + CHUNK]


def conditions(
    omni: Omni, texts: Sequence[str], messages: Sequence[Message], target: Target, mode: Mode, source: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The condition and the null condition of a batch, under an ablation's mode."""
    negative = omni.preset.negative_prompt
    null = omni.null_condition(negative, len(texts), source)
    if mode == "text only":
        return omni.condition(texts, [None] * len(texts), source), null
    visual = omni.visual_tokens([(message, target) for message in messages])
    if mode == "swapped":
        visual = visual.roll(1, dims=0)
    said = [negative] * len(texts) if mode == "visual only" else texts
    return omni.condition(said, list(omni.adapted(visual, [target] * len(texts))), source), null


@torch.no_grad()
def clips_of(
    omni: Omni,
    texts: Sequence[str],
    messages: Sequence[Message],
    task: Task,
    seed: int,
    mode: Mode = "full",
    source: Tensor | None = None,
) -> np.ndarray:
    """uint8 [B, F, H, W, 3] by the preset's steps and guidance for the task; seeds count up from `seed`."""
    chosen = omni.preset.sampling[task]
    target: Target = "video" if chosen.frames > 1 else "image"
    condition, null = conditions(omni, texts, messages, target, mode, source)
    grid = latent_grid(chosen.width, chosen.height, chosen.frames)
    x = noise(list(range(seed, seed + len(texts))), (omni.vae.config.z_dim, *grid), omni.device)
    for state in denoise(omni.decoder, x, condition, null, chosen.steps, chosen.guidance_scale, chosen.flow_shift):
        x = state.point.latents
    return to_bytes(decode(omni.vae, x))


def generation(omni: Omni, count: int, tell: Tell, mode: Mode = "full") -> dict[str, Score]:
    """GenEval's six categories and motion, `count` held-out prompts each; and how steady the clips are."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    steady: list[float] = []
    for category in CATEGORIES:
        wanted = prompts(count, [category])
        task: Task = "text-to-video" if wanted[0].video else "text-to-image"
        for first, chunk in chunks(wanted):
            texts = [one.text for one in chunk]
            drawn = clips_of(omni, texts, [Message(text) for text in texts], task, 1000 + first, mode)
            readings = [read(clip) for clip in drawn]
            verdicts[category] += [one.demand.met_by(reading) for one, reading in zip(chunk, readings, strict=True)]
            steady += [reading.steadiness for reading in readings if wanted[0].video]
            tell(category, first + len(chunk), count)
    scores = {name: score(found) for name, found in verdicts.items()}
    return scores | {"temporal steadiness": Score(float(np.mean(steady)), len(steady))}


def untouched_psnr(edit: Edit, source: np.ndarray, result: np.ndarray) -> float | None:
    """PSNR in dB over the pixels that belong to nothing that the edit names; None for a
    new background, which touches all of it."""
    if edit.kind == "background":
        return None
    kept = ~object_mask(replace(edit.source, things=edit.touched))
    error = np.mean((source[kept].astype(float) - result[kept].astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def held_out_edits(count: int, video: bool) -> list[Edit]:
    """Of every kind in turn, the same every time."""
    kinds = VIDEO_EDITS if video else IMAGE_EDITS
    rng = random.Random(f"evaluation/editing/{video}")
    return [random_edit(rng, video, "held_out", [kinds[at % len(kinds)]]) for at in range(count)]


@torch.no_grad()
def edited(omni: Omni, edits: Sequence[Edit], video: bool, seed: int) -> np.ndarray:
    """uint8 [B, F, H, W, 3] of their sources as the model changes them."""
    source = encode(omni.vae, to_pixels(edit.source for edit in edits).to(omni.device))
    messages = [Message(edit.instruction, (media_of(edit.source),)) for edit in edits]
    task: Task = "video-editing" if video else "image-editing"
    return clips_of(omni, [edit.instruction for edit in edits], messages, task, seed, source=source)


def editing(omni: Omni, count: int, tell: Tell, video: bool) -> dict[str, Score | float]:
    """Held-out edits of every kind: success, and PSNR of what should have stayed."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    kept: list[float] = []
    name = "video" if video else "image"
    for first, chunk in chunks(held_out_edits(count, video)):
        for edit, clip in zip(chunk, edited(omni, chunk, video, 2000 + first), strict=True):
            verdicts[edit.kind].append(edit.demand.met_by(read(clip)))
            psnr = untouched_psnr(edit, render(edit.source), clip)
            kept += [] if psnr is None else [psnr]
        tell(f"{name}-editing", first + len(chunk), count)
    scores: dict[str, Score | float] = {f"{name} edit: {kind}": score(found) for kind, found in verdicts.items()}
    scores[f"{name} edits"] = score(verdict for found in verdicts.values() for verdict in found)
    scores[f"{name} edits: untouched area, median dB"] = float(np.median(kept))
    return scores


def understanding(omni: Omni, count: int, tell: Tell) -> dict[str, Score]:
    """Questions of every kind about held-out stills and clips; an answer is right if it is the ground truth's."""
    rng = random.Random("evaluation/understanding")
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for at in range(count):
        scene = random_scene(rng, video=at % 2 == 1, split="held_out")
        question = random_question(rng, scene)
        message = Message(question.text, (media_of(scene),))
        text = "".join(answer(omni.mllm, omni.mllm_tokenizer, message, omni.pixels, most=60))
        verdicts[question.kind].append(text.strip() == question.answer)
        tell("understanding", at + 1, count)
    scores = {f"understanding: {kind}": score(found) for kind, found in sorted(verdicts.items())}
    return scores | {"understanding": score(one for found in verdicts.values() for one in found)}


def routing_case(rng: random.Random) -> tuple[Message, str]:
    """A request with the route that it should take."""
    kind = rng.choice(("image", "video", "image edit", "video edit", "question", "knowledge", "talk"))
    if kind in ("image", "video"):
        make = caption_prompt if rng.random() < 0.7 else riddle_prompt
        return Message(make(rng, kind == "video")[0]), kind
    if kind in ("image edit", "video edit"):
        video = kind == "video edit"
        edit = random_edit(rng, video, "held_out")
        return Message(edit.instruction, (media_of(edit.source),)), "video" if video else "image"
    make_text = {"question": question_sample, "knowledge": knowledge_sample, "talk": talk_sample}[kind]
    return make_text(rng, rng.random() < 0.5)[0], "text"


def routing(omni: Omni, count: int, tell: Tell) -> dict[str, Score]:
    rng = random.Random("evaluation/routing")
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for at in range(count):
        message, expected = routing_case(rng)
        found = route(omni.mllm, omni.mllm_tokenizer, message, omni.pixels).kind
        verdicts[expected].append(found == expected)
        tell("routing", at + 1, count)
    scores = {f"routing: {kind}": score(found) for kind, found in sorted(verdicts.items())}
    return scores | {"routing": score(one for found in verdicts.values() for one in found)}


def everything(omni: Omni, count: int, tell: Tell) -> dict[str, Score | float]:
    """All of the above, `count` a category."""
    scores: dict[str, Score | float] = {}
    scores |= generation(omni, count, tell)
    scores |= editing(omni, 2 * count, tell, video=False)
    scores |= editing(omni, 2 * count, tell, video=True)
    scores |= understanding(omni, 8 * count, tell)
    return scores | routing(omni, 8 * count, tell)

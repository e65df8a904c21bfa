"""TODO docstring of omnivideo/training/recipes/stage1.py."""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SiglipVisionModel

from omnivideo.models.mllm import VISUAL_TOKEN_PAIRS, VISUAL_TOKENS
from omnivideo.models.omni import OmniVideoModel
from omnivideo.training.data.batch import Stage1Batch
from omnivideo.training.data.chat_batch import (
    ChatSample,
    collate_chat_batch,
    count_answer_tokens,
    text_loss,
    to_device,
)
from omnivideo.training.data.prefetch import Prefetcher, return_unchanged
from omnivideo.training.data.visual_targets import embed_frames
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.recipe import Losses, MicroBatchLosses, Recipe, single_micro_batch, step_seed
from omnivideo.training.planning.flops import (
    Flops,
    count_matrix_weights,
    count_mllm_flops,
    count_query_transformer_flops,
)
from omnivideo.training.recipes.parts import TRAINABLE_BY_STAGE, TrainableParts
from omnivideo.training.tiny.latents import pixels_from_scenes
from omnivideo.training.tiny.mllm import (
    make_knowledge_sample,
    make_question_sample,
    make_route_sample,
    make_talk_sample,
    make_thinking_sample,
)
from omnivideo.training.tiny.requests import TASKS, TrainingRequest, sample_request

STAGE1_TEXT_MIX = (
    (make_question_sample, 0.5),
    (make_thinking_sample, 0.2),
    (make_route_sample, 0.18),
    (make_knowledge_sample, 0.06),
    (make_talk_sample, 0.06),
)


STAGE1_BATCH_SIZE, TEXT_BATCH_SIZE = 32, 48


def alignment_loss(visual_BQE: Tensor, target_BQE: Tensor) -> Tensor:
    """Eq. 1, the squared distance of the visual tokens to the encoder's embeddings, and the cosine that it allows.

    The embeddings are taken at mean 0 and deviation 1: the head ends in a layer norm, whose weights would have to grow
    tenfold to reach them as they are.
    """
    target = F.layer_norm(target_BQE, target_BQE.shape[-1:])
    return F.mse_loss(visual_BQE, target) + (1 - F.cosine_similarity(visual_BQE, target, dim=-1)).mean()


def assemble_stage1_recipe(
    omni: OmniVideoModel,
    encoder: SiglipVisionModel,
    load_batch: Callable[[int], Any],
    steps: int,
    batch_size: Callable[[int], int],
    workers: int = 0,
    to_micro_batches: Callable[[Any], list[Stage1Batch]] = return_unchanged,
) -> Recipe:
    """Eq. 1 for what is asked to be drawn, Eq. 2 for all answers; `draw` may run in another process, `ready` gets
    what it made in this one, and has the lesson of each pass."""
    model = TrainableParts(omni)
    queries = omni.bridge.vision_head.num_queries
    batches = Prefetcher(load_batch, workers)
    step_flops = Flops()

    def make_micro_batch_losses(step: int) -> MicroBatchLosses:
        nonlocal step_flops
        micro_batches = to_micro_batches(batches(step))
        local_flops = sum(
            (
                count_stage1_flops(omni, micro_batch.inputs, max(1, len(micro_batch.target_pixels)))
                for micro_batch in micro_batches
            ),
            Flops(),
        )
        step_flops = local_flops * (batch_size(step) / sum(len(micro_batch.labels) for micro_batch in micro_batches))
        answer_tokens = (
            torch.stack([count_answer_tokens(micro_batch.labels) for micro_batch in micro_batches])
            .sum()
            .to(omni.device)
        )
        token_count = current_rank().global_mean(answer_tokens) / len(micro_batches)
        return [partial(compute_loss, micro_batch, token_count) for micro_batch in micro_batches]

    def compute_loss(micro_batch: Stage1Batch, token_count: Tensor) -> Losses:
        inputs, labels = to_device(omni.device, (micro_batch.inputs, micro_batch.labels))
        target_count = len(micro_batch.target_pixels)
        with torch.no_grad():
            states = model.mllm.model(**inputs).last_hidden_state
        value, exact_share = text_loss(model.mllm.lm_head(states), labels, token_count)
        target_rows = slice(
            0, max(1, target_count)
        )  # where nothing is to be drawn the vision head goes along for nothing
        visual = model.bridge.vision_head(states[target_rows], inputs["attention_mask"][target_rows] == 0)
        if target_count:
            with torch.no_grad():
                target = embed_frames(encoder, micro_batch.target_pixels, queries)
            vision = alignment_loss(visual, target) * micro_batch.loss_weight
        else:
            vision = 0.0 * visual.sum()
        return {"loss": value + vision, "text": value, "vision": vision, "right": exact_share}

    return Recipe(
        "stage1",
        model,
        TRAINABLE_BY_STAGE["stage1"],
        make_micro_batch_losses,
        steps,
        lr=1e-2,
        adam_lr=2e-3,
        warmup=100,
        batch_size=batch_size,
        step_flops=lambda step: step_flops.total,
    )


def count_stage1_flops(omni: OmniVideoModel, inputs: Mapping[str, Tensor], target_count: int) -> Flops:
    """Of a batch of which `asked` rows go through the vision head.  The teacher's are not counted: it is no part of
    the model."""
    assert omni.preset.vision_head is not None, "a version 1 preset"
    rows, tokens = inputs["input_ids"].shape
    vision_head_flops = count_query_transformer_flops(omni.preset.vision_head, tokens).with_backward * target_count
    text_head_flops = Flops(2.0 * rows * tokens * count_matrix_weights(omni.mllm.lm_head))
    return (
        count_mllm_flops(omni.mllm, inputs) + vision_head_flops + text_head_flops.with_frozen_backward
    )  # the states, frozen, have no gradients


def build_stage1_recipe(
    omni: OmniVideoModel,
    encoder: SiglipVisionModel,
    steps: int = 2000,
    batch_size: int = STAGE1_BATCH_SIZE,
    workers: int = 0,
) -> Recipe:
    """Half of each batch asks for images and videos of all four tasks, half for text."""
    torch.manual_seed(11)

    def load_batch(step: int) -> list[Stage1Batch]:
        rng = random.Random(step_seed("stage1/data", step))
        requests = [sample_request(rng, rng.choice(TASKS)) for _ in range(batch_size // 2)]
        factories = rng.choices(
            [make for make, _ in STAGE1_TEXT_MIX], [weight for _, weight in STAGE1_TEXT_MIX], k=batch_size // 2
        )
        text_samples = [make(rng, rng.random() < 0.5) for make in factories]
        requests, text_samples = current_rank().take_local_rows(requests), current_rank().take_local_rows(text_samples)
        samples = [
            (request.message, "".join(VISUAL_TOKEN_PAIRS[request.medium])) for request in requests
        ] + text_samples
        return [
            Stage1Batch(
                *collate_chat_batch(omni.mllm, omni.mllm_tokenizer, samples, omni.vision_config),
                pixels_from_requests(requests),
            )
        ]

    return assemble_stage1_recipe(omni, encoder, load_batch, steps, lambda step: batch_size, workers)


def make_generation_sample(rng: random.Random, is_video: bool) -> ChatSample:
    """A request of any of the four tasks that draw, with the route that it takes."""
    request = sample_request(rng, rng.choice(TASKS[1::2] if is_video else TASKS[::2]))
    return request.message, "".join(VISUAL_TOKEN_PAIRS[request.medium])


def first_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 2 at the answers' first tokens."""
    first = (labels[:, 1:] != -100).int().argmax(dim=1)
    rows = torch.arange(len(labels), device=labels.device)
    return F.cross_entropy(logits[rows, first].float(), labels[rows, first + 1])


def text_only_loss(logits: Tensor, labels: Tensor, routes: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 2 over what is said, as it is said: no visual token comes up in a text.

    After its reasoning the model is where it is before a plain request; there a route is right and here a word.
    """
    routes = routes.to(labels.device)
    text_logits = logits.index_fill(-1, routes, torch.finfo(logits.dtype).min)
    return text_loss(text_logits, labels.masked_fill(torch.isin(labels, routes), -100))


def build_stage1_text_recipe(
    omni: OmniVideoModel, steps: int = 1500, batch_size: int = TEXT_BATCH_SIZE, workers: int = 0
) -> Recipe:
    """Stage 1 goes on with the text head alone, which needs more examples than the vision head.

    What later stages train does not depend on it, so it may run at any time after stage 1.
    """
    model = TrainableParts(omni)

    def load_batch(step: int) -> tuple[dict[str, Tensor], Tensor]:
        rng = random.Random(step_seed("stage1_text/data", step))
        factories = rng.choices(
            [make for make, _ in TEXT_HEAD_MIX], [weight for _, weight in TEXT_HEAD_MIX], k=batch_size
        )
        samples = current_rank().take_local_rows([make(rng, rng.random() < 0.5) for make in factories])
        return collate_chat_batch(omni.mllm, omni.mllm_tokenizer, samples, omni.vision_config)

    batches = Prefetcher(load_batch, workers)
    routes = torch.tensor(omni.mllm_tokenizer.convert_tokens_to_ids(list(VISUAL_TOKENS)))

    def compute_loss(step: int) -> Losses:
        inputs, labels = to_device(omni.device, batches(step))
        with torch.no_grad():
            states = model.mllm.model(**inputs).last_hidden_state
        logits = model.mllm.lm_head(states)
        first = first_token_loss(logits, labels)
        value, exact_share = text_only_loss(logits, labels, routes)
        return {"loss": value + first, "first": first, "right": exact_share}

    return Recipe(
        "stage1_text",
        model,
        TRAINABLE_BY_STAGE["stage1_text"],
        single_micro_batch(compute_loss),
        steps,
        adam_lr=1e-3,
        warmup=20,
        ema_decay=0.99,
        batch_size=lambda step: batch_size,
    )


def pixels_from_requests(requests: Sequence[TrainingRequest]) -> Tensor:
    """Pixels [B, 3, 9, H, W] of the targets; a still stands for all of its frames."""
    clips = [pixels_from_scenes([request.target]) for request in requests]
    frame_count = max(clip.shape[2] for clip in clips)
    return torch.cat([clip.expand(-1, -1, frame_count, -1, -1) if clip.shape[2] == 1 else clip for clip in clips])


TEXT_HEAD_MIX = (
    (make_question_sample, 0.45),
    (make_generation_sample, 0.25),
    (make_thinking_sample, 0.15),
    (make_route_sample, 0.07),
    (make_knowledge_sample, 0.04),
    (make_talk_sample, 0.04),
)

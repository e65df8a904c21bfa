"""The paper's three stages (sections 4.2 and 4.3): what is trained, what is frozen, by which loss.

stage1   vision head, text head              Eq. 1 + Eq. 2, understanding and generation together
stage1_text  text head                       Eq. 2 alone, the first token above all: it is the route
stage2a  adapter                             its output against the decoder's text embeddings
stage2b  adapter (with the visual context)   flow matching through the frozen decoder: T2I + T2V first
                                             (stage2b_generation), then all four tasks
stage3   vision head, adapter, decoder       flow matching, with Eq. 1 kept for the vision head
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionModel

from omnivideo.models.conditions import assemble_conditions, count_condition_tokens, pad_condition
from omnivideo.models.mllm import VISUAL_TOKEN_PAIRS, VISUAL_TOKENS, prepare_hidden_state_inputs, forward_hidden_states
from omnivideo.models.omni import OmniVideoModel, TargetMedium
from omnivideo.presets import count_visual_context_tokens
from omnivideo.training.ahead import Prefetcher, return_unchanged
from omnivideo.training.drawn import CachedTask, FlowBatch, collate_flow_batch, sample_mixed_batch
from omnivideo.training.flops import Flops, count_flow_stage_flops, count_adapter_stage_flops, count_matrix_weights, count_mllm_flops, count_query_transformer_flops
from omnivideo.training.latents import pixels_from_scenes
from omnivideo.training.recipes.decoder import sample_noise, flow_matching_loss
from omnivideo.training.recipes.mllm import (
    ChatSample,
    count_answer_tokens,
    collate_chat_batch,
    make_knowledge_sample,
    to_device,
    make_question_sample,
    make_route_sample,
    make_talk_sample,
    text_loss,
    make_thinking_sample,
)
from omnivideo.training.recipes.visual_encoder import embed_frames
from omnivideo.training.samples import TASKS, TrainingRequest, Task, sample_request
from omnivideo.training.share import current_rank
from omnivideo.training.trainer import Losses, MicroBatchLosses, Recipe, single_micro_batch, step_seed

STAGE1_TEXT_MIX = (
    (make_question_sample, 0.5), (make_thinking_sample, 0.2), (make_route_sample, 0.18), (make_knowledge_sample, 0.06), (make_talk_sample, 0.06),
)  # fmt: skip

STAGE1_BATCH_SIZE, TEXT_BATCH_SIZE = 32, 48
FLOW_BATCH_SIZES = (64, 24)  # stills and clips in a batch

# What each stage trains, by the beginnings of its parameters' names.
ADAPTER_PARTS = ("bridge.adapter", "bridge.visual_context", "bridge.markers")
TRAINABLE_BY_STAGE = {
    "stage1": ("mllm.lm_head", "bridge.vision_head"), "stage1_text": ("mllm.lm_head",), "stage2a": ("bridge.adapter",),
    "stage2b_generation": ADAPTER_PARTS, "stage2b": ADAPTER_PARTS, "stage3": ("bridge", "decoder"),
}  # fmt: skip
GENERATIVE_STAGES = tuple(name for name, parts in TRAINABLE_BY_STAGE.items() if "mllm.lm_head" not in parts)  # seen in samples

# Resolution and frame count are shared inside a group, so its tasks share a batch.
TASK_GROUPS: tuple[tuple[Task, ...], ...] = (("text-to-image", "image-editing"), ("text-to-video", "video-editing"))


class TrainableParts(nn.Module):
    """All trainable parts under the names that the stages speak of."""

    def __init__(self, omni: OmniVideoModel):
        super().__init__()
        self.mllm = omni.mllm
        self.bridge = omni.bridge
        self.decoder = omni.decoder


# ---------------------------------------------------------------- stage 1


def alignment_loss(visual_BQE: Tensor, target_BQE: Tensor) -> Tensor:
    """Eq. 1, the squared distance of the visual tokens to the encoder's embeddings, and the cosine that it allows.

    The embeddings are taken at mean 0 and deviation 1: the head ends in a layer norm, whose weights would have to grow
    tenfold to reach them as they are.
    """
    target = F.layer_norm(target_BQE, target_BQE.shape[-1:])
    return F.mse_loss(visual_BQE, target) + (1 - F.cosine_similarity(visual_BQE, target, dim=-1)).mean()


@dataclass
class Stage1Batch:
    """What a process has of a batch of stage 1 in one pass: model inputs and labels, those that ask for something
    drawn first, with the pixels [B, 3, F, S, S] of what they ask for; what their mean weighs among those of all."""

    inputs: dict[str, Tensor]
    labels: Tensor
    target_pixels: Tensor
    loss_weight: float = 1.0


def assemble_stage1_recipe(
    omni: OmniVideoModel, encoder: SiglipVisionModel, load_batch: Callable[[int], Any], steps: int,
    batch_size: Callable[[int], int], workers: int = 0, to_micro_batches: Callable[[Any], list[Stage1Batch]] = return_unchanged,
) -> Recipe:  # fmt: skip
    """Eq. 1 for what is asked to be drawn, Eq. 2 for all answers; `draw` may run in another process, `ready` gets
    what it made in this one, and has the lesson of each pass."""
    model = TrainableParts(omni)
    queries = omni.bridge.vision_head.num_queries
    batches = Prefetcher(load_batch, workers)
    step_flops = Flops()

    def make_micro_batch_losses(step: int) -> MicroBatchLosses:
        nonlocal step_flops
        micro_batches = to_micro_batches(batches(step))
        local_flops = sum((count_stage1_flops(omni, micro_batch.inputs, max(1, len(micro_batch.target_pixels))) for micro_batch in micro_batches), Flops())
        step_flops = local_flops * (batch_size(step) / sum(len(micro_batch.labels) for micro_batch in micro_batches))
        answer_tokens = torch.stack([count_answer_tokens(micro_batch.labels) for micro_batch in micro_batches]).sum().to(omni.device)
        token_count = current_rank().global_mean(answer_tokens) / len(micro_batches)
        return [partial(compute_loss, micro_batch, token_count) for micro_batch in micro_batches]

    def compute_loss(micro_batch: Stage1Batch, token_count: Tensor) -> Losses:
        inputs, labels = to_device(omni.device, (micro_batch.inputs, micro_batch.labels))
        target_count = len(micro_batch.target_pixels)
        with torch.no_grad():
            states = model.mllm.model(**inputs).last_hidden_state
        value, exact_share = text_loss(model.mllm.lm_head(states), labels, token_count)
        target_rows = slice(0, max(1, target_count))  # where nothing is to be drawn the vision head goes along for nothing
        visual = model.bridge.vision_head(states[target_rows], inputs["attention_mask"][target_rows] == 0)
        if target_count:
            with torch.no_grad():
                target = embed_frames(encoder, micro_batch.target_pixels, queries)
            vision = alignment_loss(visual, target) * micro_batch.loss_weight
        else:
            vision = 0.0 * visual.sum()
        return {"loss": value + vision, "text": value, "vision": vision, "right": exact_share}

    return Recipe(
        "stage1", model, TRAINABLE_BY_STAGE["stage1"], make_micro_batch_losses, steps, lr=1e-2, adam_lr=2e-3, warmup=100, batch_size=batch_size,
        step_flops=lambda step: step_flops.total,
    )  # fmt: skip


def count_stage1_flops(omni: OmniVideoModel, inputs: Mapping[str, Tensor], target_count: int) -> Flops:
    """Of a batch of which `asked` rows go through the vision head.  The teacher's are not counted: it is no part of
    the model."""
    assert omni.preset.vision_head is not None, "a version 1 preset"
    rows, tokens = inputs["input_ids"].shape
    vision_head_flops = count_query_transformer_flops(omni.preset.vision_head, tokens).with_backward * target_count
    text_head_flops = Flops(2.0 * rows * tokens * count_matrix_weights(omni.mllm.lm_head))
    return count_mllm_flops(omni.mllm, inputs) + vision_head_flops + text_head_flops.with_frozen_backward  # the states, frozen, have no gradients


def build_stage1_recipe(
    omni: OmniVideoModel, encoder: SiglipVisionModel, steps: int = 2000, batch_size: int = STAGE1_BATCH_SIZE, workers: int = 0
) -> Recipe:
    """Half of each batch asks for images and videos of all four tasks, half for text."""
    torch.manual_seed(11)

    def load_batch(step: int) -> list[Stage1Batch]:
        rng = random.Random(step_seed("stage1/data", step))
        requests = [sample_request(rng, rng.choice(TASKS)) for _ in range(batch_size // 2)]
        factories = rng.choices([make for make, _ in STAGE1_TEXT_MIX], [weight for _, weight in STAGE1_TEXT_MIX], k=batch_size // 2)
        text_samples = [make(rng, rng.random() < 0.5) for make in factories]
        requests, text_samples = current_rank().take_local_rows(requests), current_rank().take_local_rows(text_samples)
        samples = [(request.message, "".join(VISUAL_TOKEN_PAIRS[request.kind])) for request in requests] + text_samples
        return [Stage1Batch(*collate_chat_batch(omni.mllm, omni.mllm_tokenizer, samples, omni.vision_config), pixels_from_requests(requests))]

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


def build_stage1_text_recipe(omni: OmniVideoModel, steps: int = 1500, batch_size: int = TEXT_BATCH_SIZE, workers: int = 0) -> Recipe:
    """Stage 1 goes on with the text head alone, which needs more examples than the vision head.

    What later stages train does not depend on it, so it may run at any time after stage 1.
    """
    model = TrainableParts(omni)

    def load_batch(step: int) -> tuple[dict[str, Tensor], Tensor]:
        rng = random.Random(step_seed("stage1_text/data", step))
        factories = rng.choices([make for make, _ in TEXT_HEAD_MIX], [weight for _, weight in TEXT_HEAD_MIX], k=batch_size)
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
        "stage1_text", model, TRAINABLE_BY_STAGE["stage1_text"], single_micro_batch(compute_loss), steps, adam_lr=1e-3, warmup=20, ema_decay=0.99,
        batch_size=lambda step: batch_size,
    )  # fmt: skip


def pixels_from_requests(requests: Sequence[TrainingRequest]) -> Tensor:
    """Pixels [B, 3, 9, H, W] of the targets; a still stands for all of its frames."""
    clips = [pixels_from_scenes([request.target]) for request in requests]
    frame_count = max(clip.shape[2] for clip in clips)
    return torch.cat([clip.expand(-1, -1, frame_count, -1, -1) if clip.shape[2] == 1 else clip for clip in clips])


TEXT_HEAD_MIX = (
    (make_question_sample, 0.45), (make_generation_sample, 0.25), (make_thinking_sample, 0.15), (make_route_sample, 0.07),
    (make_knowledge_sample, 0.04), (make_talk_sample, 0.04),
)  # fmt: skip


# ---------------------------------------------------------------- stage 2a


def text_alignment_loss(tokens_LD: Tensor, text_ND: Tensor) -> Tensor:
    """How far adapter tokens are from a prompt's text embeddings.

    Each text embedding should be found among the adapter's tokens by attention, and the two means should agree.
    """
    attended = (text_ND @ tokens_LD.T / text_ND.shape[-1] ** 0.5).softmax(-1) @ tokens_LD
    return F.mse_loss(attended, text_ND) + F.mse_loss(tokens_LD.mean(0), text_ND.mean(0))


def batch_text_alignment_loss(omni: OmniVideoModel, visual_BQE: Tensor, media: Sequence[TargetMedium], texts: Sequence[Tensor]) -> Tensor:
    pairs = zip(omni.adapt_visual_tokens(visual_BQE, media), texts, strict=True)
    return torch.stack([text_alignment_loss(tokens, text) for tokens, text in pairs]).mean()


def assemble_stage2a_recipe(omni: OmniVideoModel, source: "FlowSource", steps: int, workers: int = 0) -> Recipe:
    """Over text-to-image and text-to-video samples whose text embeddings are there."""
    model = TrainableParts(omni)
    batches = Prefetcher(source.load_batch, workers)
    step_flops = Flops()

    def make_micro_batch_losses(step: int) -> MicroBatchLosses:
        nonlocal step_flops
        micro_batches = source.to_micro_batches(batches(step))
        step_flops = count_batch_flops(micro_batches, count_row_flops)
        return [partial(compute_loss, micro_batch) for micro_batch in micro_batches]

    def count_row_flops(batch: FlowBatch) -> Flops:
        return count_adapter_stage_flops(omni.preset, TRAINABLE_BY_STAGE["stage2a"], batch.hidden_states.shape[1], batch.medium == "video")

    def compute_loss(micro_batch: MicroBatch) -> Losses:
        batch = micro_batch.batch.to(omni.device)
        with torch.no_grad():
            visual = compute_visual_tokens(model, batch)
        return {"loss": batch_text_alignment_loss(omni, visual, [batch.medium] * len(batch), batch.unpadded_texts) * micro_batch.loss_weight}

    return Recipe(
        "stage2a", model, TRAINABLE_BY_STAGE["stage2a"], make_micro_batch_losses, steps, lr=5e-3, adam_lr=1e-3, warmup=100,
        batch_size=source.batch_size, step_flops=lambda step: step_flops.total, omni=omni,
    )  # fmt: skip


def build_stage2a_recipe(omni: OmniVideoModel, steps: int = 1000, batch_size: int = 32) -> Recipe:
    torch.manual_seed(12)
    model = TrainableParts(omni)
    step_flops = Flops()

    def compute_loss(step: int) -> Losses:
        nonlocal step_flops
        rng = random.Random(step_seed("stage2a/data", step))
        requests = current_rank().take_local_rows([sample_request(rng, rng.choice(TASKS[:2])) for _ in range(batch_size)])
        with torch.no_grad():
            texts = omni.encode_prompts([request.text for request in requests])
            inputs = prepare_hidden_state_inputs(omni.mllm_tokenizer, [(request.message, request.kind) for request in requests], omni.vision_config)
            states, padding = forward_hidden_states(model.mllm, inputs)
            visual = model.bridge.vision_head(states, padding)
        media = [request.kind for request in requests]
        local_flops = count_adapter_stage_flops(omni.preset, TRAINABLE_BY_STAGE["stage2a"], states.shape[1], "video" in media) * len(requests)
        step_flops = (local_flops + count_mllm_flops(model.mllm, inputs)) * (batch_size / len(requests))
        return {"loss": batch_text_alignment_loss(omni, visual, media, texts)}

    return Recipe(
        "stage2a", model, TRAINABLE_BY_STAGE["stage2a"], single_micro_batch(compute_loss), steps, lr=5e-3, adam_lr=1e-3, warmup=100,
        batch_size=lambda step: batch_size, step_flops=lambda step: step_flops.total, omni=omni,
    )  # fmt: skip


# ---------------------------------------------------------------- stages 2b and 3


@dataclass(frozen=True)
class ConditionDropout:
    """Chances that a sample's condition loses both text and visual tokens, only the text, or only the tokens."""

    both: float = 0.1
    text: float = 0.15
    visual: float = 0.05

    def drops_text(self, dropout_draw: float) -> bool:
        """Whether the text goes with this lot of 0 to 1."""
        return dropout_draw < self.both + self.text

    def drops_visual(self, dropout_draw: float) -> bool:
        """Whether the visual tokens go."""
        return dropout_draw < self.both or self.both + self.text <= dropout_draw < self.both + self.text + self.visual


def compute_visual_tokens(model: TrainableParts, batch: FlowBatch) -> Tensor:
    """V_o [B, Q, E] of a batch's hidden states."""
    lengths = torch.tensor(batch.hidden_lengths, device=batch.hidden_states.device)
    padding = torch.arange(batch.hidden_states.shape[1], device=batch.hidden_states.device) >= lengths[:, None]
    return model.bridge.vision_head(batch.hidden_states, padding)


def build_condition(
    omni: OmniVideoModel, model: TrainableParts, batch: FlowBatch, dropout_draws: Sequence[float], dropout: ConditionDropout, null_LD: Tensor, min_length: int = 0
) -> tuple[Tensor, Tensor]:
    """c [B, L, D] of a mixed batch, with drops by lot, and the visual tokens [B, Q, E] that it was made from.

    At least of this length: the decoder attends to padding as well, so it is to be that of the whole batch.
    """
    visual = compute_visual_tokens(model, batch)
    adapted = omni.adapt_visual_tokens(visual, [batch.medium] * len(batch))
    texts = [null_LD if dropout.drops_text(dropout_draw) else text for dropout_draw, text in zip(dropout_draws, batch.unpadded_texts, strict=True)]
    tokens = [None if dropout.drops_visual(dropout_draw) else token for dropout_draw, token in zip(dropout_draws, adapted, strict=True)]
    min_tokens, max_tokens = omni.preset.min_condition_tokens, omni.preset.max_condition_tokens
    condition = assemble_conditions(model.bridge.markers, texts, tokens, compute_source_contexts(model, batch), min_tokens, max_tokens)
    return pad_condition(condition, min_length, max_tokens), visual


def compute_condition_length(omni: OmniVideoModel, batch: FlowBatch, dropout_draws: Sequence[float], dropout: ConditionDropout, null_length: int) -> int:
    """L of `group_condition`'s, before it is made."""
    t, h, w = batch.target_latents.shape[2:]
    source_length, visual_length = count_visual_context_tokens(omni.preset, (t, h, w)), omni.count_adapter_tokens(batch.medium)
    rows = zip(dropout_draws, batch.text_lengths, batch.has_source.tolist(), strict=True)
    lengths = [
        count_condition_tokens(
            omni.bridge.markers, null_length if dropout.drops_text(dropout_draw) else text_length, None if dropout.drops_visual(dropout_draw) else visual_length,
            source_length if edited else None,
        )
        for dropout_draw, text_length, edited in rows
    ]  # fmt: skip
    return max(omni.preset.min_condition_tokens, *lengths)


def compute_source_contexts(model: TrainableParts, batch: FlowBatch) -> list[Tensor | None]:
    """Visual context tokens of the rows that have a source."""
    if batch.source_latents is None:
        return [None] * len(batch)
    contexts = iter(model.bridge.visual_context(batch.source_latents))
    return [next(contexts) if edited else None for edited in batch.has_source.tolist()]


@dataclass
class MicroBatch:
    """What a process has of a step's batch in one pass: which of the `whole` batch's samples these are, what their
    mean weighs among those of all passes, and what was done to them `before`, by the model's frozen parts."""

    batch: FlowBatch
    dropout_draws: list[float]
    global_size: int
    local_indices: slice | list[int]
    loss_weight: float = 1.0
    frozen_flops: Flops = field(default_factory=Flops)


class FlowSource(Protocol):
    """Where the samples of stages 2b and 3 come from.

    `draw` may run in another process; `ready` is called with what it made, where the models are, for the portion of
    each pass.
    """

    def load_batch(self, step: int) -> Any: ...
    def to_micro_batches(self, batch: Any) -> list[MicroBatch]: ...
    def batch_size(self, step: int) -> int: ...


class SyntheticSource:
    """Whatever tasks there are data for; images (0) and videos (1) take `turns`, `edits` is their share of a batch."""

    def __init__(
        self,
        name: str,
        data: Mapping[Task, CachedTask],
        batch_sizes: tuple[int, int],
        group_schedule: tuple[int, ...] = (0, 1),
        edit_share: float = 0.5,
    ):
        self.name, self.batch_sizes, self.group_schedule, self.edit_share = name, batch_sizes, group_schedule, edit_share
        self.task_groups = [[cached_task for task, cached_task in data.items() if task in names] for names in TASK_GROUPS]

    def load_batch(self, step: int) -> MicroBatch:
        rng = random.Random(step_seed(f"{self.name}/data", step))
        group_index = self.group_schedule[step % len(self.group_schedule)]
        task_samples = sample_mixed_batch(rng, self.task_groups[group_index], self.batch_sizes[group_index], self.edit_share)
        dropout_draws = [rng.random() for _ in task_samples]
        return MicroBatch(collate_flow_batch(current_rank().take_local_rows(task_samples)), current_rank().take_local_rows(dropout_draws), len(task_samples), current_rank().local_slice(len(task_samples)))

    def to_micro_batches(self, batch: MicroBatch) -> list[MicroBatch]:
        return [batch]

    def batch_size(self, step: int) -> int:
        return self.batch_sizes[self.group_schedule[step % len(self.group_schedule)]]


def build_flow_recipe(
    name: str, omni: OmniVideoModel, source: FlowSource, steps: int, lr: float, alignment_weight: float, high_noise_share: float = 0.5, workers: int = 0,
    trainable: tuple[str, ...] = (),
) -> Recipe:  # fmt: skip
    """Flow matching through the decoder over mixed batches.

    It trains what the stage of that name does, or what is `trained`.  `high` is the share of noise levels as the
    sampler visits them; `eq1` weighs the vision head's own loss.
    """
    model = TrainableParts(omni)
    with torch.no_grad():
        # The text encoder may lie elsewhere, and in another precision (`loading`).
        null = omni.encode_prompts([omni.preset.negative_prompt])[0].to(omni.device).float()
    batches = Prefetcher(source.load_batch, workers)
    trainable_parts = trainable or TRAINABLE_BY_STAGE[name]
    step_flops = Flops()

    def make_micro_batch_losses(step: int) -> MicroBatchLosses:
        nonlocal step_flops
        micro_batches = source.to_micro_batches(batches(step))
        condition_length = current_rank().global_max(max(compute_condition_length(omni, micro_batch.batch, micro_batch.dropout_draws, ConditionDropout(), len(null)) for micro_batch in micro_batches))
        step_flops = count_batch_flops(micro_batches, lambda batch: count_flow_flops(omni, trainable_parts, batch, condition_length))
        noise = sample_noise(micro_batches[0].global_size, micro_batches[0].batch.target_latents[:1].to(omni.device), high_noise_share)
        return [partial(compute_loss, micro_batch, condition_length, noise) for micro_batch in micro_batches]

    def compute_loss(micro_batch: MicroBatch, condition_length: int, noise: tuple[Tensor, Tensor]) -> Losses:
        batch = micro_batch.batch.to(omni.device)
        condition, visual = build_condition(omni, model, batch, micro_batch.dropout_draws, ConditionDropout(), null, condition_length)
        local_noise = noise[0][micro_batch.local_indices], noise[1][micro_batch.local_indices]
        errors = flow_matching_loss(model.decoder, batch.target_latents, condition, sigma_and_noise=local_noise)
        losses = {"loss": errors.mean()}
        if alignment_weight:
            losses["vision"] = alignment_loss(visual, batch.visual_embeddings)
            losses["loss"] = losses["loss"] + alignment_weight * losses["vision"]
        losses["loss"] = losses["loss"] * micro_batch.loss_weight
        medium_name = "clips" if batch.medium == "video" else "stills"
        for label, row_mask in ((f"{medium_name}", ~batch.has_source), (f"{medium_name} edited", batch.has_source)):
            if row_mask.any():
                losses[label] = errors[row_mask].mean()
        return losses

    return Recipe(
        name, model, trainable_parts, make_micro_batch_losses, steps, lr=lr, adam_lr=lr / 10, warmup=200, ema_decay=0.999,
        batch_size=source.batch_size, step_flops=lambda step: step_flops.total, omni=omni,
    )  # fmt: skip


def count_batch_flops(micro_batches: Sequence[MicroBatch], count_row_flops: Callable[[FlowBatch], Flops]) -> Flops:
    """Of the whole batch, as if the other processes' parts were like this one's; `each`: of one of these rows."""
    local_flops = sum((count_row_flops(micro_batch.batch) * len(micro_batch.batch) + micro_batch.frozen_flops for micro_batch in micro_batches), Flops())
    return local_flops * (micro_batches[0].global_size / sum(len(micro_batch.batch) for micro_batch in micro_batches))


def count_flow_flops(omni: OmniVideoModel, trainable: Sequence[str], batch: FlowBatch, condition_length: int) -> Flops:
    """Of one row, on average."""
    t, h, w = batch.target_latents.shape[2:]
    edit_share = int(batch.has_source.sum()) / len(batch)
    return count_flow_stage_flops(omni.preset, trainable, (t, h, w), condition_length, batch.hidden_states.shape[1], edit_share)


def build_adapter_recipe(
    name: str, omni: OmniVideoModel, data: Mapping[Task, CachedTask], steps: int, batch_sizes: tuple[int, int], workers: int
) -> Recipe:
    torch.manual_seed(13)
    return build_flow_recipe(name, omni, SyntheticSource(name, data, batch_sizes), steps, lr=5e-3, alignment_weight=0.0, workers=workers, trainable=ADAPTER_PARTS)


def build_stage2b_generation_recipe(
    omni: OmniVideoModel, data: Mapping[Task, CachedTask], steps: int = 600, batch_sizes: tuple[int, int] = FLOW_BATCH_SIZES, workers: int = 0
) -> Recipe:
    """The first sub-stage: text-to-image and text-to-video alone."""
    generation_data = {task: cached_task for task, cached_task in data.items() if task in TASKS[:2]}
    return build_adapter_recipe("stage2b_generation", omni, generation_data, steps, batch_sizes, workers)


def build_stage2b_recipe(
    omni: OmniVideoModel, data: Mapping[Task, CachedTask], steps: int = 800, batch_sizes: tuple[int, int] = FLOW_BATCH_SIZES, workers: int = 0
) -> Recipe:
    """The second: all four tasks through the frozen decoder."""
    return build_adapter_recipe("stage2b", omni, data, steps, batch_sizes, workers)


def build_stage3_recipe(
    omni: OmniVideoModel, data: Mapping[Task, CachedTask], steps: int = 21_000, batch_sizes: tuple[int, int] = FLOW_BATCH_SIZES, workers: int = 0
) -> Recipe:
    """Videos and edits more often than images and new ones: they are harder, and the decoder knows the others.

    At little noise the latents themselves tell what is to come; what to edit is learned from the condition at much.
    """
    torch.manual_seed(14)
    source = SyntheticSource("stage3", data, batch_sizes, group_schedule=(0, 1, 1, 1, 1), edit_share=0.8)
    return build_flow_recipe("stage3", omni, source, steps, lr=7e-3, alignment_weight=0.1, high_noise_share=0.9, workers=workers)

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
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from omnivideo.models.conditions import assemble_conditions, count_condition_tokens, pad_condition
from omnivideo.models.omni import OmniVideoModel
from omnivideo.presets import count_visual_context_tokens
from omnivideo.training.data.batch import (
    CachedTask,
    FlowBatch,
    FlowSource,
    MicroBatch,
    collate_flow_batch,
    sample_mixed_batch,
)
from omnivideo.training.data.prefetch import Prefetcher
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.recipe import Losses, MicroBatchLosses, Recipe, step_seed
from omnivideo.training.planning.flops import (
    Flops,
    count_flow_stage_flops,
)
from omnivideo.training.recipes.flow_matching import flow_matching_loss, sample_noise
from omnivideo.training.recipes.parts import ADAPTER_PARTS, TASK_GROUPS, TRAINABLE_BY_STAGE, TrainableParts
from omnivideo.training.recipes.stage1 import alignment_loss
from omnivideo.training.tiny.requests import TASKS, Task

FLOW_BATCH_SIZES = (64, 24)  # stills and clips in a batch


# ---------------------------------------------------------------- stage 1


# ---------------------------------------------------------------- stage 2a


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
    omni: OmniVideoModel,
    model: TrainableParts,
    batch: FlowBatch,
    dropout_draws: Sequence[float],
    dropout: ConditionDropout,
    null_LD: Tensor,
    min_length: int = 0,
) -> tuple[Tensor, Tensor]:
    """c [B, L, D] of a mixed batch, with drops by lot, and the visual tokens [B, Q, E] that it was made from.

    At least of this length: the decoder attends to padding as well, so it is to be that of the whole batch.
    """
    visual = compute_visual_tokens(model, batch)
    adapted = omni.adapt_visual_tokens(visual, [batch.medium] * len(batch))
    texts = [
        null_LD if dropout.drops_text(dropout_draw) else text
        for dropout_draw, text in zip(dropout_draws, batch.unpadded_texts, strict=True)
    ]
    tokens = [
        None if dropout.drops_visual(dropout_draw) else token
        for dropout_draw, token in zip(dropout_draws, adapted, strict=True)
    ]
    min_tokens, max_tokens = omni.preset.min_condition_tokens, omni.preset.max_condition_tokens
    condition = assemble_conditions(
        model.bridge.markers, texts, tokens, compute_source_contexts(model, batch), min_tokens, max_tokens
    )
    return pad_condition(condition, min_length, max_tokens), visual


def compute_condition_length(
    omni: OmniVideoModel, batch: FlowBatch, dropout_draws: Sequence[float], dropout: ConditionDropout, null_length: int
) -> int:
    """L of `group_condition`'s, before it is made."""
    t, h, w = batch.target_latents.shape[2:]
    source_length, visual_length = (
        count_visual_context_tokens(omni.preset, (t, h, w)),
        omni.count_adapter_tokens(batch.medium),
    )
    rows = zip(dropout_draws, batch.text_lengths, batch.has_source.tolist(), strict=True)
    lengths = [
        count_condition_tokens(
            omni.bridge.markers,
            null_length if dropout.drops_text(dropout_draw) else text_length,
            None if dropout.drops_visual(dropout_draw) else visual_length,
            source_length if edited else None,
        )
        for dropout_draw, text_length, edited in rows
    ]
    return max(omni.preset.min_condition_tokens, *lengths)


def compute_source_contexts(model: TrainableParts, batch: FlowBatch) -> list[Tensor | None]:
    """Visual context tokens of the rows that have a source."""
    if batch.source_latents is None:
        return [None] * len(batch)
    contexts = iter(model.bridge.visual_context(batch.source_latents))
    return [next(contexts) if edited else None for edited in batch.has_source.tolist()]


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
        self.name, self.batch_sizes, self.group_schedule, self.edit_share = (
            name,
            batch_sizes,
            group_schedule,
            edit_share,
        )
        self.task_groups = [
            [cached_task for task, cached_task in data.items() if task in names] for names in TASK_GROUPS
        ]

    def load_batch(self, step: int) -> MicroBatch:
        rng = random.Random(step_seed(f"{self.name}/data", step))
        group_index = self.group_schedule[step % len(self.group_schedule)]
        task_samples = sample_mixed_batch(
            rng, self.task_groups[group_index], self.batch_sizes[group_index], self.edit_share
        )
        dropout_draws = [rng.random() for _ in task_samples]
        return MicroBatch(
            collate_flow_batch(current_rank().take_local_rows(task_samples)),
            current_rank().take_local_rows(dropout_draws),
            len(task_samples),
            current_rank().local_slice(len(task_samples)),
        )

    def to_micro_batches(self, batch: MicroBatch) -> list[MicroBatch]:
        return [batch]

    def batch_size(self, step: int) -> int:
        return self.batch_sizes[self.group_schedule[step % len(self.group_schedule)]]


def build_flow_recipe(
    name: str,
    omni: OmniVideoModel,
    source: FlowSource,
    steps: int,
    lr: float,
    alignment_weight: float,
    high_noise_share: float = 0.5,
    workers: int = 0,
    trainable: tuple[str, ...] = (),
) -> Recipe:
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
        condition_length = current_rank().global_max(
            max(
                compute_condition_length(
                    omni, micro_batch.batch, micro_batch.dropout_draws, ConditionDropout(), len(null)
                )
                for micro_batch in micro_batches
            )
        )
        step_flops = count_batch_flops(
            micro_batches, lambda batch: count_flow_flops(omni, trainable_parts, batch, condition_length)
        )
        noise = sample_noise(
            micro_batches[0].global_size, micro_batches[0].batch.target_latents[:1].to(omni.device), high_noise_share
        )
        return [partial(compute_loss, micro_batch, condition_length, noise) for micro_batch in micro_batches]

    def compute_loss(micro_batch: MicroBatch, condition_length: int, noise: tuple[Tensor, Tensor]) -> Losses:
        batch = micro_batch.batch.to(omni.device)
        condition, visual = build_condition(
            omni, model, batch, micro_batch.dropout_draws, ConditionDropout(), null, condition_length
        )
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
        name,
        model,
        trainable_parts,
        make_micro_batch_losses,
        steps,
        lr=lr,
        adam_lr=lr / 10,
        warmup=200,
        ema_decay=0.999,
        batch_size=source.batch_size,
        step_flops=lambda step: step_flops.total,
        omni=omni,
    )


def count_batch_flops(micro_batches: Sequence[MicroBatch], count_row_flops: Callable[[FlowBatch], Flops]) -> Flops:
    """Of the whole batch, as if the other processes' parts were like this one's; `each`: of one of these rows."""
    local_flops = sum(
        (
            count_row_flops(micro_batch.batch) * len(micro_batch.batch) + micro_batch.frozen_flops
            for micro_batch in micro_batches
        ),
        Flops(),
    )
    return local_flops * (micro_batches[0].global_size / sum(len(micro_batch.batch) for micro_batch in micro_batches))


def count_flow_flops(omni: OmniVideoModel, trainable: Sequence[str], batch: FlowBatch, condition_length: int) -> Flops:
    """Of one row, on average."""
    t, h, w = batch.target_latents.shape[2:]
    edit_share = int(batch.has_source.sum()) / len(batch)
    return count_flow_stage_flops(
        omni.preset, trainable, (t, h, w), condition_length, batch.hidden_states.shape[1], edit_share
    )


def build_adapter_recipe(
    name: str,
    omni: OmniVideoModel,
    data: Mapping[Task, CachedTask],
    steps: int,
    batch_sizes: tuple[int, int],
    workers: int,
) -> Recipe:
    torch.manual_seed(13)
    return build_flow_recipe(
        name,
        omni,
        SyntheticSource(name, data, batch_sizes),
        steps,
        lr=5e-3,
        alignment_weight=0.0,
        workers=workers,
        trainable=ADAPTER_PARTS,
    )


def build_stage2b_generation_recipe(
    omni: OmniVideoModel,
    data: Mapping[Task, CachedTask],
    steps: int = 600,
    batch_sizes: tuple[int, int] = FLOW_BATCH_SIZES,
    workers: int = 0,
) -> Recipe:
    """The first sub-stage: text-to-image and text-to-video alone."""
    generation_data = {task: cached_task for task, cached_task in data.items() if task in TASKS[:2]}
    return build_adapter_recipe("stage2b_generation", omni, generation_data, steps, batch_sizes, workers)


def build_stage2b_recipe(
    omni: OmniVideoModel,
    data: Mapping[Task, CachedTask],
    steps: int = 800,
    batch_sizes: tuple[int, int] = FLOW_BATCH_SIZES,
    workers: int = 0,
) -> Recipe:
    """The second: all four tasks through the frozen decoder."""
    return build_adapter_recipe("stage2b", omni, data, steps, batch_sizes, workers)


def build_stage3_recipe(
    omni: OmniVideoModel,
    data: Mapping[Task, CachedTask],
    steps: int = 21_000,
    batch_sizes: tuple[int, int] = FLOW_BATCH_SIZES,
    workers: int = 0,
) -> Recipe:
    """Videos and edits more often than images and new ones: they are harder, and the decoder knows the others.

    At little noise the latents themselves tell what is to come; what to edit is learned from the condition at much.
    """
    torch.manual_seed(14)
    source = SyntheticSource("stage3", data, batch_sizes, group_schedule=(0, 1, 1, 1, 1), edit_share=0.8)
    return build_flow_recipe(
        "stage3", omni, source, steps, lr=7e-3, alignment_weight=0.1, high_noise_share=0.9, workers=workers
    )

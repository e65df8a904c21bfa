"""Stages 2b and 3 (paper section 4.3): flow matching through the decoder, under conditions of every task.

Shapes: B batch, L condition tokens, D width of the decoder's text input, Q visual tokens, E width of a visual token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from omnivideo.contracts import count_visual_context_tokens
from omnivideo.models.conditions import assemble_conditions, count_condition_tokens, pad_condition, zip_condition_parts
from omnivideo.models.omni import OmniVideoModel
from omnivideo.presets import ConditionPart
from omnivideo.training.data.batch import FlowBatch, FlowSource, MicroBatch
from omnivideo.training.data.prefetch import Prefetcher
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.recipe import Losses, MicroBatchLosses, Recipe
from omnivideo.training.planning.flops import Flops, count_flow_stage_flops
from omnivideo.training.recipes.losses import alignment_loss, flow_matching_loss, sample_noise
from omnivideo.training.recipes.parts import TRAINABLE_BY_STAGE, TrainableParts

FLOW_BATCH_SIZES = (64, 24)  # images and clips in a batch


@dataclass(frozen=True)
class ConditionDropout:
    """Probabilities that a sample's condition loses its text and its visual tokens, only its text, or only its tokens.

    One random number in 0..1 for each sample decides all three.
    """

    both: float = 0.1
    text: float = 0.15
    visual: float = 0.05

    def drops_text(self, dropout_draw: float) -> bool:
        return dropout_draw < self.both + self.text

    def drops_visual(self, dropout_draw: float) -> bool:
        return dropout_draw < self.both or self.both + self.text <= dropout_draw < self.both + self.text + self.visual


@dataclass
class FlowObjective:
    """The loss of stages 2b and 3.

    `null_LD` is the encoded negative prompt, which replaces dropped text. `high_noise_share` is the share of noise
    levels that follow the sampler's schedule; `alignment_weight` weights the vision head's own loss (Eq. 1).
    """

    omni: OmniVideoModel
    model: TrainableParts
    source: FlowSource
    load_batch: Callable[[int], object]
    trainable_parts: tuple[str, ...]
    null_LD: Tensor
    alignment_weight: float
    high_noise_share: float
    dropout: ConditionDropout = ConditionDropout()
    step_flops: Flops = field(default_factory=Flops)

    def make_micro_batch_losses(self, step: int) -> MicroBatchLosses:
        """Return the losses of a step's micro-batches.

        All micro-batches of all processes share one condition length, since the decoder attends to padding too.
        """
        micro_batches = self.source.to_micro_batches(self.load_batch(step))
        lengths = [
            compute_condition_length(
                self.omni, micro_batch.batch, micro_batch.dropout_draws, self.dropout, len(self.null_LD)
            )
            for micro_batch in micro_batches
        ]
        condition_length = current_rank().global_max(max(lengths))
        self.step_flops = count_batch_flops(micro_batches, partial(self.count_row_flops, condition_length))
        latents_like = micro_batches[0].batch.target_latents[:1].to(self.omni.device)
        noise = sample_noise(micro_batches[0].global_size, latents_like, self.high_noise_share)
        return [partial(self.compute_loss, micro_batch, condition_length, noise) for micro_batch in micro_batches]

    def compute_loss(self, micro_batch: MicroBatch, condition_length: int, noise: tuple[Tensor, Tensor]) -> Losses:
        """Return the loss of a micro-batch, and the mean error of each kind of sample in it.

        `noise` holds the noise levels and the noise of the global batch.
        """
        batch = micro_batch.batch.to(self.omni.device)
        condition_BLD, visual_BQE = build_condition(
            self.omni, self.model, batch, micro_batch.dropout_draws, self.dropout, self.null_LD, condition_length
        )
        sigma, noise_values = (tensor[micro_batch.local_indices] for tensor in noise)
        errors = flow_matching_loss(
            self.model.decoder,
            batch.target_latents,
            condition_BLD,
            sigma_and_noise=(sigma, noise_values),
            given_frames=batch.given_frames,
        )
        losses = {"loss": errors.mean()}
        if self.alignment_weight:
            losses["vision"] = alignment_loss(visual_BQE, batch.visual_embeddings)
            losses["loss"] = losses["loss"] + self.alignment_weight * losses["vision"]
        losses["loss"] = losses["loss"] * micro_batch.loss_weight
        medium_name = "clips" if batch.medium == "video" else "stills"
        if batch.given_frames:
            return losses | {"clips continued": errors.mean()}
        for label, row_mask in ((medium_name, ~batch.has_source), (f"{medium_name} edited", batch.has_source)):
            if row_mask.any():
                losses[label] = errors[row_mask].mean()
        return losses

    def count_row_flops(self, condition_length: int, batch: FlowBatch) -> Flops:
        """Return the FLOPs of an average row."""
        t, h, w = batch.target_latents.shape[2:]
        edit_share = int(batch.has_source.sum()) / len(batch)
        hidden_length = batch.hidden_states.shape[1]
        return count_flow_stage_flops(
            self.omni.preset, self.trainable_parts, (t, h, w), condition_length, hidden_length, edit_share
        )


def compute_visual_tokens(model: TrainableParts, batch: FlowBatch) -> Tensor:
    """Return the visual tokens [B, Q, E] of a batch's hidden states."""
    lengths = torch.tensor(batch.hidden_lengths, device=batch.hidden_states.device)
    padding = torch.arange(batch.hidden_states.shape[1], device=batch.hidden_states.device) >= lengths[:, None]
    visual_BQE: Tensor = model.bridge.vision_head(batch.hidden_states, padding)
    return visual_BQE


def build_condition(
    omni: OmniVideoModel,
    model: TrainableParts,
    batch: FlowBatch,
    dropout_draws: Sequence[float],
    dropout: ConditionDropout,
    null_LD: Tensor,
    min_length: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the condition [B, L, D] with L >= `min_length`, and the visual tokens [B, Q, E] that it was built from."""
    visual_BQE = compute_visual_tokens(model, batch)
    adapted = omni.adapt_visual_tokens(visual_BQE, [batch.medium] * len(batch))
    texts = [
        null_LD if dropout.drops_text(draw) else text
        for draw, text in zip(dropout_draws, batch.unpadded_texts, strict=True)
    ]
    tokens = [None if dropout.drops_visual(draw) else row for draw, row in zip(dropout_draws, adapted, strict=True)]
    contexts = compute_source_contexts(model, batch)
    rows = zip_condition_parts({"text": texts, "visual": tokens, "source": contexts})
    config = omni.preset.condition
    condition_BLD = assemble_conditions(config, model.bridge.markers, rows, texts[0].dtype)
    return pad_condition(condition_BLD, min_length, config.max_tokens), visual_BQE


def compute_condition_length(
    omni: OmniVideoModel, batch: FlowBatch, dropout_draws: Sequence[float], dropout: ConditionDropout, null_length: int
) -> int:
    """Return the length L that `build_condition` gives a batch if no minimum is set."""
    latents = batch.target_latents if batch.source_latents is None else batch.source_latents
    t, h, w = latents.shape[2:]
    source_length = count_visual_context_tokens(omni.preset, (t, h, w))
    visual_length = omni.count_adapter_tokens(batch.medium)
    lengths = []
    for draw, text_length, has_source in zip(dropout_draws, batch.text_lengths, batch.has_source.tolist(), strict=True):
        counts: dict[ConditionPart, int] = {"text": null_length if dropout.drops_text(draw) else text_length}
        if not dropout.drops_visual(draw):
            counts["visual"] = visual_length
        if has_source:
            counts["source"] = source_length
        lengths.append(count_condition_tokens(omni.preset.condition, omni.bridge.markers, counts))
    return max(omni.preset.condition.min_tokens, *lengths)


def compute_source_contexts(model: TrainableParts, batch: FlowBatch) -> list[Tensor | None]:
    """Return the visual context tokens of each row, None for rows without a source."""
    if batch.source_latents is None:
        return [None] * len(batch)
    contexts = iter(model.bridge.visual_context(batch.source_latents))
    return [next(contexts) if has_source else None for has_source in batch.has_source.tolist()]


def count_batch_flops(micro_batches: Sequence[MicroBatch], count_row_flops: Callable[[FlowBatch], Flops]) -> Flops:
    """Return the FLOPs of a global batch, under the assumption that all processes have batches like this one's."""
    local_flops = Flops()
    for micro_batch in micro_batches:
        local_flops += count_row_flops(micro_batch.batch) * len(micro_batch.batch) + micro_batch.frozen_flops
    return local_flops * (micro_batches[0].global_size / sum(len(micro_batch.batch) for micro_batch in micro_batches))


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
    """Build the recipe of stage 2b or 3 over a source of mixed batches.

    It trains what the stage of that name trains, unless `trainable` names other parts.
    """
    with torch.no_grad():
        # The text encoder may be on another device and in another precision than the decoder.
        null_LD = omni.encode_prompts([omni.preset.null.negative_prompt])[0].to(omni.device).float()
    objective = FlowObjective(
        omni,
        TrainableParts(omni),
        source,
        Prefetcher(source.load_batch, workers),
        trainable or TRAINABLE_BY_STAGE[name],
        null_LD,
        alignment_weight,
        high_noise_share,
    )
    return Recipe(
        name,
        objective.model,
        objective.trainable_parts,
        objective.make_micro_batch_losses,
        steps,
        lr=lr,
        adam_lr=lr / 10,
        warmup=200,
        ema_decay=0.999,
        batch_size=source.batch_size,
        step_flops=lambda step: objective.step_flops.total,
        omni=omni,
    )

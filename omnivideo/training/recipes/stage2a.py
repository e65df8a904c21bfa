"""Stage 2a (paper section 4.3): the adapter's output against the decoder's text embeddings.

Shapes: B batch, Q visual tokens, E width of a visual token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from omnivideo.contracts import Medium
from omnivideo.models.omni import OmniVideoModel
from omnivideo.training.data.batch import FlowBatch, FlowSource, MicroBatch
from omnivideo.training.data.prefetch import Prefetcher
from omnivideo.training.engine.recipe import Losses, MicroBatchLosses, Recipe
from omnivideo.training.planning.flops import Flops, count_adapter_stage_flops
from omnivideo.training.recipes.flow import compute_visual_tokens, count_batch_flops
from omnivideo.training.recipes.losses import text_alignment_loss
from omnivideo.training.recipes.parts import TRAINABLE_BY_STAGE, TrainableParts


def batch_text_alignment_loss(
    omni: OmniVideoModel, visual_BQE: Tensor, media: Sequence[Medium], texts: Sequence[Tensor]
) -> Tensor:
    """Return the mean over a batch of the distances of adapter tokens from text embeddings [N, D]."""
    pairs = zip(omni.adapt_visual_tokens(visual_BQE, media), texts, strict=True)
    return torch.stack([text_alignment_loss(tokens_LD, text_ND) for tokens_LD, text_ND in pairs]).mean()


@dataclass
class Stage2aObjective:
    """The loss of stage 2a over text-to-image and text-to-video samples with text embeddings."""

    omni: OmniVideoModel
    model: TrainableParts
    source: FlowSource
    load_batch: Callable[[int], object]
    step_flops: Flops = field(default_factory=Flops)

    def make_micro_batch_losses(self, step: int) -> MicroBatchLosses:
        micro_batches = self.source.to_micro_batches(self.load_batch(step))
        self.step_flops = count_batch_flops(micro_batches, self.count_row_flops)
        return [partial(self.compute_loss, micro_batch) for micro_batch in micro_batches]

    def count_row_flops(self, batch: FlowBatch) -> Flops:
        return count_adapter_stage_flops(
            self.omni.preset, TRAINABLE_BY_STAGE["stage2a"], batch.hidden_states.shape[1], batch.medium == "video"
        )

    def compute_loss(self, micro_batch: MicroBatch) -> Losses:
        batch = micro_batch.batch.to(self.omni.device)
        with torch.no_grad():
            visual_BQE = compute_visual_tokens(self.model, batch)
        loss = batch_text_alignment_loss(self.omni, visual_BQE, [batch.medium] * len(batch), batch.unpadded_texts)
        return {"loss": loss * micro_batch.loss_weight}


def assemble_stage2a_recipe(omni: OmniVideoModel, source: FlowSource, steps: int, workers: int = 0) -> Recipe:
    """Build the recipe of stage 2a over batches from any source."""
    objective = Stage2aObjective(omni, TrainableParts(omni), source, Prefetcher(source.load_batch, workers))
    return Recipe(
        "stage2a",
        objective.model,
        TRAINABLE_BY_STAGE["stage2a"],
        objective.make_micro_batch_losses,
        steps,
        lr=5e-3,
        adam_lr=1e-3,
        warmup=100,
        batch_size=source.batch_size,
        step_flops=lambda step: objective.step_flops.total,
        omni=omni,
    )

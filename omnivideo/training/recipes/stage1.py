"""Stage 1 (paper section 4.2): the vision head by Eq. 1, and the text head by Eq. 2.

Shapes: B batch, N tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SiglipVisionModel

from omnivideo.models.omni import OmniVideoModel
from omnivideo.training.data.batch import Stage1Batch
from omnivideo.training.data.chat_batch import count_answer_tokens, text_loss, to_device
from omnivideo.training.data.prefetch import Prefetcher, return_unchanged
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.recipe import Losses, MicroBatchLosses, Recipe
from omnivideo.training.planning.flops import (
    Flops,
    count_matrix_weights,
    count_mllm_flops,
    count_query_transformer_flops,
)
from omnivideo.training.recipes.losses import alignment_loss, embed_frames
from omnivideo.training.recipes.parts import TRAINABLE_BY_STAGE, TrainableParts


@dataclass
class Stage1Objective:
    """The loss of stage 1: Eq. 1 for the rows that have a target, Eq. 2 for all answers.

    `load_batch` may run in another process. `to_micro_batches` splits its result in this process.
    """

    omni: OmniVideoModel
    model: TrainableParts
    encoder: SiglipVisionModel
    load_batch: Callable[[int], Any]
    to_micro_batches: Callable[[Any], list[Stage1Batch]]
    batch_size: Callable[[int], int]
    step_flops: Flops = field(default_factory=Flops)

    def make_micro_batch_losses(self, step: int) -> MicroBatchLosses:
        micro_batches = self.to_micro_batches(self.load_batch(step))
        local_flops, row_count = Flops(), 0
        for micro_batch in micro_batches:
            target_count = max(1, len(micro_batch.target_pixels))
            local_flops += count_stage1_flops(self.omni, micro_batch.inputs, target_count)
            row_count += len(micro_batch.labels)
        self.step_flops = local_flops * (self.batch_size(step) / row_count)
        answer_tokens = torch.stack([count_answer_tokens(micro_batch.labels) for micro_batch in micro_batches])
        token_count = current_rank().global_mean(answer_tokens.sum().to(self.omni.device)) / len(micro_batches)
        return [partial(self.compute_loss, micro_batch, token_count) for micro_batch in micro_batches]

    def compute_loss(self, micro_batch: Stage1Batch, token_count: Tensor) -> Losses:
        """Return the losses of a micro-batch; `token_count` is the mean number of answer tokens of all micro-batches.

        The rows with a target come first. A micro-batch without any passes its first row through the vision head with
        weight 0, so that every parameter has a gradient.
        """
        inputs, labels = to_device(self.omni.device, (micro_batch.inputs, micro_batch.labels))
        target_count = len(micro_batch.target_pixels)
        with torch.no_grad():
            states = self.model.mllm.model(**inputs).last_hidden_state
        text, exact_share = text_loss(self.model.mllm.lm_head(states), labels, token_count)
        rows = slice(0, max(1, target_count))
        visual = self.model.bridge.vision_head(states[rows], inputs["attention_mask"][rows] == 0)
        if target_count:
            with torch.no_grad():
                target = embed_frames(self.encoder, micro_batch.target_pixels, self.omni.bridge.vision_head.num_queries)
            vision = alignment_loss(visual, target) * micro_batch.loss_weight
        else:
            vision = 0.0 * visual.sum()
        return {"loss": text + vision, "text": text, "vision": vision, "exact_match": exact_share}


def assemble_stage1_recipe(
    omni: OmniVideoModel,
    encoder: SiglipVisionModel,
    load_batch: Callable[[int], Any],
    steps: int,
    batch_size: Callable[[int], int],
    workers: int = 0,
    to_micro_batches: Callable[[Any], list[Stage1Batch]] = return_unchanged,
) -> Recipe:
    """Build the recipe of stage 1 over batches from any source."""
    objective = Stage1Objective(
        omni, TrainableParts(omni), encoder, Prefetcher(load_batch, workers), to_micro_batches, batch_size
    )
    return Recipe(
        "stage1",
        objective.model,
        TRAINABLE_BY_STAGE["stage1"],
        objective.make_micro_batch_losses,
        steps,
        lr=1e-2,
        adam_lr=2e-3,
        warmup=100,
        batch_size=batch_size,
        step_flops=lambda step: objective.step_flops.total,
    )


def count_stage1_flops(omni: OmniVideoModel, inputs: Mapping[str, Tensor], target_count: int) -> Flops:
    """Return the FLOPs of a batch whose first `target_count` rows go through the vision head.

    The visual encoder is not counted, since it is not part of the model. The MLLM's states are frozen and have no
    gradients.
    """
    assert omni.preset.vision_head is not None, "a version 1 preset"
    rows, tokens = inputs["input_ids"].shape
    vision_head_flops = count_query_transformer_flops(omni.preset.vision_head, tokens).with_backward * target_count
    text_head_flops = Flops(2.0 * rows * tokens * count_matrix_weights(omni.mllm.lm_head))
    return count_mllm_flops(omni.mllm, inputs) + vision_head_flops + text_head_flops.with_frozen_backward


def first_token_loss(logits_BNV: Tensor, labels_BN: Tensor) -> Tensor:
    """Return Eq. 2 at the first token of each answer."""
    first = (labels_BN[:, 1:] != -100).int().argmax(dim=1)
    rows = torch.arange(len(labels_BN), device=labels_BN.device)
    return F.cross_entropy(logits_BNV[rows, first].float(), labels_BN[rows, first + 1])


def text_only_loss(logits_BNV: Tensor, labels_BN: Tensor, route_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return Eq. 2 over ordinary text, and the share of exact answers, without visual tokens in labels or predictions.

    The state after the reasoning resembles that before a plain answer, where a route is correct; here a word is.
    """
    route_ids = route_ids.to(labels_BN.device)
    text_logits = logits_BNV.index_fill(-1, route_ids, torch.finfo(logits_BNV.dtype).min)
    return text_loss(text_logits, labels_BN.masked_fill(torch.isin(labels_BN, route_ids), -100))

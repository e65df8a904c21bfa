"""TODO docstring of omnivideo/training/recipes/stage2a.py."""

import random
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from omnivideo.models.mllm import forward_hidden_states, prepare_hidden_state_inputs
from omnivideo.models.omni import OmniVideoModel, TargetMedium
from omnivideo.training.data.batch import (
    FlowBatch,
    FlowSource,
    MicroBatch,
)
from omnivideo.training.data.prefetch import Prefetcher
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.recipe import Losses, MicroBatchLosses, Recipe, single_micro_batch, step_seed
from omnivideo.training.planning.flops import (
    Flops,
    count_adapter_stage_flops,
    count_mllm_flops,
)
from omnivideo.training.recipes.flow import compute_visual_tokens, count_batch_flops
from omnivideo.training.recipes.parts import TRAINABLE_BY_STAGE, TrainableParts
from omnivideo.training.tiny.requests import TASKS, sample_request


def text_alignment_loss(tokens_LD: Tensor, text_ND: Tensor) -> Tensor:
    """How far adapter tokens are from a prompt's text embeddings.

    Each text embedding should be found among the adapter's tokens by attention, and the two means should agree.
    """
    attended = (text_ND @ tokens_LD.T / text_ND.shape[-1] ** 0.5).softmax(-1) @ tokens_LD
    return F.mse_loss(attended, text_ND) + F.mse_loss(tokens_LD.mean(0), text_ND.mean(0))


def batch_text_alignment_loss(
    omni: OmniVideoModel, visual_BQE: Tensor, media: Sequence[TargetMedium], texts: Sequence[Tensor]
) -> Tensor:
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
        return count_adapter_stage_flops(
            omni.preset, TRAINABLE_BY_STAGE["stage2a"], batch.hidden_states.shape[1], batch.medium == "video"
        )

    def compute_loss(micro_batch: MicroBatch) -> Losses:
        batch = micro_batch.batch.to(omni.device)
        with torch.no_grad():
            visual = compute_visual_tokens(model, batch)
        return {
            "loss": batch_text_alignment_loss(omni, visual, [batch.medium] * len(batch), batch.unpadded_texts)
            * micro_batch.loss_weight
        }

    return Recipe(
        "stage2a",
        model,
        TRAINABLE_BY_STAGE["stage2a"],
        make_micro_batch_losses,
        steps,
        lr=5e-3,
        adam_lr=1e-3,
        warmup=100,
        batch_size=source.batch_size,
        step_flops=lambda step: step_flops.total,
        omni=omni,
    )


def build_stage2a_recipe(omni: OmniVideoModel, steps: int = 1000, batch_size: int = 32) -> Recipe:
    torch.manual_seed(12)
    model = TrainableParts(omni)
    step_flops = Flops()

    def compute_loss(step: int) -> Losses:
        nonlocal step_flops
        rng = random.Random(step_seed("stage2a/data", step))
        requests = current_rank().take_local_rows(
            [sample_request(rng, rng.choice(TASKS[:2])) for _ in range(batch_size)]
        )
        with torch.no_grad():
            texts = omni.encode_prompts([request.text for request in requests])
            inputs = prepare_hidden_state_inputs(
                omni.mllm_tokenizer, [(request.message, request.medium) for request in requests], omni.vision_config
            )
            states, padding = forward_hidden_states(model.mllm, inputs)
            visual = model.bridge.vision_head(states, padding)
        media = [request.medium for request in requests]
        local_flops = count_adapter_stage_flops(
            omni.preset, TRAINABLE_BY_STAGE["stage2a"], states.shape[1], "video" in media
        ) * len(requests)
        step_flops = (local_flops + count_mllm_flops(model.mllm, inputs)) * (batch_size / len(requests))
        return {"loss": batch_text_alignment_loss(omni, visual, media, texts)}

    return Recipe(
        "stage2a",
        model,
        TRAINABLE_BY_STAGE["stage2a"],
        single_micro_batch(compute_loss),
        steps,
        lr=5e-3,
        adam_lr=1e-3,
        warmup=100,
        batch_size=lambda step: batch_size,
        step_flops=lambda step: step_flops.total,
        omni=omni,
    )

"""Stages 1 and 2a over the synthetic world, with the tiny preset's steps, batch sizes and learning rates."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import SiglipVisionModel

from omnivideo.contracts import TASKS, Medium, get_task_medium, is_editing_task
from omnivideo.models.mllm import (
    VISUAL_TOKEN_PAIRS,
    VISUAL_TOKENS,
    forward_hidden_states,
    prepare_hidden_state_inputs,
)
from omnivideo.models.omni import OmniVideoModel
from omnivideo.synthetic.chat import (
    ChatExample,
    make_knowledge_example,
    make_question_example,
    make_refusal_example,
    make_talk_example,
    make_thinking_example,
)
from omnivideo.synthetic.requests import (
    CONTINUATION_TASKS,
    SceneRequest,
    make_indirect_prompt,
    sample_continuation_request,
    sample_request,
)
from omnivideo.synthetic.wording import vary_wording
from omnivideo.training.data.batch import Stage1Batch
from omnivideo.training.data.chat_batch import collate_chat_batch, to_device
from omnivideo.training.data.prefetch import Prefetcher
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.recipe import Losses, Recipe, single_micro_batch, step_seed
from omnivideo.training.planning.flops import Flops, count_adapter_stage_flops, count_mllm_flops
from omnivideo.training.recipes.parts import TRAINABLE_BY_STAGE, TrainableParts
from omnivideo.training.recipes.stage1 import assemble_stage1_recipe, first_token_loss, text_only_loss
from omnivideo.training.recipes.stage2a import batch_text_alignment_loss
from omnivideo.training.tiny.latents import pixels_from_scenes
from omnivideo.training.tiny.mllm import ExampleMix, message_from_request, sample_examples, to_chat_sample

STAGE1_BATCH_SIZE, TEXT_BATCH_SIZE = 32, 48


def get_route_answer(medium: Medium) -> str:
    """Return the answer that routes a request to generation."""
    return "".join(VISUAL_TOKEN_PAIRS[medium])


def make_route_example(rng: random.Random, is_video: bool) -> ChatExample:
    """Return an indirect request with its route."""
    text = make_indirect_prompt(rng, is_video)[0]
    return ChatExample(vary_wording(rng, text), get_route_answer("video" if is_video else "image"))


def make_generation_example(rng: random.Random, is_video: bool) -> ChatExample:
    """Return a request of any generative task of the medium, with its route."""
    tasks = [task for task in TASKS if (get_task_medium(task) == "video") == is_video]
    if is_video and rng.random() < 0.3:
        request = sample_continuation_request(rng, rng.choice(CONTINUATION_TASKS[:2]))
    else:
        request = sample_request(rng, rng.choice(tasks))
    return ChatExample(vary_wording(rng, request.text), get_route_answer(request.medium), request.source)


STAGE1_TEXT_MIX: ExampleMix = (
    (make_question_example, 0.4),
    (make_thinking_example, 0.2),
    (make_route_example, 0.18),
    (make_refusal_example, 0.1),
    (make_knowledge_example, 0.06),
    (make_talk_example, 0.06),
)
TEXT_HEAD_MIX: ExampleMix = (
    (make_question_example, 0.33),
    (make_generation_example, 0.25),
    (make_thinking_example, 0.17),
    (make_refusal_example, 0.1),
    (make_route_example, 0.07),
    (make_knowledge_example, 0.04),
    (make_talk_example, 0.04),
)


def pixels_from_requests(requests: Sequence[SceneRequest]) -> Tensor:
    """Return the pixels [B, 3, F, H, W] of the targets. A still among clips is repeated for all frames."""
    clips = [pixels_from_scenes([request.target]) for request in requests]
    frame_count = max(clip.shape[2] for clip in clips)
    return torch.cat([clip.expand(-1, -1, frame_count, -1, -1) if clip.shape[2] == 1 else clip for clip in clips])


def build_stage1_recipe(
    omni: OmniVideoModel,
    encoder: SiglipVisionModel,
    steps: int = 2000,
    batch_size: int = STAGE1_BATCH_SIZE,
    workers: int = 0,
) -> Recipe:
    """Build the recipe of stage 1: half of each batch requests images and videos in all four tasks, half text."""
    torch.manual_seed(11)

    def load_batch(step: int) -> list[Stage1Batch]:
        rng = random.Random(step_seed("stage1/data", step))
        requests = [sample_request(rng, rng.choice(TASKS)) for _ in range(batch_size // 2)]
        examples = sample_examples(rng, STAGE1_TEXT_MIX, batch_size // 2)
        requests, examples = current_rank().take_local_rows(requests), current_rank().take_local_rows(examples)
        samples = [(message_from_request(request), get_route_answer(request.medium)) for request in requests]
        samples += map(to_chat_sample, examples)
        inputs, labels = collate_chat_batch(omni.mllm, omni.mllm_tokenizer, samples, omni.vision_config)
        return [Stage1Batch(inputs, labels, pixels_from_requests(requests))]

    return assemble_stage1_recipe(omni, encoder, load_batch, steps, lambda step: batch_size, workers)


def build_stage1_text_recipe(
    omni: OmniVideoModel, steps: int = 1500, batch_size: int = TEXT_BATCH_SIZE, workers: int = 0
) -> Recipe:
    """Build the recipe that trains the text head of stage 1 further: it needs more examples than the vision head.

    No later stage depends on it, so it can run at any time after stage 1.
    """
    model = TrainableParts(omni)

    def load_batch(step: int) -> tuple[dict[str, Tensor], Tensor]:
        rng = random.Random(step_seed("stage1_text/data", step))
        examples = current_rank().take_local_rows(sample_examples(rng, TEXT_HEAD_MIX, batch_size))
        samples = [to_chat_sample(example) for example in examples]
        return collate_chat_batch(omni.mllm, omni.mllm_tokenizer, samples, omni.vision_config)

    batches = Prefetcher(load_batch, workers)
    route_ids = torch.tensor(omni.mllm_tokenizer.convert_tokens_to_ids(list(VISUAL_TOKENS)))

    def compute_loss(step: int) -> Losses:
        inputs, labels = to_device(omni.device, batches(step))
        with torch.no_grad():
            states = model.mllm.model(**inputs).last_hidden_state
        logits = model.mllm.lm_head(states)
        first = first_token_loss(logits, labels)
        text, exact_share = text_only_loss(logits, labels, route_ids)
        return {"loss": text + first, "first_token_loss": first, "exact_match": exact_share}

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


def build_stage2a_recipe(omni: OmniVideoModel, steps: int = 1000, batch_size: int = 32) -> Recipe:
    """Build the recipe of stage 2a, which computes hidden states and text embeddings at every step."""
    torch.manual_seed(12)
    model, stage = TrainableParts(omni), "stage2a"
    step_flops = Flops()

    def compute_loss(step: int) -> Losses:
        nonlocal step_flops
        rng = random.Random(step_seed("stage2a/data", step))
        tasks = [task for task in TASKS if not is_editing_task(task)]
        all_requests = [sample_request(rng, rng.choice(tasks)) for _ in range(batch_size)]
        requests = current_rank().take_local_rows(all_requests)
        media = [request.medium for request in requests]
        with torch.no_grad():
            texts = omni.encode_prompts([request.text for request in requests])
            messages = [message_from_request(request) for request in requests]
            inputs = prepare_hidden_state_inputs(
                omni.mllm_tokenizer, list(zip(messages, media, strict=True)), omni.vision_config
            )
            states, padding = forward_hidden_states(model.mllm, inputs)
            visual = model.bridge.vision_head(states, padding)
        row_flops = count_adapter_stage_flops(omni.preset, TRAINABLE_BY_STAGE[stage], states.shape[1], "video" in media)
        local_flops = row_flops * len(requests) + count_mllm_flops(model.mllm, inputs)
        step_flops = local_flops * (batch_size / len(requests))
        return {"loss": batch_text_alignment_loss(omni, visual, media, texts)}

    return Recipe(
        stage,
        model,
        TRAINABLE_BY_STAGE[stage],
        single_micro_batch(compute_loss),
        steps,
        lr=5e-3,
        adam_lr=1e-3,
        warmup=100,
        batch_size=lambda step: batch_size,
        step_flops=lambda step: step_flops.total,
        omni=omni,
    )

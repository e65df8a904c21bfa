"""Foundation: the MLLM for understanding and text, in place of a downloaded Qwen3-VL.

It learns to answer questions about images and videos, and to restate requests plainly, with the reasoning first in
think mode. It does not learn the four visual tokens: stage 1 trains the routing.

Shapes: H heads, S patches of all frames, D width of a head.
"""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AttentionInterface, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from omnivideo.contracts import THINK_END, THINK_START
from omnivideo.models.mllm import VISUAL_TOKENS, MLLMMedia, MLLMMessage
from omnivideo.presets import TINY
from omnivideo.synthetic.chat import (
    ChatExample,
    make_continuation_example,
    make_edit_example,
    make_knowledge_example,
    make_prompt_example,
    make_question_example,
    make_refusal_example,
    make_talk_example,
)
from omnivideo.synthetic.rendering import render_scene
from omnivideo.synthetic.requests import SceneRequest
from omnivideo.synthetic.scenes import FPS, Scene
from omnivideo.training.data.chat_batch import (
    ChatSample,
    answer_loss,
    collate_chat_batch,
    count_answer_tokens,
    to_device,
)
from omnivideo.training.data.prefetch import Prefetcher
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.recipe import Losses, MicroBatchLosses, Recipe, step_seed

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", THINK_START, THINK_END, *VISUAL_TOKENS,
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}"
    "{% if c.type in ['image', 'image_url'] %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type in ['video', 'video_url'] %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BATCH_SIZE, MICRO_BATCHES = 48, 4
ExampleMix = tuple[tuple[Callable[[random.Random, bool], ChatExample], float], ...]  # example makers, weights


# ---------------------------------------------------------------- samples


def media_from_scene(scene: Scene) -> MLLMMedia:
    return MLLMMedia(render_scene(scene), FPS, scene.is_video)


def build_message(text: str, shown: Scene | None, system: str | None = None) -> MLLMMessage:
    return MLLMMessage(text, () if shown is None else (media_from_scene(shown),), system)


def message_from_request(request: SceneRequest) -> MLLMMessage:
    return build_message(request.text, request.source)


def to_chat_sample(example: ChatExample) -> ChatSample:
    """Render what the user shows, and return the message with its answer."""
    return build_message(example.text, example.shown, example.system), example.answer


def sample_examples(rng: random.Random, mix: ExampleMix, count: int) -> list[ChatExample]:
    """Return examples by the weights of a mix, half of them about clips."""
    makers = rng.choices([make for make, _ in mix], [weight for _, weight in mix], k=count)
    return [make(rng, rng.random() < 0.5) for make in makers]


FOUNDATION_MIX: ExampleMix = (
    (make_question_example, 0.37),
    (make_edit_example, 0.2),
    (make_prompt_example, 0.17),
    (make_knowledge_example, 0.1),
    (make_refusal_example, 0.08),
    (make_continuation_example, 0.06),
    (make_talk_example, 0.02),
)


def sample_foundation_example(rng: random.Random) -> ChatExample:
    return sample_examples(rng, FOUNDATION_MIX, 1)[0]


# ---------------------------------------------------------------- tokenizer and model


def build_tokenizer(texts: list[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen's special tokens, the think marks and the four visual tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
                              "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"},
    )  # fmt: skip


def load_or_build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").exists():
        rng = random.Random("mllm/corpus")
        examples = [sample_foundation_example(rng) for _ in range(20_000)]
        texts = [f"{example.text}\n{example.answer}" for example in examples]
        texts += ["assistant\n user\n system\nthink"] * 50
        texts += [f"<{tenth / 10:.1f} seconds>" for tenth in range(100)] * 20
        build_tokenizer(texts).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    tokens = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": (len(tokenizer) + 63) // 64 * 64, "hidden_size": 192, "intermediate_size": 512,
            "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
            "max_position_embeddings": 4096, "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5],
                                "mrope_interleaved": True},
        },
        vision_config={
            "depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 192, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1, 2],
        },
        image_token_id=tokens["image_pad"], video_token_id=tokens["video_pad"],
        vision_start_token_id=tokens["vision_start"], vision_end_token_id=tokens["vision_end"],
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config)
    model.model.visual.config._attn_implementation = PER_FRAME_ATTENTION
    return model


def attend_per_frame(
    module: Any,
    query_1HSD: Tensor,
    key_1HSD: Tensor,
    value_1HSD: Tensor,
    attention_mask: None = None,
    *,
    max_length_q: int,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each frame, in one call: in the synthetic world all frames have the same number of patches.

    Without flash attention, Transformers attends to one frame at a time.
    """
    heads, _, width = query_1HSD.shape[1:]
    q, k, v = (x[0].view(heads, -1, max_length_q, width).transpose(0, 1) for x in (query_1HSD, key_1HSD, value_1HSD))
    attended = F.scaled_dot_product_attention(q, k, v, scale=scaling)
    return attended.transpose(1, 2).flatten(0, 1)[None], None


PER_FRAME_ATTENTION = "flash_evenly"  # with "flash" in its name, it receives all frames at once
AttentionInterface.register(PER_FRAME_ATTENTION, attend_per_frame)


def count_tokens(tokenizer: PreTrainedTokenizerFast, sample: ChatSample) -> int:
    """Return the approximate length of a sample, by which samples are grouped."""
    message, answer = sample
    frames = sum(len(media.frames) for media in message.media)
    return len(tokenizer(message.text + answer).input_ids) + 4 * frames


def build_mllm_recipe(
    tokenizer: PreTrainedTokenizerFast, steps: int = 16_000, batch_size: int = BATCH_SIZE, workers: int = 0
) -> Recipe:
    """Build the recipe of the MLLM. A batch is divided into micro-batches of similar length: padding costs time."""
    torch.manual_seed(3)
    model = build_model(tokenizer)

    def sample_batch(step: int) -> list[tuple[dict[str, Tensor], Tensor]]:
        rng = random.Random(step_seed("mllm/data", step))
        examples = current_rank().take_local_rows([sample_foundation_example(rng) for _ in range(batch_size)])
        samples = sorted(map(to_chat_sample, examples), key=partial(count_tokens, tokenizer))
        size = -(-len(samples) // MICRO_BATCHES)
        return [
            collate_chat_batch(model, tokenizer, samples[start : start + size], TINY.mllm.vision_input)
            for start in range(0, len(samples), size)
        ]

    batches = Prefetcher(sample_batch, workers)

    def make_micro_batch_losses(step: int) -> MicroBatchLosses:
        micro_batches = [to_device(model.device, batch) for batch in batches(step)]
        counts = torch.stack([count_answer_tokens(labels) for _, labels in micro_batches])
        token_count = current_rank().global_mean(counts.sum()) / len(micro_batches)

        def compute_loss(inputs: dict[str, Tensor], labels: Tensor) -> Losses:
            loss, exact_share = answer_loss(model, inputs, labels, token_count)
            return {"loss": loss, "exact_match": exact_share}

        return [partial(compute_loss, inputs, labels) for inputs, labels in micro_batches]

    return Recipe(
        "mllm",
        model,
        ("",),
        make_micro_batch_losses,
        steps=steps,
        lr=1e-2,
        adam_lr=2e-3,
        warmup=100,
        ema_decay=0.998,
        batch_size=lambda step: batch_size,
    )

"""Foundation: the MLLM for understanding and text, which stands for the downloaded Qwen3-VL.

It answers questions about images and videos, and restates requests in plain words (with its reasoning aloud in
think mode).  It has not met the four visual tokens: routing is stage 1's.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AttentionInterface, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from omnivideo.contracts import THINK_END, THINK_START
from omnivideo.models.mllm import (
    VISUAL_TOKEN_PAIRS,
    VISUAL_TOKENS,
    MLLMMedia,
    MLLMMessage,
)
from omnivideo.presets import TINY
from omnivideo.synthetic.captions import (
    CLIP_PREFIXES,
    STILL_PREFIXES,
    describe_scene,
    sample_caption,
    to_canonical_text,
)
from omnivideo.synthetic.edits import sample_edit
from omnivideo.synthetic.indirect_requests import (
    BACKGROUND_HINTS,
    COLOUR_HINTS,
    MOTION_HINTS,
    SHAPE_HINTS,
    sample_indirect_request,
)
from omnivideo.synthetic.questions import QUESTION_WEIGHTS, ask_layout, sample_question
from omnivideo.synthetic.scenes import FPS, Scene, render_scene, sample_scene
from omnivideo.training.data.chat_batch import ChatSample, collate_chat_batch, text_loss, to_device
from omnivideo.training.data.prefetch import Prefetcher
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.recipe import Losses, Recipe, single_micro_batch, step_seed

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
THINK_SYSTEM_PROMPT = "think"
REQUEST_TEMPLATES = ("{}", "{}", "{}", "draw {}", "generate {}", "make {}", "create {}", "show me {}", "i want {}",
            "please draw {}", "can you make {}?", "i would like to see {}")  # fmt: skip
SMALL_TALK = {
    "hello": "hello, what shall i draw?", "hi": "hello, what shall i draw?", "good morning": "good morning to you",
    "thank you": "you are welcome", "thanks": "you are welcome", "who are you?": "i am omnivideo",
    "what can you do?": "i make, change and understand pictures and videos of shapes", "goodbye": "goodbye",
    "how are you?": "i am fine, thank you", "what is your name?": "my name is omnivideo",
}  # fmt: skip
BATCH_SIZE = 48


# ---------------------------------------------------------------- samples


def media_from_scene(scene: Scene) -> MLLMMedia:
    return MLLMMedia(render_scene(scene), FPS, scene.is_video)


def get_medium_prefix(is_video: bool) -> str:
    return "video of " if is_video else "picture of "


def phrase_request(rng: random.Random, text: str) -> str:
    """A prompt, or a prompt in a sentence that asks for it."""
    return rng.choice(REQUEST_TEMPLATES).format(text)


def make_question_sample(rng: random.Random, is_video: bool) -> ChatSample:
    scene = sample_scene(rng, is_video)
    question = ask_layout(rng, scene) if rng.random() < 0.1 else sample_question(rng, scene, QUESTION_WEIGHTS)
    return MLLMMessage(question.text, (media_from_scene(scene),)), question.answer


def phrase_still_request(rng: random.Random, text: str) -> str:
    """A request for a picture."""
    return phrase_request(
        rng, text if text.startswith(STILL_PREFIXES) or rng.random() < 0.7 else rng.choice(STILL_PREFIXES) + text
    )


def phrase_clip_request(rng: random.Random, text: str, has_motion: bool) -> str:
    """A request for a video: said so, or plain from a motion."""
    if text.startswith(CLIP_PREFIXES) or (has_motion and rng.random() < 0.7):
        return phrase_request(rng, text)
    return phrase_request(rng, rng.choice(CLIP_PREFIXES) + text)


def make_caption_prompt(rng: random.Random, is_video: bool) -> tuple[str, str]:
    """A request for an image or a video, and its plain restatement."""
    scene = sample_scene(rng, is_video)
    caption = sample_caption(rng, scene)
    has_motion = any(obj.motion != "still" for obj in scene.objects)
    text = phrase_clip_request(rng, caption.text, has_motion) if is_video else phrase_still_request(rng, caption.text)
    return text, get_medium_prefix(is_video) + to_canonical_text(caption.scene_spec)


def make_indirect_prompt(rng: random.Random, is_video: bool) -> tuple[str, str, str]:
    """An indirect request, the reasoning, and its plain restatement."""
    request = sample_indirect_request(rng, is_video)
    has_motion = any(object_spec.motion not in (None, "still") for object_spec in request.scene_spec.objects)
    text = (
        phrase_clip_request(rng, request.prompt, has_motion) if is_video else phrase_still_request(rng, request.prompt)
    )
    return text, request.reasoning, get_medium_prefix(is_video) + request.rewrite


def make_restatement(message: MLLMMessage, reasoning: str, plain_text: str, use_thinking: bool) -> ChatSample:
    """A request with its plain restatement; in think mode with the reasoning before it."""
    if not use_thinking:
        return message, plain_text
    return replace(message, system=THINK_SYSTEM_PROMPT), f"{THINK_START}{reasoning}{THINK_END}{plain_text}"


def make_prompt_sample(rng: random.Random, is_video: bool, thinking_probability: float = 0.5) -> ChatSample:
    """A request without a source, plain or indirect; `thinking` is the chance of think mode."""
    if rng.random() < 0.5:
        text, reasoning, plain_text = make_indirect_prompt(rng, is_video)
    else:
        (text, plain_text), reasoning = make_caption_prompt(rng, is_video), "this is plain"
    return make_restatement(MLLMMessage(text), reasoning, plain_text, rng.random() < thinking_probability)


def make_edit_sample(rng: random.Random, is_video: bool, thinking_probability: float = 0.5) -> ChatSample:
    """An instruction for a source, restated as a caption of the target."""
    edit = sample_edit(rng, is_video)
    message = MLLMMessage(edit.instruction, (media_from_scene(edit.source),))
    reasoning = f"now it is {describe_scene(edit.source)}"
    return make_restatement(
        message,
        reasoning,
        get_medium_prefix(is_video) + describe_scene(edit.target),
        rng.random() < thinking_probability,
    )


def make_thinking_sample(rng: random.Random, is_video: bool) -> ChatSample:
    """Think mode always, with or without a source."""
    return rng.choice((make_prompt_sample, make_edit_sample))(rng, is_video, 1.0)


def make_knowledge_sample(rng: random.Random, is_video: bool) -> ChatSample:
    """What a hint of the reasoning split means, the held-out ones too: facts that a big model just knows."""
    table = rng.choice((SHAPE_HINTS, COLOUR_HINTS, BACKGROUND_HINTS, MOTION_HINTS))
    name = rng.choice(list(table))
    hint = rng.choice(table[name])
    if table is COLOUR_HINTS:
        return MLLMMessage(f"what colour is {hint}?"), name
    if table is MOTION_HINTS:
        return MLLMMessage(f"how does it move if {hint}?"), name
    return MLLMMessage(
        f"what is {hint}?" if table is SHAPE_HINTS else f"what colour is {hint.removeprefix('the colour of ')}?"
    ), name


def make_route_sample(rng: random.Random, is_video: bool) -> ChatSample:
    """An indirect request and the route that it takes: what is drawn is not looked at here."""
    return MLLMMessage(make_indirect_prompt(rng, is_video)[0]), "".join(
        VISUAL_TOKEN_PAIRS["video" if is_video else "image"]
    )


def make_talk_sample(rng: random.Random, is_video: bool) -> ChatSample:
    text, reply = rng.choice(list(SMALL_TALK.items()))
    return MLLMMessage(text), reply


SAMPLE_MIX: tuple[tuple[Callable[[random.Random, bool], ChatSample], float], ...] = (
    (make_question_sample, 0.68),
    (make_edit_sample, 0.12),
    (make_prompt_sample, 0.14),
    (make_knowledge_sample, 0.04),
    (make_talk_sample, 0.02),
)


def sample_from_mix(rng: random.Random) -> ChatSample:
    make_sample = rng.choices([factory for factory, _ in SAMPLE_MIX], [weight for _, weight in SAMPLE_MIX])[0]
    return make_sample(rng, rng.random() < 0.5)


# ---------------------------------------------------------------- tokenizer and model


def build_tokenizer(texts: list[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's special tokens, the think marks and the four visual tokens."""
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
        samples = [sample_from_mix(rng) for _ in range(20_000)]
        texts = [f"{message.text}\n{reply}" for message, reply in samples] + ["assistant\n user\n system\nthink"] * 50
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
    """Attention within each frame, where all frames have as many patches, as those of the world have: in one call.

    Transformers does it a frame at a time where there is no flash attention.
    """
    heads, _, width = query_1HSD.shape[1:]
    q, k, v = (x[0].view(heads, -1, max_length_q, width).transpose(0, 1) for x in (query_1HSD, key_1HSD, value_1HSD))
    attended = F.scaled_dot_product_attention(q, k, v, scale=scaling)
    return attended.transpose(1, 2).flatten(0, 1)[None], None


PER_FRAME_ATTENTION = "flash_evenly"  # "flash" in its name: so it gets all frames at once
AttentionInterface.register(PER_FRAME_ATTENTION, attend_per_frame)


def build_mllm_recipe(
    tokenizer: PreTrainedTokenizerFast, steps: int = 9000, batch_size: int = BATCH_SIZE, workers: int = 0
) -> Recipe:
    torch.manual_seed(3)
    model = build_model(tokenizer)
    pixels = TINY.vision_input

    def sample_batch(step: int) -> tuple[dict[str, Tensor], Tensor]:
        rng = random.Random(step_seed("mllm/data", step))
        samples = current_rank().take_local_rows([sample_from_mix(rng) for _ in range(batch_size)])
        return collate_chat_batch(model, tokenizer, samples, pixels)

    batches = Prefetcher(sample_batch, workers)

    def compute_loss(step: int) -> Losses:
        inputs, labels = to_device(model.device, batches(step))
        value, right = text_loss(model(**inputs).logits, labels)
        return {"loss": value, "right": right}

    return Recipe(
        "mllm",
        model,
        ("",),
        single_micro_batch(compute_loss),
        steps=steps,
        lr=1e-2,
        adam_lr=2e-3,
        warmup=100,
        ema_decay=0.998,
        batch_size=lambda step: batch_size,
    )

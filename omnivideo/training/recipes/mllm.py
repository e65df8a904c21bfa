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
from transformers.vision_utils import get_vision_position_ids

from omnivideo.contracts import END_THINK, THINK
from omnivideo.models.mllm import ENDING, VISUAL_TOKENS, Encoded, Media, Message, Pixels, collate, encode
from omnivideo.training.ahead import Ahead
from omnivideo.training.edits import random_edit
from omnivideo.training.language import CLIP_PREFIX, STILL_PREFIX, caption, description, plain
from omnivideo.training.questions import TRAINED, ask_layout, random_question
from omnivideo.training.riddles import BACKGROUND_HINTS, COLOUR_HINTS, MOTION_HINTS, SHAPE_HINTS, random_riddle
from omnivideo.training.share import share
from omnivideo.training.trainer import Losses, Recipe, at_once, step_seed
from omnivideo.training.world import FPS, Scene, random_scene, render

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", THINK, END_THINK, *VISUAL_TOKENS,
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}"
    "{% if c.type in ['image', 'image_url'] %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type in ['video', 'video_url'] %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINK_SYSTEM = "think"
REQUESTS = ("{}", "{}", "{}", "draw {}", "generate {}", "make {}", "create {}", "show me {}", "i want {}",
            "please draw {}", "can you make {}?", "i would like to see {}")  # fmt: skip
SMALL_TALK = {
    "hello": "hello, what shall i draw?", "hi": "hello, what shall i draw?", "good morning": "good morning to you",
    "thank you": "you are welcome", "thanks": "you are welcome", "who are you?": "i am omnivideo",
    "what can you do?": "i make, change and understand pictures and videos of shapes", "goodbye": "goodbye",
    "how are you?": "i am fine, thank you", "what is your name?": "my name is omnivideo",
}  # fmt: skip
Sample = tuple[Message, str]
BATCH = 48


# ---------------------------------------------------------------- samples


def media_of(scene: Scene) -> Media:
    return Media(render(scene), FPS, scene.is_video)


def medium(video: bool) -> str:
    return "video of " if video else "picture of "


def requested(rng: random.Random, text: str) -> str:
    """A prompt, or a prompt in a sentence that asks for it."""
    return rng.choice(REQUESTS).format(text)


def question_sample(rng: random.Random, video: bool) -> Sample:
    scene = random_scene(rng, video)
    question = ask_layout(rng, scene) if rng.random() < 0.1 else random_question(rng, scene, TRAINED)
    return Message(question.text, (media_of(scene),)), question.answer


def still_prompt(rng: random.Random, text: str) -> str:
    """A request for a picture."""
    return requested(
        rng, text if text.startswith(STILL_PREFIX) or rng.random() < 0.7 else rng.choice(STILL_PREFIX) + text
    )


def clip_prompt(rng: random.Random, text: str, moves: bool) -> str:
    """A request for a video: said so, or plain from a motion."""
    if text.startswith(CLIP_PREFIX) or (moves and rng.random() < 0.7):
        return requested(rng, text)
    return requested(rng, rng.choice(CLIP_PREFIX) + text)


def caption_prompt(rng: random.Random, video: bool) -> tuple[str, str]:
    """A request for an image or a video, and its plain restatement."""
    scene = random_scene(rng, video)
    one = caption(rng, scene)
    moves = any(thing.motion != "still" for thing in scene.things)
    text = clip_prompt(rng, one.text, moves) if video else still_prompt(rng, one.text)
    return text, medium(video) + plain(one.demand)


def riddle_prompt(rng: random.Random, video: bool) -> tuple[str, str, str]:
    """An indirect request, the reasoning, and its plain restatement."""
    riddle = random_riddle(rng, video)
    moves = any(want.motion not in (None, "still") for want in riddle.demand.things)
    text = clip_prompt(rng, riddle.prompt, moves) if video else still_prompt(rng, riddle.prompt)
    return text, riddle.reasoning, medium(video) + riddle.rewrite


def restated(message: Message, reasoning: str, plainly: str, thinking: bool) -> Sample:
    """A request with its plain restatement; in think mode with the reasoning before it."""
    if not thinking:
        return message, plainly
    return replace(message, system=THINK_SYSTEM), f"{THINK}{reasoning}{END_THINK}{plainly}"


def prompt_sample(rng: random.Random, video: bool, thinking: float = 0.5) -> Sample:
    """A request without a source, plain or indirect; `thinking` is the chance of think mode."""
    if rng.random() < 0.5:
        text, reasoning, plainly = riddle_prompt(rng, video)
    else:
        (text, plainly), reasoning = caption_prompt(rng, video), "this is plain"
    return restated(Message(text), reasoning, plainly, rng.random() < thinking)


def edit_sample(rng: random.Random, video: bool, thinking: float = 0.5) -> Sample:
    """An instruction for a source, restated as a caption of the target."""
    edit = random_edit(rng, video)
    message = Message(edit.instruction, (media_of(edit.source),))
    reasoning = f"now it is {description(edit.source)}"
    return restated(message, reasoning, medium(video) + description(edit.target), rng.random() < thinking)


def thinking_sample(rng: random.Random, video: bool) -> Sample:
    """Think mode always, with or without a source."""
    return rng.choice((prompt_sample, edit_sample))(rng, video, 1.0)


def knowledge_sample(rng: random.Random, video: bool) -> Sample:
    """What a hint of the reasoning split means, the held-out ones too: facts that a big model just knows."""
    table = rng.choice((SHAPE_HINTS, COLOUR_HINTS, BACKGROUND_HINTS, MOTION_HINTS))
    name = rng.choice(list(table))
    clue = rng.choice(table[name])
    if table is COLOUR_HINTS:
        return Message(f"what colour is {clue}?"), name
    if table is MOTION_HINTS:
        return Message(f"how does it move if {clue}?"), name
    return Message(
        f"what is {clue}?" if table is SHAPE_HINTS else f"what colour is {clue.removeprefix('the colour of ')}?"
    ), name


def route_sample(rng: random.Random, video: bool) -> Sample:
    """An indirect request and the route that it takes: what is drawn is not looked at here."""
    return Message(riddle_prompt(rng, video)[0]), "".join(ENDING["video" if video else "image"])


def talk_sample(rng: random.Random, video: bool) -> Sample:
    text, reply = rng.choice(list(SMALL_TALK.items()))
    return Message(text), reply


MIX: tuple[tuple[Callable[[random.Random, bool], Sample], float], ...] = (
    (question_sample, 0.68), (edit_sample, 0.12), (prompt_sample, 0.14), (knowledge_sample, 0.04), (talk_sample, 0.02),
)  # fmt: skip


def random_sample(rng: random.Random) -> Sample:
    make = rng.choices([one for one, _ in MIX], [share for _, share in MIX])[0]
    return make(rng, rng.random() < 0.5)


# ---------------------------------------------------------------- tokenizer and model


def build_tokenizer(texts: list[str], size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's special tokens, the think marks and the four visual tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
                              "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"},
    )  # fmt: skip


def load_or_build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").exists():
        rng = random.Random("mllm/corpus")
        samples = [random_sample(rng) for _ in range(20_000)]
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
    model.model.visual.config._attn_implementation = EVENLY
    return model


def evenly(
    module: Any,
    query_1HSD: Tensor,
    key_1HSD: Tensor,
    value_1HSD: Tensor,
    attention_mask: None = None,
    *,
    max_length_q: int,
    scaling: float,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention within each frame, where all frames have as many patches, as those of the world have: in one call.

    Transformers does it a frame at a time where there is no flash attention.
    """
    heads, _, width = query_1HSD.shape[1:]
    q, k, v = (x[0].view(heads, -1, max_length_q, width).transpose(0, 1) for x in (query_1HSD, key_1HSD, value_1HSD))
    found = F.scaled_dot_product_attention(q, k, v, scale=scaling)
    return found.transpose(1, 2).flatten(0, 1)[None], None


EVENLY = "flash_evenly"  # "flash" in its name: so it gets all frames at once
AttentionInterface.register(EVENLY, evenly)


def with_places(model: Qwen3VLForConditionalGeneration, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """And the places of tokens and patches, which the model would find in many small steps for each sample."""
    asked = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    places, _ = model.model.get_rope_index(**{name: inputs[name] for name in asked if name in inputs})
    found = {"position_ids": places}
    for kind in ("image", "video"):
        if (grids := inputs.get(f"{kind}_grid_thw")) is not None:
            found[f"{kind}_position_ids"] = get_vision_position_ids(
                grids, model.config.vision_config.spatial_merge_size
            )
    return inputs | found


def answer_labels(batch: list[Encoded], prompts: list[int], inputs: dict[str, Tensor]) -> Tensor:
    """Labels [B, N]: the answer's tokens and its end; -100 over the prompt and the padding."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (one, start) in enumerate(zip(batch, prompts, strict=True)):
        labels[row, start : len(one.ids)] = torch.tensor(one.ids[start:])
    return labels


def batch_of(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, samples: list[Sample], pixels: Pixels
) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs, with the places, and labels of a list of samples."""
    encoded = [encode(tokenizer, message, pixels, reply) for message, reply in samples]
    prompts = [
        len(one.ids) - len(tokenizer(f"{reply}<|im_end|>").input_ids)
        for one, (_, reply) in zip(encoded, samples, strict=True)
    ]
    inputs = collate(encoded, tokenizer.pad_token_id)
    return with_places(model, inputs), answer_labels(encoded, prompts, inputs)


def on(device: torch.device, batch: tuple[dict[str, Tensor], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """What `batch_of` returned, on a device."""
    inputs, labels = batch
    return {name: part.to(device) for name, part in inputs.items()}, labels.to(device)


def answered(labels: Tensor) -> Tensor:
    """How many tokens are to be predicted."""
    return (labels[:, 1:] != -100).sum()


def text_loss(logits: Tensor, labels: Tensor, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Eq. 2 over the answers' tokens of the whole batch, and the share of answers that are right in every token.

    `among`: how many tokens all passes of all processes have on average, where a process has several.
    """
    predicted, target = logits[:, :-1], labels[:, 1:]
    total = F.cross_entropy(predicted.flatten(0, 1).float(), target.flatten(), ignore_index=-100, reduction="sum")
    among = share().mean(answered(labels)) if among is None else among
    loss = total / among.clamp(min=1e-6)  # 0 where there is no answer at all
    right = ((predicted.argmax(-1) == target) | (target == -100)).all(dim=1).float().mean()
    return loss, right


def mllm_recipe(tokenizer: PreTrainedTokenizerFast, steps: int = 9000, batch: int = BATCH, workers: int = 0) -> Recipe:
    torch.manual_seed(3)
    model = build_model(tokenizer)
    pixels = Pixels()

    def draw(step: int) -> tuple[dict[str, Tensor], Tensor]:
        rng = random.Random(step_seed("mllm/data", step))
        samples = share().take([random_sample(rng) for _ in range(batch)])
        return batch_of(model, tokenizer, samples, pixels)

    drawn = Ahead(draw, workers)

    def loss(step: int) -> Losses:
        inputs, labels = on(model.device, drawn(step))
        value, right = text_loss(model(**inputs).logits, labels)
        return {"loss": value, "right": right}

    return Recipe(
        "mllm", model, ("",), at_once(loss), steps=steps, lr=1e-2, adam_lr=2e-3, warmup=100, ema=0.998,
        samples=lambda step: batch,
    )  # fmt: skip

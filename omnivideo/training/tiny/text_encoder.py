"""Foundation: the decoder's tokenizer and text encoder, in place of a downloaded UMT5.

The encoder learns to predict the content of a prompt in two ways. Queries over its hidden states predict each object in
the order of mention, the background and the relation. Each token of an object's phrase must also predict
all attributes of that object, so that a decoder that attends to one token gets the colour together with the shape.
(Without the second loss the decoder had learned every word after 7,600 steps, but not which colour belongs to which
shape.)
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from omnivideo.contracts import TASKS
from omnivideo.presets import TINY
from omnivideo.synthetic.captions import REGION_PHRASES, RELATIONS, Caption, caption_with_places, sample_caption
from omnivideo.synthetic.edits import VIDEO_EDITS, SceneEdit, sample_edit
from omnivideo.synthetic.facts import ObjectSpec, SceneSpec
from omnivideo.synthetic.requests import CONTINUATION_TASKS, sample_continuation_request, sample_request
from omnivideo.synthetic.scenes import BACKGROUNDS, COLOURS, DIRECTIONS, MOTIONS, SHAPES, SIZES, SPEEDS, sample_scene
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.recipe import Losses, Recipe, single_micro_batch, step_seed

CONFIG: dict[str, Any] = {
    "d_model": 192,
    "d_kv": 32,
    "num_heads": 6,
    "d_ff": 512,
    "num_layers": 3,
    "vocab_size": 1024,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 64,
}
NEGATIVE_PROMPT = TINY.null.negative_prompt
OBJECT_SLOTS = 4
MAX_TEXT_TOKENS = TINY.text.max_tokens  # the longest prompt
KNOWN_EMBEDDINGS_WEIGHT = 10.0


def build_corpus(count: int = 20_000) -> list[str]:
    """Return prompts of every kind that the decoder is trained on."""
    rng = random.Random("corpus")
    texts = [NEGATIVE_PROMPT] * 20
    for index in range(count):
        if index % 5 < 3:
            texts.append(sample_request(rng, TASKS[index % len(TASKS)]).text)
        elif index % 5 == 3:
            texts.append(sample_continuation_request(rng, CONTINUATION_TASKS[index % len(CONTINUATION_TASKS)]).text)
        else:
            texts.append(sample_caption(rng, sample_scene(rng, index % 2 == 0)).text)
    return texts


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-pair encoding with byte fallback and UMT5's conventions: `</s>` at the end, `<pad>` is 0."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    special = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=CONFIG["vocab_size"], special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TEXT_TOKENS,
    )


def load_or_build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").exists():
        build_tokenizer(build_corpus()).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


# ---------------------------------------------------------------- labels of a prompt

SLOT_FIELDS: dict[str, tuple[Any, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": SIZES,
    "motion": MOTIONS,
    "speed": SPEEDS,
    "second_motion": (*DIRECTIONS, "still"),
    "region": tuple(REGION_PHRASES),
}


def encode_slot_labels(object_spec: ObjectSpec | None) -> list[int]:
    """Return one class for each field: 0 is "no object", 1 is "not specified", the others are the values."""
    if object_spec is None:
        return [0] * len(SLOT_FIELDS)
    values = ((getattr(object_spec, field), names) for field, names in SLOT_FIELDS.items())
    return [1 if value is None else 2 + names.index(value) for value, names in values]


def encode_spec_labels(scene_spec: SceneSpec) -> list[int]:
    """Return all labels of a prompt: one for each field of each slot, then background and relation."""
    object_specs = (*scene_spec.objects, *[None] * (OBJECT_SLOTS - len(scene_spec.objects)))
    labels = [label for object_spec in object_specs for label in encode_slot_labels(object_spec)]
    labels.append(0 if scene_spec.background is None else 1 + list(BACKGROUNDS).index(scene_spec.background))
    labels.append(0 if scene_spec.relation is None else 1 + RELATIONS.index(scene_spec.relation))
    return labels


CLASS_COUNTS = [2 + len(names) for _ in range(OBJECT_SLOTS) for names in SLOT_FIELDS.values()]
CLASS_COUNTS += [1 + len(BACKGROUNDS), 1 + len(RELATIONS)]


class LabelReadout(nn.Module):
    """Read-outs with one learned query for each label, which attends to the hidden states; used only in training."""

    def __init__(self, dim: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(CLASS_COUNTS), dim) * 0.5)
        self.attend = nn.MultiheadAttention(dim, 6, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.answer = nn.Linear(dim, max(CLASS_COUNTS))

    def forward(self, hidden_BLD: Tensor, padding_BL: Tensor) -> Tensor:
        """Return logits [B, labels, classes]."""
        query = self.query.expand(len(hidden_BLD), -1, -1)
        attended, _ = self.attend(query, hidden_BLD, hidden_BLD, key_padding_mask=padding_BL, need_weights=False)
        logits: Tensor = self.answer(self.norm(attended + query))
        return logits


# ---------------------------------------------------------------- labels of each token

OPPOSITE_RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Labels of an object, predicted by each token of its phrase.
OBJECT_LABEL_SIZES = [2 + len(names) for names in SLOT_FIELDS.values()] + [1 + len(RELATIONS), 1 + OBJECT_SLOTS]
# Labels of the prompt, predicted by all tokens: the background, the number of objects, the kind of edit.
PROMPT_LABEL_SIZES = [1 + len(BACKGROUNDS), 1 + OBJECT_SLOTS, 1 + len(VIDEO_EDITS)]
IGNORE_INDEX = -100


def label_caption_tokens(caption: Caption, offsets: list[tuple[int, int]]) -> list[list[int]]:
    """Return the labels of every token of a caption; `offsets` are the tokens' character ranges."""
    scene_spec = caption.scene_spec
    background = 0 if scene_spec.background is None else 1 + list(BACKGROUNDS).index(scene_spec.background)
    prompt_labels = [background, len(scene_spec.objects), 0]
    labels = [[IGNORE_INDEX] * len(OBJECT_LABEL_SIZES) + prompt_labels for _ in offsets]
    for slot, (object_spec, span) in enumerate(zip(scene_spec.objects, caption.object_spans, strict=True)):
        relation = scene_spec.relation if slot == 0 else OPPOSITE_RELATIONS.get(scene_spec.relation or "")
        role = 0 if relation is None else 1 + RELATIONS.index(relation)
        object_labels = [*encode_slot_labels(object_spec), role, caption.object_spans.count(span)]
        for token_index, (start, end) in enumerate(offsets):
            if span[0] <= start < end <= span[1]:
                labels[token_index] = object_labels + prompt_labels
    return labels


MOTION_FIELDS = ("motion", "speed", "second_motion")
EDITED_FIELDS = {
    "recolour": ("colour",),
    "reshape": ("shape",),
    "resize": ("size",),
    "replace": ("shape", "colour", "size"),
    "motion": ("motion",),
    "speed": ("speed",),
    "path": ("motion", "second_motion"),
    "add": ("shape", "colour", "size", *MOTION_FIELDS),
}


def label_edit_tokens(edit: SceneEdit, offsets: list[tuple[int, int]]) -> list[list[int]]:
    """Return the labels of every token of an instruction: the kind of edit, and the attributes that it sets."""
    new_object = edit.changed_objects[-1] if edit.changed_objects else None
    fields = EDITED_FIELDS.get(edit.kind, ())
    object_spec = ObjectSpec(
        **{name: getattr(new_object, name) for name in fields if edit.source.is_video or name not in MOTION_FIELDS}
    )
    background_label = 1 + list(BACKGROUNDS).index(edit.target.background) if edit.kind == "background" else 0
    labels = [*encode_slot_labels(object_spec), 0, 0, background_label, 0, 1 + VIDEO_EDITS.index(edit.kind)]
    return [labels if start < end else [IGNORE_INDEX] * len(labels) for start, end in offsets]


class TextFoundation(nn.Module):
    def __init__(self, encoder: UMT5EncoderModel):
        super().__init__()
        self.encoder = encoder
        self.asker = LabelReadout(encoder.config.d_model)
        self.teller = nn.Linear(encoder.config.d_model, sum(OBJECT_LABEL_SIZES + PROMPT_LABEL_SIZES))

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the embeddings [B, L, D], and the logits of `asker` [B, labels, classes] and of each field of `teller`
        [B, L, classes].
        """
        embeddings = self.encoder(ids_BL, attention_mask=mask_BL).last_hidden_state
        return (
            embeddings,
            self.asker(embeddings, mask_BL == 0),
            list(self.teller(embeddings).split(OBJECT_LABEL_SIZES + PROMPT_LABEL_SIZES, dim=-1)),
        )


@dataclass(frozen=True)
class TextBatch:
    """Captions, then instructions; only captions have prompt labels [captions, labels]."""

    texts: list[str]
    prompt_labels: Tensor
    token_labellers: Sequence[Callable[[list[tuple[int, int]]], list[list[int]]]]


def sample_any_caption(rng: random.Random, is_video: bool) -> Caption:
    """Return a caption in a user's words, or, in a third of the cases, as think mode writes it."""
    scene = sample_scene(rng, is_video, composed_share=0.3)
    return caption_with_places(scene) if rng.random() < 1 / 3 else sample_caption(rng, scene)


def sample_text_batch(step: int, caption_count: int, instruction_count: int) -> TextBatch:
    rng = random.Random(step_seed("text/data", step))
    captions = current_rank().take_local_rows(
        [sample_any_caption(rng, is_video=index % 2 == 0) for index in range(caption_count)]
    )
    edits = current_rank().take_local_rows(
        [sample_edit(rng, is_video=index % 2 == 0) for index in range(instruction_count)]
    )
    return TextBatch(
        [caption.text for caption in captions] + [edit.instruction for edit in edits],
        torch.tensor([encode_spec_labels(caption.scene_spec) for caption in captions]),
        [partial(label_caption_tokens, caption) for caption in captions]
        + [partial(label_edit_tokens, edit) for edit in edits],
    )


def token_label_loss(logits: list[Tensor], labels_BLF: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean error over the fields, and the share of correct labels, both over the global batch."""
    pairs = [
        (field_logits.flatten(0, 1), labels_BLF[..., field].flatten()) for field, field_logits in enumerate(logits)
    ]
    errors = [
        F.cross_entropy(field_logits, field_labels, ignore_index=IGNORE_INDEX, reduction="sum")
        for field_logits, field_labels in pairs
    ]
    counts = current_rank().global_mean((labels_BLF != IGNORE_INDEX).sum((0, 1)))
    correct_count = torch.stack(
        [
            ((field_logits.argmax(-1) == field_labels) & (field_labels != IGNORE_INDEX)).sum()
            for field_logits, field_labels in pairs
        ]
    ).sum()
    return (torch.stack(errors) / counts).mean(), correct_count / counts.sum()


def measure_drift(embeddings_BLD: Tensor, known_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Return how far embeddings are from known ones, relative to the squared size of these, over the global batch."""
    mask_BL1 = mask_BL[:, :, None]
    distance = ((embeddings_BLD - known_BLD) ** 2 * mask_BL1).sum()
    return distance / current_rank().global_mean((known_BLD**2 * mask_BL1).sum())


def build_text_recipe(
    tokenizer: PreTrainedTokenizerFast,
    steps: int = 2500,
    caption_count: int = 72,
    instruction_count: int = 24,
    known_encoder: UMT5EncoderModel | None = None,
) -> Recipe:
    """Build the recipe of the text encoder.

    With `known_encoder`, it starts from that encoder and keeps its embeddings of captions: a decoder has learned them.
    Without this, 1,000 steps at a tenth of the learning rate moved them so far that the seven categories of generation
    fell from 0.95 to 0.49.
    """
    torch.manual_seed(1)
    model = TextFoundation(UMT5EncoderModel(UMT5Config(**CONFIG)))
    if known_encoder is not None:
        model.encoder.load_state_dict(known_encoder.state_dict())

    def compute_loss(step: int) -> Losses:
        batch = sample_text_batch(step, caption_count, instruction_count)
        tokens = tokenizer(batch.texts, padding=True, return_tensors="pt", return_offsets_mapping=True)
        token_labels = torch.tensor(
            [
                label_tokens(token_offsets.tolist())
                for label_tokens, token_offsets in zip(batch.token_labellers, tokens.offset_mapping, strict=True)
            ]
        )
        token_labels[tokens.attention_mask == 0] = IGNORE_INDEX
        device = model.encoder.device
        ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
        embeddings, prompt_logits, token_logits = model(ids, mask)
        caption_logits, expected = prompt_logits[: len(batch.prompt_labels)], batch.prompt_labels.to(device)
        token_loss, token_accuracy = token_label_loss(token_logits, token_labels.to(device))
        exact_share = (caption_logits.argmax(-1) == expected).all(dim=1).float().mean()
        prompt_loss = F.cross_entropy(caption_logits.flatten(0, 1), expected.flatten())
        losses = {
            "loss": prompt_loss + token_loss,
            "prompt_loss": prompt_loss,
            "token_loss": token_loss,
            "token_accuracy": token_accuracy,
            "exact_match": exact_share,
        }
        if known_encoder is not None:
            count = len(batch.prompt_labels)  # captions only: instructions of new kinds need other embeddings
            with torch.no_grad():
                known = known_encoder(ids[:count], attention_mask=mask[:count]).last_hidden_state
            losses["drift"] = measure_drift(embeddings[:count], known, mask[:count])
            losses["loss"] = losses["loss"] + KNOWN_EMBEDDINGS_WEIGHT * losses["drift"]
        return losses

    return Recipe(
        "text", model, ("",), single_micro_batch(compute_loss), steps=steps, lr=1e-2, adam_lr=2e-3, warmup=50,
        batch_size=lambda step: caption_count + instruction_count,
    )  # fmt: skip

"""Foundation: the decoder's tokenizer and text encoder, which stand for the downloaded UMT5.

The encoder learns the language of prompts by answering what a prompt asks for, in two ways.  Slots read its hidden
states and name each object in the order of mention, the background, the relation and the place.  And every token of
an object's phrase must tell all of that object by itself: a decoder that attends to one token then has the
colour together with the shape.  (Without it the decoder learned every word and, after 7,600 steps, nothing of
which colour goes with which shape.)
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

from omnivideo.presets import TINY
from omnivideo.training.edits import VIDEO_EDITS, Edit, random_edit
from omnivideo.training.facts import Demand, Wanted
from omnivideo.training.language import PLACES, RELATIONS, Caption, caption
from omnivideo.training.share import share
from omnivideo.training.trainer import Losses, Recipe, at_once, step_seed
from omnivideo.training.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, random_scene

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
NEGATIVE_PROMPT = TINY.negative_prompt
SLOTS = 4
SIDES = ("left", "right", "top", "bottom")
WORDS = TINY.text_tokens  # the longest prompt


def corpus(count: int = 20_000) -> list[str]:
    """Prompts of every kind that the decoder will be given."""
    rng = random.Random("corpus")
    texts = [NEGATIVE_PROMPT] * 20
    for at in range(count):
        video = at % 2 == 0
        texts.append(caption(rng, random_scene(rng, video)).text if at % 3 else random_edit(rng, video).instruction)
    return texts


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding with byte fallback, with UMT5's conventions: `</s>` at the end, `<pad>` is 0."""
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
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=WORDS
    )


def load_or_build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").exists():
        build_tokenizer(corpus()).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


# ---------------------------------------------------------------- what a prompt asks for, as class numbers

FIELDS = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES, "motion": MOTIONS}


def slot_labels(want: Wanted | None) -> list[int]:
    """Class 0 is "no object", 1 is "left open", the rest are the values."""
    if want is None:
        return [0] * len(FIELDS)
    values = ((getattr(want, field), names) for field, names in FIELDS.items())
    return [1 if value is None else 2 + names.index(value) for value, names in values]


def demand_labels(demand: Demand) -> list[int]:
    """All labels of a prompt: four per slot, then background, relation and the four sides."""
    things = (*demand.things, *[None] * (SLOTS - len(demand.things)))
    labels = [label for want in things for label in slot_labels(want)]
    labels.append(0 if demand.background is None else 1 + list(BACKGROUNDS).index(demand.background))
    labels.append(0 if demand.relation is None else 1 + RELATIONS.index(demand.relation))
    return labels + [int(side in demand.region) for side in SIDES]


CLASSES = [2 + len(names) for _ in range(SLOTS) for names in FIELDS.values()]
CLASSES += [1 + len(BACKGROUNDS), 1 + len(RELATIONS)] + [2] * len(SIDES)


class Asker(nn.Module):
    """One learned query per label attends to the encoder's hidden states; only training needs it."""

    def __init__(self, dim: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(CLASSES), dim) * 0.5)
        self.attend = nn.MultiheadAttention(dim, 6, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.answer = nn.Linear(dim, max(CLASSES))

    def forward(self, hidden_BLD: Tensor, padding_BL: Tensor) -> Tensor:
        """Logits [B, labels, classes]."""
        query = self.query.expand(len(hidden_BLD), -1, -1)
        found, _ = self.attend(query, hidden_BLD, hidden_BLD, key_padding_mask=padding_BL, need_weights=False)
        return self.answer(self.norm(found + query))


# ---------------------------------------------------------------- what each token tells

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Told of an object by the tokens of its phrase ...
ABOUT_THING = [2 + len(names) for names in FIELDS.values()] + [1 + len(RELATIONS), 1 + len(PLACES), 1 + SLOTS]
# ... and of the whole prompt by all tokens: the background, the number of objects, the kind of edit.
ABOUT_ALL = [1 + len(BACKGROUNDS), 1 + SLOTS, 1 + len(VIDEO_EDITS)]
UNTOLD = -100


def caption_told(one: Caption, offsets: list[tuple[int, int]]) -> list[list[int]]:
    """Labels of every token of a caption, given the tokens' places in it."""
    demand = one.demand
    background = 0 if demand.background is None else 1 + list(BACKGROUNDS).index(demand.background)
    about_all = [background, len(demand.things), 0]
    told = [[UNTOLD] * len(ABOUT_THING) + about_all for _ in offsets]
    for slot, (want, span) in enumerate(zip(demand.things, one.spans, strict=True)):
        relation = demand.relation if slot == 0 else OPPOSITE.get(demand.relation or "")
        role = 0 if relation is None else 1 + RELATIONS.index(relation)
        place = 1 + list(PLACES).index(demand.region) if demand.region else 0
        about = [*slot_labels(want), role, place, one.spans.count(span)]
        for at, (start, end) in enumerate(offsets):
            if span[0] <= start < end <= span[1]:
                told[at] = about + about_all
    return told


def edit_told(edit: Edit, offsets: list[tuple[int, int]]) -> list[list[int]]:
    """Labels of every token of an instruction: the kind of edit, and what it puts in the old one's place."""
    new = edit.touched[-1] if edit.touched else None
    changed = {"recolour": ("colour",), "reshape": ("shape",), "motion": ("motion",), "add": tuple(FIELDS)}
    fields = changed.get(edit.kind, ())
    want = Wanted(**{name: getattr(new, name) for name in fields if name != "motion" or edit.source.is_video})
    to_background = 1 + list(BACKGROUNDS).index(edit.target.background) if edit.kind == "background" else 0
    told = [*slot_labels(want), 0, 0, 0, to_background, 0, 1 + VIDEO_EDITS.index(edit.kind)]
    return [told if start < end else [UNTOLD] * len(told) for start, end in offsets]


class TextFoundation(nn.Module):
    def __init__(self, encoder: UMT5EncoderModel):
        super().__init__()
        self.encoder = encoder
        self.asker = Asker(encoder.config.d_model)
        self.teller = nn.Linear(encoder.config.d_model, sum(ABOUT_THING + ABOUT_ALL))

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The asker's logits [B, labels, classes], and the teller's for each of its fields [B, L, classes]."""
        hidden = self.encoder(ids_BL, attention_mask=mask_BL).last_hidden_state
        return self.asker(hidden, mask_BL == 0), list(self.teller(hidden).split(ABOUT_THING + ABOUT_ALL, dim=-1))


@dataclass(frozen=True)
class TextBatch:
    """Captions first, then instructions; only captions have the asker's labels [captions, labels]."""

    texts: list[str]
    asked: Tensor
    tell: Sequence[Callable[[list[tuple[int, int]]], list[list[int]]]]


def text_batch(step: int, captions: int, instructions: int) -> TextBatch:
    rng = random.Random(step_seed("text/data", step))
    said = share().take([caption(rng, random_scene(rng, video=at % 2 == 0)) for at in range(captions)])
    ordered = share().take([random_edit(rng, video=at % 2 == 0) for at in range(instructions)])
    return TextBatch(
        [one.text for one in said] + [one.instruction for one in ordered],
        torch.tensor([demand_labels(one.demand) for one in said]),
        [partial(caption_told, one) for one in said] + [partial(edit_told, one) for one in ordered],
    )


def told_loss(logits: list[Tensor], told_BLF: Tensor) -> tuple[Tensor, Tensor]:
    """Mean error over the fields, and the share of told labels that are right; both over the whole batch."""
    pairs = [(one.flatten(0, 1), told_BLF[..., field].flatten()) for field, one in enumerate(logits)]
    errors = [F.cross_entropy(one, told, ignore_index=UNTOLD, reduction="sum") for one, told in pairs]
    counts = share().mean((told_BLF != UNTOLD).sum((0, 1)))
    right = torch.stack([((one.argmax(-1) == told) & (told != UNTOLD)).sum() for one, told in pairs]).sum()
    return (torch.stack(errors) / counts).mean(), right / counts.sum()


def text_recipe(
    tokenizer: PreTrainedTokenizerFast, steps: int = 1000, captions: int = 72, instructions: int = 24
) -> Recipe:
    torch.manual_seed(1)
    model = TextFoundation(UMT5EncoderModel(UMT5Config(**CONFIG)))

    def loss(step: int) -> Losses:
        batch = text_batch(step, captions, instructions)
        tokens = tokenizer(batch.texts, padding=True, return_tensors="pt", return_offsets_mapping=True)
        told = torch.tensor([tell(at.tolist()) for tell, at in zip(batch.tell, tokens.offset_mapping, strict=True)])
        told[tokens.attention_mask == 0] = UNTOLD
        device = model.encoder.device
        answers, tellings = model(tokens.input_ids.to(device), tokens.attention_mask.to(device))
        asked, expected = answers[: len(batch.asked)], batch.asked.to(device)
        telling, told_right = told_loss(tellings, told.to(device))
        whole = (asked.argmax(-1) == expected).all(dim=1).float().mean()
        asking = F.cross_entropy(asked.flatten(0, 1), expected.flatten())
        return {"loss": asking + telling, "asked": asking, "told": telling, "told right": told_right, "whole": whole}

    return Recipe(
        "text", model, ("",), at_once(loss), steps=steps, lr=1e-2, adam_lr=2e-3, warmup=50,
        samples=lambda step: captions + instructions,
    )  # fmt: skip

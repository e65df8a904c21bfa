"""The paper's three stages (sections 4.2 and 4.3): what is trained, what is frozen, by which loss.

stage1   vision head, text head              Eq. 1 + Eq. 2, understanding and generation together
stage1_text  text head                       Eq. 2 alone, the first token above all: it is the route
stage2a  adapter                             its output against the decoder's text embeddings
stage2b  adapter (with the visual context)   flow matching through the frozen decoder: T2I + T2V first
                                             (stage2b_generation), then all four tasks
stage3   vision head, adapter, decoder       flow matching, with Eq. 1 kept for the vision head
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionModel

from omnivideo.models.conditions import assemble, count_tokens, pad
from omnivideo.models.mllm import ENDING, VISUAL_TOKENS, asking, states_of
from omnivideo.models.omni import Omni, Target
from omnivideo.presets import visual_context_tokens
from omnivideo.training.ahead import Ahead, as_it_is
from omnivideo.training.drawn import Drawn, Rows, gathered, pick
from omnivideo.training.flops import Flops, drawn_flops, joined_flops, matrices, mllm_flops, query_transformer_flops
from omnivideo.training.latents import to_pixels
from omnivideo.training.recipes.decoder import draw_noise, flow_matching
from omnivideo.training.recipes.mllm import (
    Sample,
    answered,
    batch_of,
    knowledge_sample,
    on,
    question_sample,
    route_sample,
    talk_sample,
    text_loss,
    thinking_sample,
)
from omnivideo.training.recipes.visual_encoder import embed_frames
from omnivideo.training.samples import TASKS, Request, Task, random_request
from omnivideo.training.share import share
from omnivideo.training.trainer import Losses, Passes, Recipe, at_once, step_seed

TEXT_MIX = (
    (question_sample, 0.5), (thinking_sample, 0.2), (route_sample, 0.18), (knowledge_sample, 0.06), (talk_sample, 0.06),
)  # fmt: skip

BATCH, TEXT_BATCH = 32, 48
SIZES = (64, 24)  # stills and clips in a batch

# What each stage trains, by the beginnings of its parameters' names.
JOINED = ("bridge.adapter", "bridge.visual_context", "bridge.markers")
TRAINED = {
    "stage1": ("mllm.lm_head", "bridge.vision_head"), "stage1_text": ("mllm.lm_head",), "stage2a": ("bridge.adapter",),
    "stage2b_generation": JOINED, "stage2b": JOINED, "stage3": ("bridge", "decoder"),
}  # fmt: skip
DRAWING = tuple(name for name, parts in TRAINED.items() if "mllm.lm_head" not in parts)  # seen in samples

# Resolution and frame count are shared inside a group, so its tasks share a batch.
GROUPS: tuple[tuple[Task, ...], ...] = (("text-to-image", "image-editing"), ("text-to-video", "video-editing"))


class Whole(nn.Module):
    """All trainable parts under the names that the stages speak of."""

    def __init__(self, omni: Omni):
        super().__init__()
        self.mllm = omni.mllm
        self.bridge = omni.bridge
        self.decoder = omni.decoder


# ---------------------------------------------------------------- stage 1


def alignment(visual_BQE: Tensor, target_BQE: Tensor) -> Tensor:
    """Eq. 1, the squared distance of the visual tokens to the encoder's embeddings, and the cosine that it allows.

    The embeddings are taken at mean 0 and deviation 1: the head ends in a layer norm, whose weights would have to grow
    tenfold to reach them as they are.
    """
    target = F.layer_norm(target_BQE, target_BQE.shape[-1:])
    return F.mse_loss(visual_BQE, target) + (1 - F.cosine_similarity(visual_BQE, target, dim=-1)).mean()


@dataclass
class Lesson:
    """What a process has of a batch of stage 1 in one pass: model inputs and labels, those that ask for something
    drawn first, with the pixels [B, 3, F, S, S] of what they ask for; what their mean weighs among those of all."""

    inputs: dict[str, Tensor]
    labels: Tensor
    pixels: Tensor
    weight: float = 1.0


def stage1_over(
    omni: Omni, encoder: SiglipVisionModel, draw: Callable[[int], Any], steps: int,
    samples: Callable[[int], int], workers: int = 0, ready: Callable[[Any], list[Lesson]] = as_it_is,
) -> Recipe:  # fmt: skip
    """Eq. 1 for what is asked to be drawn, Eq. 2 for all answers; `draw` may run in another process, `ready` gets
    what it made in this one, and has the lesson of each pass."""
    model = Whole(omni)
    queries = omni.bridge.vision_head.queries
    drawn = Ahead(draw, workers)
    work = Flops()

    def passes(step: int) -> Passes:
        nonlocal work
        given = ready(drawn(step))
        own = sum((stage1_flops(omni, one.inputs, max(1, len(one.pixels))) for one in given), Flops())
        work = own * (samples(step) / sum(len(one.labels) for one in given))
        answers = torch.stack([answered(one.labels) for one in given]).sum().to(omni.device)
        tokens = share().mean(answers) / len(given)
        return [partial(loss, one, tokens) for one in given]

    def loss(given: Lesson, tokens: Tensor) -> Losses:
        inputs, labels = on(omni.device, (given.inputs, given.labels))
        asked = len(given.pixels)
        with torch.no_grad():
            states = model.mllm.model(**inputs).last_hidden_state
        value, right = text_loss(model.mllm.lm_head(states), labels, tokens)
        some = slice(0, max(1, asked))  # where nothing is to be drawn the vision head goes along for nothing
        visual = model.bridge.vision_head(states[some], inputs["attention_mask"][some] == 0)
        if asked:
            with torch.no_grad():
                target = embed_frames(encoder, given.pixels, queries)
            vision = alignment(visual, target) * given.weight
        else:
            vision = 0.0 * visual.sum()
        return {"loss": value + vision, "text": value, "vision": vision, "right": right}

    return Recipe(
        "stage1", model, TRAINED["stage1"], passes, steps, lr=1e-2, adam_lr=2e-3, warmup=100, samples=samples,
        flops=lambda step: work.total,
    )  # fmt: skip


def stage1_flops(omni: Omni, inputs: Mapping[str, Tensor], asked: int) -> Flops:
    """Of a batch of which `asked` rows go through the vision head.  The teacher's are not counted: it is no part of
    the model."""
    assert omni.preset.vision_head is not None, "a version 1 preset"
    rows, tokens = inputs["input_ids"].shape
    head = query_transformer_flops(omni.preset.vision_head, tokens).trained * asked
    words = Flops(2.0 * rows * tokens * matrices(omni.mllm.lm_head))
    return mllm_flops(omni.mllm, inputs) + head + words.passed  # the states, frozen, have no gradients


def stage1_recipe(
    omni: Omni, encoder: SiglipVisionModel, steps: int = 2000, batch: int = BATCH, workers: int = 0
) -> Recipe:
    """Half of each batch asks for images and videos of all four tasks, half for text."""
    torch.manual_seed(11)

    def draw(step: int) -> list[Lesson]:
        rng = random.Random(step_seed("stage1/data", step))
        wanted = [random_request(rng, rng.choice(TASKS)) for _ in range(batch // 2)]
        makers = rng.choices([make for make, _ in TEXT_MIX], [weight for _, weight in TEXT_MIX], k=batch // 2)
        said = [make(rng, rng.random() < 0.5) for make in makers]
        wanted, said = share().take(wanted), share().take(said)
        samples = [(one.message, "".join(ENDING[one.kind])) for one in wanted] + said
        return [Lesson(*batch_of(omni.mllm, omni.mllm_tokenizer, samples, omni.pixels), equal_length(wanted))]

    return stage1_over(omni, encoder, draw, steps, lambda step: batch, workers)


def drawn_sample(rng: random.Random, video: bool) -> Sample:
    """A request of any of the four tasks that draw, with the route that it takes."""
    one = random_request(rng, rng.choice(TASKS[1::2] if video else TASKS[::2]))
    return one.message, "".join(ENDING[one.kind])


def first_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 2 at the answers' first tokens."""
    first = (labels[:, 1:] != -100).int().argmax(dim=1)
    rows = torch.arange(len(labels), device=labels.device)
    return F.cross_entropy(logits[rows, first].float(), labels[rows, first + 1])


def said_loss(logits: Tensor, labels: Tensor, routes: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 2 over what is said, as it is said: no visual token comes up in a text.

    After its reasoning the model is where it is before a plain request; there a route is right and here a word.
    """
    routes = routes.to(labels.device)
    words = logits.index_fill(-1, routes, torch.finfo(logits.dtype).min)
    return text_loss(words, labels.masked_fill(torch.isin(labels, routes), -100))


def stage1_text_recipe(omni: Omni, steps: int = 1500, batch: int = TEXT_BATCH, workers: int = 0) -> Recipe:
    """Stage 1 goes on with the text head alone, which needs more examples than the vision head.

    What later stages train does not depend on it, so it may run at any time after stage 1.
    """
    model = Whole(omni)

    def draw(step: int) -> tuple[dict[str, Tensor], Tensor]:
        rng = random.Random(step_seed("stage1_text/data", step))
        makers = rng.choices([make for make, _ in HEAD_MIX], [weight for _, weight in HEAD_MIX], k=batch)
        samples = share().take([make(rng, rng.random() < 0.5) for make in makers])
        return batch_of(omni.mllm, omni.mllm_tokenizer, samples, omni.pixels)

    drawn = Ahead(draw, workers)
    routes = torch.tensor(omni.mllm_tokenizer.convert_tokens_to_ids(list(VISUAL_TOKENS)))

    def loss(step: int) -> Losses:
        inputs, labels = on(omni.device, drawn(step))
        with torch.no_grad():
            states = model.mllm.model(**inputs).last_hidden_state
        logits = model.mllm.lm_head(states)
        first = first_token_loss(logits, labels)
        value, right = said_loss(logits, labels, routes)
        return {"loss": value + first, "first": first, "right": right}

    return Recipe(
        "stage1_text", model, TRAINED["stage1_text"], at_once(loss), steps, adam_lr=1e-3, warmup=20, ema=0.99,
        samples=lambda step: batch,
    )  # fmt: skip


def equal_length(wanted: Sequence[Request]) -> Tensor:
    """Pixels [B, 3, 9, H, W] of the targets; a still stands for all of its frames."""
    clips = [to_pixels([one.target]) for one in wanted]
    longest = max(clip.shape[2] for clip in clips)
    return torch.cat([clip.expand(-1, -1, longest, -1, -1) if clip.shape[2] == 1 else clip for clip in clips])


HEAD_MIX = (
    (question_sample, 0.45), (drawn_sample, 0.25), (thinking_sample, 0.15), (route_sample, 0.07),
    (knowledge_sample, 0.04), (talk_sample, 0.04),
)  # fmt: skip


# ---------------------------------------------------------------- stage 2a


def into_text_space(tokens_LD: Tensor, text_ND: Tensor) -> Tensor:
    """How far adapter tokens are from a prompt's text embeddings.

    Each text embedding should be found among the adapter's tokens by attention, and the two means should agree.
    """
    found = (text_ND @ tokens_LD.T / text_ND.shape[-1] ** 0.5).softmax(-1) @ tokens_LD
    return F.mse_loss(found, text_ND) + F.mse_loss(tokens_LD.mean(0), text_ND.mean(0))


def text_space_loss(omni: Omni, visual_BQE: Tensor, kinds: Sequence[Target], texts: Sequence[Tensor]) -> Tensor:
    pairs = zip(omni.adapted(visual_BQE, kinds), texts, strict=True)
    return torch.stack([into_text_space(tokens, text) for tokens, text in pairs]).mean()


def stage2a_over(omni: Omni, source: "Source", steps: int, workers: int = 0) -> Recipe:
    """Over text-to-image and text-to-video samples whose text embeddings are there."""
    model = Whole(omni)
    drawn = Ahead(source.draw, workers)
    work = Flops()

    def passes(step: int) -> Passes:
        nonlocal work
        parts = source.ready(drawn(step))
        work = whole_flops(parts, each)
        return [partial(loss, one) for one in parts]

    def each(rows: Rows) -> Flops:
        return joined_flops(omni.preset, TRAINED["stage2a"], rows.hidden.shape[1], rows.kind == "video")

    def loss(dealt: Portion) -> Losses:
        rows = dealt.rows.to(omni.device)
        with torch.no_grad():
            visual = visual_of(model, rows)
        return {"loss": text_space_loss(omni, visual, [rows.kind] * len(rows), rows.texts) * dealt.weight}

    return Recipe(
        "stage2a", model, TRAINED["stage2a"], passes, steps, lr=5e-3, adam_lr=1e-3, warmup=100,
        samples=source.samples, flops=lambda step: work.total, omni=omni,
    )  # fmt: skip


def stage2a_recipe(omni: Omni, steps: int = 1000, batch: int = 32) -> Recipe:
    torch.manual_seed(12)
    model = Whole(omni)
    work = Flops()

    def loss(step: int) -> Losses:
        nonlocal work
        rng = random.Random(step_seed("stage2a/data", step))
        wanted = share().take([random_request(rng, rng.choice(TASKS[:2])) for _ in range(batch)])
        with torch.no_grad():
            texts = omni.texts([one.text for one in wanted])
            inputs = asking(omni.mllm_tokenizer, [(one.message, one.kind) for one in wanted], omni.pixels)
            states, padding = states_of(model.mllm, inputs)
            visual = model.bridge.vision_head(states, padding)
        kinds = [one.kind for one in wanted]
        own = joined_flops(omni.preset, TRAINED["stage2a"], states.shape[1], "video" in kinds) * len(wanted)
        work = (own + mllm_flops(model.mllm, inputs)) * (batch / len(wanted))
        return {"loss": text_space_loss(omni, visual, kinds, texts)}

    return Recipe(
        "stage2a", model, TRAINED["stage2a"], at_once(loss), steps, lr=5e-3, adam_lr=1e-3, warmup=100,
        samples=lambda step: batch, flops=lambda step: work.total, omni=omni,
    )  # fmt: skip


# ---------------------------------------------------------------- stages 2b and 3


@dataclass(frozen=True)
class Drop:
    """Chances that a sample's condition loses both text and visual tokens, only the text, or only the tokens."""

    both: float = 0.1
    text: float = 0.15
    visual: float = 0.05

    def words(self, lot: float) -> bool:
        """Whether the text goes with this lot of 0 to 1."""
        return lot < self.both + self.text

    def tokens(self, lot: float) -> bool:
        """Whether the visual tokens go."""
        return lot < self.both or self.both + self.text <= lot < self.both + self.text + self.visual


def visual_of(model: Whole, rows: Rows) -> Tensor:
    """V_o [B, Q, E] of a batch's hidden states."""
    lengths = torch.tensor(rows.hidden_lengths, device=rows.hidden.device)
    padding = torch.arange(rows.hidden.shape[1], device=rows.hidden.device) >= lengths[:, None]
    return model.bridge.vision_head(rows.hidden, padding)


def group_condition(
    omni: Omni, model: Whole, rows: Rows, lots: Sequence[float], drop: Drop, null_LD: Tensor, length: int = 0
) -> tuple[Tensor, Tensor]:
    """c [B, L, D] of a mixed batch, with drops by lot, and the visual tokens [B, Q, E] that it was made from.

    At least of this length: the decoder attends to padding as well, so it is to be that of the whole batch.
    """
    visual = visual_of(model, rows)
    adapted = omni.adapted(visual, [rows.kind] * len(rows))
    texts = [null_LD if drop.words(lot) else text for lot, text in zip(lots, rows.texts, strict=True)]
    tokens = [None if drop.tokens(lot) else token for lot, token in zip(lots, adapted, strict=True)]
    least, most = omni.preset.condition_least, omni.preset.condition_most
    condition = assemble(model.bridge.markers, texts, tokens, edited_contexts(model, rows), least, most)
    return pad(condition, length, most), visual


def length_of(omni: Omni, rows: Rows, lots: Sequence[float], drop: Drop, null: int) -> int:
    """L of `group_condition`'s, before it is made."""
    t, h, w = rows.target.shape[2:]
    context, tokens = visual_context_tokens(omni.preset, (t, h, w)), omni.adapted_tokens(rows.kind)
    each = zip(lots, rows.text_lengths, rows.edited.tolist(), strict=True)
    lengths = [
        count_tokens(
            omni.bridge.markers, null if drop.words(lot) else words, None if drop.tokens(lot) else tokens,
            context if edited else None,
        )
        for lot, words, edited in each
    ]  # fmt: skip
    return max(omni.preset.condition_least, *lengths)


def edited_contexts(model: Whole, rows: Rows) -> list[Tensor | None]:
    """Visual context tokens of the rows that have a source."""
    if rows.source is None:
        return [None] * len(rows)
    made = iter(model.bridge.visual_context(rows.source))
    return [next(made) if edited else None for edited in rows.edited.tolist()]


@dataclass
class Portion:
    """What a process has of a step's batch in one pass: which of the `whole` batch's samples these are, what their
    mean weighs among those of all passes, and what was done to them `before`, by the model's frozen parts."""

    rows: Rows
    lots: list[float]
    whole: int
    part: slice | list[int]
    weight: float = 1.0
    before: Flops = field(default_factory=Flops)


class Source(Protocol):
    """Where the samples of stages 2b and 3 come from.

    `draw` may run in another process; `ready` is called with what it made, where the models are, for the portion of
    each pass.
    """

    def draw(self, step: int) -> Any: ...
    def ready(self, drawn: Any) -> list[Portion]: ...
    def samples(self, step: int) -> int: ...


class Mixed:
    """Whatever tasks there are data for; images (0) and videos (1) take `turns`, `edits` is their share of a batch."""

    def __init__(
        self,
        name: str,
        data: Mapping[Task, Drawn],
        sizes: tuple[int, int],
        turns: tuple[int, ...] = (0, 1),
        edits: float = 0.5,
    ):
        self.name, self.sizes, self.turns, self.edits = name, sizes, turns, edits
        self.groups = [[drawn for task, drawn in data.items() if task in names] for names in GROUPS]

    def draw(self, step: int) -> Portion:
        rng = random.Random(step_seed(f"{self.name}/data", step))
        kind = self.turns[step % len(self.turns)]
        picks = pick(rng, self.groups[kind], self.sizes[kind], self.edits)
        lots = [rng.random() for _ in picks]
        return Portion(gathered(share().take(picks)), share().take(lots), len(picks), share().part(len(picks)))

    def ready(self, drawn: Portion) -> list[Portion]:
        return [drawn]

    def samples(self, step: int) -> int:
        return self.sizes[self.turns[step % len(self.turns)]]


def flow_recipe(
    name: str, omni: Omni, source: Source, steps: int, lr: float, eq1: float, high: float = 0.5, workers: int = 0,
    trained: tuple[str, ...] = (),
) -> Recipe:  # fmt: skip
    """Flow matching through the decoder over mixed batches.

    It trains what the stage of that name does, or what is `trained`.  `high` is the share of noise levels as the
    sampler visits them; `eq1` weighs the vision head's own loss.
    """
    model = Whole(omni)
    with torch.no_grad():
        # The text encoder may lie elsewhere, and in another precision (`loading`).
        null = omni.texts([omni.preset.negative_prompt])[0].to(omni.device).float()
    drawn = Ahead(source.draw, workers)
    trains = trained or TRAINED[name]
    work = Flops()

    def passes(step: int) -> Passes:
        nonlocal work
        parts = source.ready(drawn(step))
        longest = share().longest(max(length_of(omni, one.rows, one.lots, Drop(), len(null)) for one in parts))
        work = whole_flops(parts, lambda rows: flow_flops(omni, trains, rows, longest))
        noise = draw_noise(parts[0].whole, parts[0].rows.target[:1].to(omni.device), high)
        return [partial(loss, one, longest, noise) for one in parts]

    def loss(dealt: Portion, longest: int, noise: tuple[Tensor, Tensor]) -> Losses:
        rows = dealt.rows.to(omni.device)
        condition, visual = group_condition(omni, model, rows, dealt.lots, Drop(), null, longest)
        drawn_here = noise[0][dealt.part], noise[1][dealt.part]
        errors = flow_matching(model.decoder, rows.target, condition, drawn=drawn_here)
        losses = {"loss": errors.mean()}
        if eq1:
            losses["vision"] = alignment(visual, rows.embeddings)
            losses["loss"] = losses["loss"] + eq1 * losses["vision"]
        losses["loss"] = losses["loss"] * dealt.weight
        shown = "clips" if rows.kind == "video" else "stills"
        for label, chosen in ((f"{shown}", ~rows.edited), (f"{shown} edited", rows.edited)):
            if chosen.any():
                losses[label] = errors[chosen].mean()
        return losses

    return Recipe(
        name, model, trains, passes, steps, lr=lr, adam_lr=lr / 10, warmup=200, ema=0.999,
        samples=source.samples, flops=lambda step: work.total, omni=omni,
    )  # fmt: skip


def whole_flops(parts: Sequence[Portion], each: Callable[[Rows], Flops]) -> Flops:
    """Of the whole batch, as if the other processes' parts were like this one's; `each`: of one of these rows."""
    own = sum((each(one.rows) * len(one.rows) + one.before for one in parts), Flops())
    return own * (parts[0].whole / sum(len(one.rows) for one in parts))


def flow_flops(omni: Omni, trained: Sequence[str], rows: Rows, condition: int) -> Flops:
    """Of one row, on average."""
    t, h, w = rows.target.shape[2:]
    edited = int(rows.edited.sum()) / len(rows)
    return drawn_flops(omni.preset, trained, (t, h, w), condition, rows.hidden.shape[1], edited)


def adapter_recipe(
    name: str, omni: Omni, data: Mapping[Task, Drawn], steps: int, sizes: tuple[int, int], workers: int
) -> Recipe:
    torch.manual_seed(13)
    return flow_recipe(name, omni, Mixed(name, data, sizes), steps, lr=5e-3, eq1=0.0, workers=workers, trained=JOINED)


def stage2b_generation_recipe(
    omni: Omni, data: Mapping[Task, Drawn], steps: int = 600, sizes: tuple[int, int] = SIZES, workers: int = 0
) -> Recipe:
    """The first sub-stage: text-to-image and text-to-video alone."""
    alone = {task: drawn for task, drawn in data.items() if task in TASKS[:2]}
    return adapter_recipe("stage2b_generation", omni, alone, steps, sizes, workers)


def stage2b_recipe(
    omni: Omni, data: Mapping[Task, Drawn], steps: int = 800, sizes: tuple[int, int] = SIZES, workers: int = 0
) -> Recipe:
    """The second: all four tasks through the frozen decoder."""
    return adapter_recipe("stage2b", omni, data, steps, sizes, workers)


def stage3_recipe(
    omni: Omni, data: Mapping[Task, Drawn], steps: int = 21_000, sizes: tuple[int, int] = SIZES, workers: int = 0
) -> Recipe:
    """Videos and edits more often than images and new ones: they are harder, and the decoder knows the others.

    At little noise the latents themselves tell what is to come; what to edit is learned from the condition at much.
    """
    torch.manual_seed(14)
    source = Mixed("stage3", data, sizes, turns=(0, 1, 1, 1, 1), edits=0.8)
    return flow_recipe("stage3", omni, source, steps, lr=7e-3, eq1=0.1, high=0.9, workers=workers)

"""The stages over shards: the samples of an epoch in its order, from the shards and the cache.

Stage 1 needs the shards alone.  From stage 2a on latents and text come from the cache (`omnivideo data encode`); the
MLLM's hidden states, and in stage 3 the visual encoder's embeddings, are computed as they are needed, from the media.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import SiglipVisionModel

from omnivideo.models.mllm import ENDING, Media, Message, asking, states_of
from omnivideo.models.omni import Omni
from omnivideo.models.vae import from_bytes
from omnivideo.training.data.batches import Batch, Bucket, Mix
from omnivideo.training.data.encode import Cache, Fit, ordered
from omnivideo.training.data.sample import Sample, fitted
from omnivideo.training.data.shards import Entry, Library
from omnivideo.training.drawn import Rows
from omnivideo.training.flops import mllm_flops
from omnivideo.training.recipes.mllm import batch_of, with_places
from omnivideo.training.recipes.stages import Lesson, Portion
from omnivideo.training.recipes.visual_encoder import embed_frames
from omnivideo.training.share import share
from omnivideo.training.trainer import step_seed


@dataclass
class Part:
    """What a process has of a step: the numbers of its samples, and as a Portion has it which of the whole batch's
    they are and what they weigh."""

    bucket: Bucket
    numbers: list[int]
    whole: int
    at: slice
    weight: float


class Epochs:
    """The wanted samples of a library, epoch after epoch, each in its order."""

    def __init__(self, name: str, library: Library, fit: Fit, mix: Mix, wanted: Callable[[Entry], bool]):
        self.name, self.library, self.fit = name, library, fit
        self.order, self.numbers = ordered(library, fit, mix, wanted)
        self.lengths: list[int] = []

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted on from epoch to epoch."""
        epoch = 0
        while True:
            if epoch == len(self.lengths):
                self.lengths.append(len(self.order.epoch(epoch)))
            if step < self.lengths[epoch]:
                return self.order.epoch(epoch)[step]
            step, epoch = step - self.lengths[epoch], epoch + 1

    def samples(self, step: int) -> int:
        return len(self.batch(step).indices)

    def part(self, step: int) -> Part:
        """This process's."""
        batch = self.batch(step)
        whole, at = len(batch.indices), share().part(len(batch.indices))
        weight = (at.stop - at.start) * share().world / whole
        if not weight:  # fewer samples than processes: this one goes along with another's, for nothing
            at = slice(0, 1)
        return Part(batch.bucket, [self.numbers[one] for one in batch.indices[at]], whole, at, weight)

    def message(self, sample: Sample, text: str, bucket: Bucket) -> Message:
        """What the MLLM is asked: the text, with the source where there is one."""
        media: tuple[Media, ...] = ()
        if sample.source is not None:
            frames = fitted(sample.source, bucket.width, bucket.height, bucket.frames, self.fit.fps)
            media = (Media(frames, self.fit.fps, bucket.group == "video"),)
        return Message(text, media)

    def seen(self, encoder: SiglipVisionModel, samples: list[Sample], bucket: Bucket) -> Tensor:
        """Pixels [B, 3, F, S, S] of the targets, as the visual encoder sees them."""
        side = encoder.config.image_size
        targets = [one.target for one in samples if one.target is not None]
        if not targets:
            return torch.zeros(0, 3, bucket.frames, side, side)
        return from_bytes(np.stack([fitted(one, side, side, bucket.frames, self.fit.fps) for one in targets]))


# ---------------------------------------------------------------- stage 1


class Lessons(Epochs):
    """Stage 1's samples of all six tasks.  Of several questions about one medium each time one is asked."""

    def __init__(self, omni: Omni, library: Library, fit: Fit, mix: Mix, encoder: SiglipVisionModel):
        super().__init__("stage1", library, fit, mix, lambda entry: True)
        self.omni, self.encoder = omni, encoder

    def draw(self, step: int) -> Lesson:
        part, rng = self.part(step), random.Random(step_seed("stage1/turns", step))
        lots = [rng.random() for _ in range(part.whole)][part.at]
        found = zip((self.library[number] for number in part.numbers), lots, strict=True)
        pairs = sorted(found, key=lambda pair: pair[0].target is None)
        given = [self.said(sample, lot, part.bucket) for sample, lot in pairs]
        inputs, labels = batch_of(self.omni.mllm, self.omni.mllm_tokenizer, given, self.omni.pixels)
        pixels = self.seen(self.encoder, [sample for sample, _ in pairs], part.bucket)
        if not part.weight:
            labels, pixels = torch.full_like(labels, -100), pixels[:0]
        everybody = max(1, self.drawing(step))
        return Lesson(inputs, labels, pixels, len(pixels) * share().world / everybody)

    def drawing(self, step: int) -> int:
        """How many of the whole batch ask for something drawn."""
        numbers = [self.numbers[at] for at in self.batch(step).indices]
        return sum(not self.library.entries[number].task.endswith("understanding") for number in numbers)

    def said(self, sample: Sample, lot: float, bucket: Bucket) -> tuple[Message, str]:
        """A request and its answer: for what is drawn, the token that says so."""
        if sample.target is not None:
            return self.message(sample, sample.text, bucket), "".join(ENDING[bucket.group])
        question, answer = sample.turns[int(lot * len(sample.turns))]
        return self.message(sample, question, bucket), answer


# ---------------------------------------------------------------- from stage 2a on


@dataclass
class Loaded:
    """A process's part of a batch as it is on disk: `rows` still lack hidden states and embeddings."""

    dealt: Portion
    asked: dict[str, Tensor]
    pixels: Tensor | None


class ShardSource(Epochs):
    """A `Source` of the stages' recipes.  With an `encoder` the targets are embedded as well (Eq. 1)."""

    def __init__(
        self,
        name: str,
        omni: Omni,
        library: Library,
        cache: Cache,
        fit: Fit,
        mix: Mix,
        encoder: SiglipVisionModel | None = None,
    ):
        endings = ("to-image", "to-video") + (() if name in ("stage2a", "stage2b_generation") else ("editing",))
        super().__init__(name, library, fit, mix, lambda entry: entry.task.endswith(endings) and entry in cache)
        self.omni, self.cache, self.encoder = omni, cache, encoder

    def draw(self, step: int) -> Loaded:
        part = self.part(step)
        rng = random.Random(step_seed(f"{self.name}/lots", step))
        lots = [rng.random() for _ in range(part.whole)][part.at]
        samples = [self.library[number] for number in part.numbers]
        requests = [(self.message(one, one.text, part.bucket), part.bucket.group) for one in samples]
        return Loaded(
            Portion(self.cached(part.numbers), lots, part.whole, part.at, part.weight),
            with_places(self.omni.mllm, asking(self.omni.mllm_tokenizer, requests, self.omni.pixels)),
            None if self.encoder is None else self.seen(self.encoder, samples, part.bucket),
        )

    def cached(self, numbers: list[int]) -> Rows:
        found = [self.cache(self.library.entries[number]) for number in numbers]
        text = [one["text"].float() for one in found]
        sources = [one["source"].float() for one in found if "source" in one]
        nothing = torch.zeros(len(found), 0)
        return Rows(
            torch.stack([one["target"].float() for one in found]),
            torch.tensor(["source" in one for one in found]),
            torch.stack(sources) if sources else None,
            nothing, [],
            pad_sequence(text, batch_first=True), [len(row) for row in text],
            nothing,
        )  # fmt: skip

    @torch.no_grad()
    def ready(self, drawn: Loaded) -> Portion:
        rows = drawn.dealt.rows
        states, padding = states_of(self.omni.mllm, drawn.asked)
        rows.hidden = states.masked_fill(padding[..., None], 0.0).float()
        rows.hidden_lengths = (~padding).sum(1).tolist()
        drawn.dealt.before = mllm_flops(self.omni.mllm, drawn.asked)
        if self.encoder is not None and drawn.pixels is not None:
            rows.embeddings = embed_frames(
                self.encoder, drawn.pixels, self.omni.bridge.vision_head.decoder_query.shape[1]
            )
        return drawn.dealt

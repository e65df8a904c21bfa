"""The stages over shards: the samples of an epoch in its order, from the shards and the cache.

Stage 1 needs the shards alone.  From stage 2a on latents and text come from the cache (`omnivideo data encode`) where
it has them; what it has not, the MLLM's hidden states, and in stage 3 the visual encoder's embeddings are computed as
they are needed, from the media.

A sample that cannot be read when its turn comes is left out of its batch, whose mean is over the others, and is named
in the library's problems.  Where a process has none left, a blank one goes along for nothing.
"""

import hashlib
import io
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import SiglipVisionModel

from omnivideo.models.mllm import ENDING, Media, Message, asking, states_of
from omnivideo.models.omni import Omni
from omnivideo.models.vae import from_bytes
from omnivideo.training.data.batches import Batch, Bucket, Mix
from omnivideo.training.data.encode import TOGETHER, Cache, Fit, Frozen, ordered
from omnivideo.training.data.sample import Problem, Problems, Sample, fitted
from omnivideo.training.data.shards import Entry, Library
from omnivideo.training.drawn import Rows
from omnivideo.training.flops import mllm_flops
from omnivideo.training.loading import bring
from omnivideo.training.recipes.mllm import batch_of, with_places
from omnivideo.training.recipes.stages import Lesson, Portion
from omnivideo.training.recipes.visual_encoder import embed_frames, looked_at
from omnivideo.training.share import share
from omnivideo.training.trainer import step_seed

T = TypeVar("T")
log = logging.getLogger("omnivideo.training")


@dataclass
class Part:
    """What a process has of a step: the numbers of its samples, which of the whole batch's they are, and whether they
    count: with fewer samples than processes one goes along with another's, for nothing."""

    bucket: Bucket
    numbers: list[int]
    whole: int
    at: slice
    counts: bool


class Epochs:
    """The wanted samples of a library, epoch after epoch, each in its order.

    `micro`: how many a process takes in one forward and backward pass at the most; None: all that it has of a batch.
    """

    def __init__(self, name: str, library: Library, fit: Fit, mix: Mix, wanted: Callable[[Entry], bool]):
        self.name, self.library, self.fit = name, library, fit
        self.micro: int | None = None
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

    def digest(self) -> str:
        """Sixteen hex digits over the samples, what they are brought to, and their order.

        A sample is told by its name and by where its members lie in the shard: keys alone are mere numbers.
        """
        seen = hashlib.sha256(repr((self.order.digest(), self.fit)).encode())
        for entry in (self.library.entries[number] for number in self.numbers):
            seen.update(repr((entry.shard, entry.key, sorted(entry.members.items()))).encode())
        return seen.hexdigest()[:16]

    def part(self, step: int) -> Part:
        """This process's."""
        batch = self.batch(step)
        whole, at = len(batch.indices), share().part(len(batch.indices))
        counts = at.stop > at.start
        at = at if counts else slice(0, 1)
        return Part(batch.bucket, [self.numbers[one] for one in batch.indices[at]], whole, at, counts)

    def passes(self, rows: list[T]) -> list[list[T]]:
        """What is to be taken at once, as evenly as can be."""
        count = -(-len(rows) // (self.micro or len(rows)))
        return [rows[len(rows) * at // count : len(rows) * (at + 1) // count] for at in range(count)]

    def message(self, sample: Sample, text: str, bucket: Bucket) -> Message:
        """What the MLLM is asked: the text, with the source where there is one."""
        media: tuple[Media, ...] = ()
        if sample.source is not None:
            frames = fitted(sample.source, bucket.width, bucket.height, bucket.frames, self.fit.fps)
            media = (Media(frames, self.fit.fps, bucket.group == "video"),)
        return Message(text, media)

    def seen(self, omni: Omni, encoder: SiglipVisionModel, sample: Sample, bucket: Bucket) -> Tensor:
        """uint8 [1, F, S, S, 3], or [0, ...] where nothing is drawn: what the visual encoder looks at of a target."""
        side, tokens = encoder.config.image_size, omni.bridge.vision_head.queries
        only = looked_at(bucket.frames, tokens).tolist() if bucket.group == "video" else [0]
        if sample.target is None:
            return torch.zeros(0, len(only), side, side, 3, dtype=torch.uint8)
        return torch.from_numpy(fitted(sample.target, side, side, bucket.frames, self.fit.fps, only))[None]


def blank(bucket: Bucket) -> Sample:
    """A black still that is asked for without a word."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return Sample("text-to-video" if bucket.group == "video" else "text-to-image", target=file.getvalue())


def readable(
    library: Library, part: Part, make: Callable[[int, Sample, Entry | None], T]
) -> tuple[list[T], bool, list[Problem]]:
    """What is made of each sample (by its place in the whole batch) that can be read, whether they count, and why the
    others cannot.  Where none can, it is made of a blank one, which has no entry and does not count."""
    problems, made = Problems(), list[T]()
    for at, number in zip(range(part.whole)[part.at], part.numbers, strict=True):
        entry = library.entries[number]
        with problems.skipping(f"{entry.shard}/{entry.key}"):
            made.append(make(at, library[number], entry))
    counts = part.counts and bool(made)
    return made or [make(part.at.start, blank(part.bucket), None)], counts, problems.found


def meet(library: Library, problems: list[Problem]) -> None:
    """Adds them to the library's, and says those that are new: a run may end before its report is written."""
    for problem in library.problems.meet(problems):
        log.warning("skipped, %s: %s: %s", *problem)


def weights_of(counts: Sequence[int], device: torch.device) -> list[float]:
    """What a mean over so many samples, in each of this process's passes, weighs among those of all; all processes are
    asked."""
    each = float(share().mean(torch.tensor(float(sum(counts)), device=device)))
    return [count * len(counts) / max(1e-6, each) for count in counts]


# ---------------------------------------------------------------- stage 1


class Lessons(Epochs):
    """Stage 1's samples of all six tasks.  Of several questions about one medium each time one is asked."""

    def __init__(self, omni: Omni, library: Library, fit: Fit, mix: Mix, encoder: SiglipVisionModel):
        super().__init__("stage1", library, fit, mix, lambda entry: True)
        self.omni, self.encoder = omni, encoder

    def draw(self, step: int) -> tuple[list[Lesson], list[Problem]]:
        part, rng = self.part(step), random.Random(step_seed("stage1/turns", step))
        lots = [rng.random() for _ in range(part.whole)]

        def made(at: int, sample: Sample, entry: Entry | None) -> tuple[tuple[Message, str], Tensor]:
            return self.said(sample, lots[at], part.bucket), self.seen(self.omni, self.encoder, sample, part.bucket)

        rows, counts, problems = readable(self.library, part, made)
        return [self.lesson(some, counts) for some in self.passes(rows)], problems

    def lesson(self, rows: list[tuple[tuple[Message, str], Tensor]], counts: bool) -> Lesson:
        rows.sort(key=lambda row: not len(row[1]))
        inputs, labels = batch_of(self.omni.mllm, self.omni.mllm_tokenizer, [row[0] for row in rows], self.omni.pixels)
        pixels = torch.cat([row[1] for row in rows])
        if not counts:
            labels, pixels = torch.full_like(labels, -100), pixels[:0]
        return Lesson(inputs, labels, pixels)

    def ready(self, drawn: tuple[list[Lesson], list[Problem]]) -> list[Lesson]:
        """With their weights, and pixels in -1..1."""
        lessons, problems = drawn
        meet(self.library, problems)
        weights = weights_of([len(one.pixels) for one in lessons], self.omni.device)
        return [
            replace(one, weight=weight, pixels=from_bytes(one.pixels.numpy()))
            for one, weight in zip(lessons, weights, strict=True)
        ]

    def said(self, sample: Sample, lot: float, bucket: Bucket) -> tuple[Message, str]:
        """A request and its answer: for what is drawn, the token that says so."""
        if sample.target is not None:
            return self.message(sample, sample.text, bucket), "".join(ENDING[bucket.group])
        question, answer = sample.turns[int(lot * len(sample.turns))]
        return self.message(sample, question, bucket), answer


# ---------------------------------------------------------------- from stage 2a on

Tensors = dict[str, Tensor]


@dataclass
class Row:
    """A sample as it is on disk: latents and text as the cache has `kept` them, else `pixels` [F, H, W, 3] to encode;
    what the visual encoder is to see, uint8 [1, F, S, S, 3]."""

    at: int  # in the whole batch
    message: Message
    kept: Tensors
    pixels: Tensors
    seen: Tensor | None


@dataclass
class Loaded:
    """What a process has of a batch in one pass before any model saw it: its rows, of which `count` count, and their
    places in the whole batch."""

    kept: list[Tensors]
    pixels: list[Tensors]
    texts: list[str]
    lots: list[float]
    places: list[int]
    whole: int
    count: int
    asked: Tensors
    seen: Tensor | None


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
        super().__init__(name, library, fit, mix, lambda entry: entry.task.endswith(endings))
        self.omni, self.cache, self.encoder, self.frozen = omni, cache, encoder, Frozen.of(omni)

    def draw(self, step: int) -> tuple[list[Loaded], list[Problem]]:
        part = self.part(step)
        rng = random.Random(step_seed(f"{self.name}/lots", step))
        lots = [rng.random() for _ in range(part.whole)]

        def made(at: int, sample: Sample, entry: Entry | None) -> Row:
            return self.row(at, sample, self.cache(entry) if entry else {}, part.bucket)

        rows, counts, problems = readable(self.library, part, made)
        return [self.loaded(some, lots, part, counts) for some in self.passes(rows)], problems

    def loaded(self, rows: list[Row], lots: list[float], part: Part, counts: bool) -> Loaded:
        requests = [(one.message, part.bucket.group) for one in rows]
        seen = [one.seen for one in rows if one.seen is not None]
        return Loaded(
            [one.kept for one in rows], [one.pixels for one in rows],
            [one.message.text for one in rows], [lots[one.at] for one in rows], [one.at for one in rows],
            part.whole, len(rows) if counts else 0,
            with_places(self.omni.mllm, asking(self.omni.mllm_tokenizer, requests, self.omni.pixels)),
            torch.cat(seen) if seen else None,
        )  # fmt: skip

    def row(self, at: int, sample: Sample, kept: Tensors, bucket: Bucket) -> Row:
        """Raises InvalidInput for what cannot be used."""
        pixels: Tensors = {}
        if not kept:
            self.frozen.check(sample.text)
            pixels = {name: torch.from_numpy(part) for name, part in self.fit.pixels(sample, bucket).items()}
        seen = None if self.encoder is None else self.seen(self.omni, self.encoder, sample, bucket)
        return Row(at, self.message(sample, sample.text, bucket), kept, pixels, seen)

    def ready(self, drawn: tuple[list[Loaded], list[Problem]]) -> list[Portion]:
        parts, problems = drawn
        meet(self.library, problems)
        weights = weights_of([one.count for one in parts], self.omni.device)
        return [self.portion(one, weight) for one, weight in zip(parts, weights, strict=True)]

    @torch.no_grad()
    def portion(self, drawn: Loaded, weight: float) -> Portion:
        rows = rows_of(self.encoded(drawn))
        states, padding = states_of(self.omni.mllm, drawn.asked)
        rows.hidden = states.masked_fill(padding[..., None], 0.0).float()
        rows.hidden_lengths = (~padding).sum(1).tolist()
        if self.encoder is not None and drawn.seen is not None:
            seen = from_bytes(drawn.seen.numpy())
            rows.embeddings = embed_frames(self.encoder, seen, self.omni.bridge.vision_head.queries)
        before = mllm_flops(self.omni.mllm, drawn.asked)
        return Portion(rows, drawn.lots, drawn.whole, drawn.places, weight, before)

    def encoded(self, drawn: Loaded) -> list[Tensors]:
        """Latents and text of each row; what the cache has not is made as it would have it, whatever the precision of
        the products around."""
        rows = [dict(kept) for kept in drawn.kept]
        left = [
            (row, name, part.numpy())
            for row, parts in zip(rows, drawn.pixels, strict=True) for name, part in parts.items()
        ]  # fmt: skip
        each = TOGETHER if left and len(left[0][2]) == 1 else 1  # a clip alone is large enough
        if left:
            bring(self.omni)
        with torch.autocast(self.omni.device.type, enabled=False):
            for some in (left[at : at + each] for at in range(0, len(left), each)):
                made = self.frozen.latents([part for *_, part in some])
                for (row, name, _), latents in zip(some, made, strict=True):
                    row[name] = latents
            for row, parts, text in zip(rows, drawn.pixels, drawn.texts, strict=True):
                if parts:
                    row["text"] = self.frozen.text(text)
        return rows


def rows_of(found: list[Tensors]) -> Rows:
    """A batch of what the cache has of each sample; hidden states and embeddings are still lacking."""
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

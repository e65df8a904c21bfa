"""Stages 2b and 3 over shards: the samples of an epoch in its order, from the cache and the shards.

Latents and text come from the cache (`omnivideo data encode`); the MLLM's hidden states, and in stage 3 the visual
encoder's embeddings, are computed as they are needed, from the media.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import SiglipVisionModel

from omnivideo.models.mllm import Media, Message, asking, states_of
from omnivideo.models.omni import Omni
from omnivideo.models.vae import from_bytes
from omnivideo.training.data.batches import Batch, Bucket, Group, Mix
from omnivideo.training.data.encode import Cache, Fit, ordered
from omnivideo.training.data.sample import Sample, fitted
from omnivideo.training.data.shards import Library
from omnivideo.training.drawn import Rows
from omnivideo.training.recipes.mllm import with_places
from omnivideo.training.recipes.stages import Portion
from omnivideo.training.recipes.visual_encoder import embed_frames
from omnivideo.training.share import share
from omnivideo.training.trainer import step_seed


@dataclass
class Loaded:
    """A process's part of a batch as it is on disk: `rows` still lack hidden states and embeddings."""

    dealt: Portion
    asked: dict[str, Tensor]
    pixels: Tensor | None


class ShardSource:
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
        self.name, self.omni, self.library, self.cache, self.fit, self.encoder = (
            name, omni, library, cache, fit, encoder,
        )  # fmt: skip
        drawn = {entry.task for entry in library.entries if entry.task.endswith(("to-image", "to-video", "editing"))}
        if name == "stage2b_generation":
            drawn = {task for task in drawn if not task.endswith("editing")}
        self.order, self.numbers = ordered(library, fit, mix, lambda entry: entry.task in drawn and entry in cache)
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

    def draw(self, step: int) -> Loaded:
        batch = self.batch(step)
        whole, part = len(batch.indices), share().part(len(batch.indices))
        weight = (part.stop - part.start) * share().world / whole
        if not weight:  # fewer samples than processes: this one goes along with another's, for nothing
            part = slice(0, 1)
        rng = random.Random(step_seed(f"{self.name}/lots", step))
        lots = [rng.random() for _ in range(whole)][part]
        numbers = [self.numbers[at] for at in batch.indices[part]]
        samples = [self.library[number] for number in numbers]
        asked = asking(self.omni.mllm_tokenizer, [self.message(one, batch.bucket) for one in samples], self.omni.pixels)
        rows = self.cached(numbers)
        return Loaded(
            Portion(rows, lots, whole, part, weight),
            with_places(self.omni.mllm, asked),
            None if self.encoder is None else self.seen(samples, batch.bucket),
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

    def message(self, sample: Sample, bucket: Bucket) -> tuple[Message, Group]:
        """What the MLLM is asked: the text, with the source where something is edited."""
        media: tuple[Media, ...] = ()
        if sample.source is not None:
            frames = fitted(sample.source, bucket.width, bucket.height, bucket.frames, self.fit.fps)
            media = (Media(frames, self.fit.fps, bucket.group == "video"),)
        return Message(sample.text, media), bucket.group

    def seen(self, samples: list[Sample], bucket: Bucket) -> Tensor:
        """Pixels [B, 3, F, S, S] of the targets, as the visual encoder sees them."""
        assert self.encoder is not None
        side = self.encoder.config.image_size
        targets = [one.target for one in samples if one.target is not None]
        return from_bytes(np.stack([fitted(one, side, side, bucket.frames, self.fit.fps) for one in targets]))

    @torch.no_grad()
    def ready(self, drawn: Loaded) -> Portion:
        rows = drawn.dealt.rows
        states, padding = states_of(self.omni.mllm, drawn.asked)
        rows.hidden = states.masked_fill(padding[..., None], 0.0).float()
        rows.hidden_lengths = (~padding).sum(1).tolist()
        if self.encoder is not None and drawn.pixels is not None:
            rows.embeddings = embed_frames(
                self.encoder, drawn.pixels, self.omni.bridge.vision_head.decoder_query.shape[1]
            )
        return drawn.dealt

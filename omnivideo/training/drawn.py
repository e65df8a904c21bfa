"""The data of stages 2b and 3: everything that is frozen there, computed once.

Per request: latents of the target and of the source, last hidden states of the MLLM, text embeddings, and the visual
encoder's embeddings of the target (Eq. 1).  Ragged rows are kept flat with their offsets, in half precision.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import SiglipVisionModel

from omnivideo.models.mllm import asking, states_of
from omnivideo.models.omni import Omni, Target
from omnivideo.models.vae import encode
from omnivideo.training.ahead import in_order
from omnivideo.training.latents import digest, to_pixels
from omnivideo.training.recipes.mllm import with_places
from omnivideo.training.recipes.visual_encoder import embed_frames
from omnivideo.training.samples import Request

Tell = Callable[[int, int], None]
T = TypeVar("T")
CHUNK = 32


class Ragged:
    """Rows [n_i, D] of different lengths."""

    def __init__(self, flat: Tensor, offsets: Tensor):
        self.flat, self.offsets = flat, offsets

    @classmethod
    def of(cls, rows: Sequence[Tensor]) -> "Ragged":
        lengths = torch.tensor([0, *map(len, rows)])
        return cls(torch.cat(list(rows)).half(), lengths.cumsum(0))

    def __getitem__(self, at: int) -> Tensor:
        return self.flat[self.offsets[at] : self.offsets[at + 1]].float()

    def __add__(self, more: "Ragged") -> "Ragged":
        offsets = torch.cat([self.offsets, self.offsets[-1] + more.offsets[1:]])
        return Ragged(torch.cat([self.flat, more.flat]), offsets)


@dataclass
class Drawn:
    """One task's requests with all that is frozen; `source` is None in generation mode."""

    target: Tensor
    source: Tensor | None
    hidden: Ragged
    text: Ragged
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def __add__(self, more: "Drawn") -> "Drawn":
        """More requests of the same task."""
        assert (self.source is None) == (more.source is None)
        source = None if self.source is None or more.source is None else torch.cat([self.source, more.source])
        return Drawn(
            torch.cat([self.target, more.target]), source, self.hidden + more.hidden, self.text + more.text,
            torch.cat([self.embeddings, more.embeddings]),
        )  # fmt: skip


Pick = tuple[Drawn, int]  # a task, and which of its requests


@dataclass
class Rows:
    """A batch.  Latents [B, z, T, h, w], and [E, ...] of the sources of the rows that have one; hidden states
    [B, N, M] and text [B, L, D] with their lengths, zero past them; embeddings [B, Q, E]."""

    target: Tensor
    edited: Tensor
    source: Tensor | None
    hidden: Tensor
    hidden_lengths: list[int]
    text: Tensor
    text_lengths: list[int]
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def to(self, device: torch.device) -> "Rows":
        """All but `edited`, which is asked for on the CPU."""
        parts = {name: part for name, part in vars(self).items() if isinstance(part, Tensor) and name != "edited"}
        moved: dict[str, Any] = {name: part.to(device) for name, part in parts.items()}
        return replace(self, **moved)

    @property
    def kind(self) -> Target:
        return "video" if self.target.shape[2] > 1 else "image"

    @property
    def texts(self) -> list[Tensor]:
        return [row[:length] for row, length in zip(self.text, self.text_lengths, strict=True)]


def pick(rng: random.Random, tasks: Sequence[Drawn], count: int, edits: float = 0.5) -> list[Pick]:
    """A mixed batch: `count` samples of tasks that share resolution and frame count (hybrid mixed batching).

    `edits` is the share of the tasks that have a source, where both kinds are there.
    """
    shares = [1 - edits if task.source is None else edits for task in tasks]
    return [(drawn, rng.randrange(len(drawn))) for drawn in rng.choices(tasks, shares, k=count)]


def gathered(picks: Sequence[Pick]) -> Rows:
    """The samples as one batch in single precision."""
    hidden, text = [drawn.hidden[at] for drawn, at in picks], [drawn.text[at] for drawn, at in picks]
    sources = [drawn.source[at].float() for drawn, at in picks if drawn.source is not None]
    return Rows(
        torch.stack([drawn.target[at].float() for drawn, at in picks]),
        torch.tensor([drawn.source is not None for drawn, _ in picks]),
        torch.stack(sources) if sources else None,
        pad_sequence(hidden, batch_first=True), [len(row) for row in hidden],
        pad_sequence(text, batch_first=True), [len(row) for row in text],
        torch.stack([drawn.embeddings[at].float() for drawn, at in picks]),
    )  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How the data are made: so many requests at once, prepared by so many processes (0: by this one)."""

    tell: Tell
    chunk: int = CHUNK
    workers: int = 0

    def over(self, requests: list[Request], prepare: Callable[[list[Request]], T]) -> Iterator[T]:
        """What `prepare` makes of each chunk."""
        starts = range(0, len(requests), self.chunk)
        made = in_order(lambda first: prepare(requests[first : first + self.chunk]), starts, self.workers)
        for first, one in zip(starts, made, strict=True):
            yield one
            self.tell(min(first + self.chunk, len(requests)), len(requests))


@torch.no_grad()
def draw_fixed(omni: Omni, encoder: SiglipVisionModel, requests: list[Request], way: Way) -> dict[str, Tensor]:
    """What does not hang on the MLLM: latents, text embeddings, and the visual encoder's of the target."""
    text, embeddings, latents = [], [], defaultdict(list)
    queries = omni.bridge.vision_head.queries

    def rendered(some: list[Request]) -> tuple[list[str], dict[str, Tensor]]:
        pixels = {"target": to_pixels(one.target for one in some)}
        sources = [one.source for one in some if one.source is not None]
        return [one.text for one in some], pixels | ({"source": to_pixels(sources)} if sources else {})

    for texts, pixels in way.over(requests, rendered):
        text += [row.cpu() for row in omni.texts(texts)]
        moved = {name: part.to(omni.device) for name, part in pixels.items()}
        embeddings.append(embed_frames(encoder, moved["target"], queries).half().cpu())
        for name, part in moved.items():
            latents[name].append(encode(omni.vae, part).half().cpu())
    tensors = {name: torch.cat(parts) for name, parts in latents.items()} | {"embeddings": torch.cat(embeddings)}
    return tensors | flat("text", text)


@torch.no_grad()
def draw_hidden(omni: Omni, requests: list[Request], way: Way) -> dict[str, Tensor]:
    """The MLLM's last hidden states."""
    hidden = []

    def asked(some: list[Request]) -> dict[str, Tensor]:
        inputs = asking(omni.mllm_tokenizer, [(one.message, one.kind) for one in some], omni.pixels)
        return with_places(omni.mllm, inputs)

    for inputs in way.over(requests, asked):
        states, padding = states_of(omni.mllm, inputs)
        hidden += [row[~gone].half().cpu() for row, gone in zip(states, padding, strict=True)]
    return flat("hidden", hidden)


def flat(name: str, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    ragged = Ragged.of(rows)
    return {name: ragged.flat, f"{name}_offsets": ragged.offsets}


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The file's tensors, made where it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(make(), partial)
        partial.rename(path)
    return load_file(path)


def key_of(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def drawn_fixed(
    folder: Path, omni: Omni, encoder: SiglipVisionModel, requests: list[Request], way: Way
) -> tuple[str, str, dict[str, Tensor]]:
    """What does not hang on the MLLM, with its name and key, from the folder's cache where it has it."""
    name = f"{requests[0].task}-{len(requests)}"
    key = key_of(requests, *map(digest, (omni.vae, omni.text_encoder, encoder)))
    return name, key, kept(folder / f"{name}-{key}.safetensors", lambda: draw_fixed(omni, encoder, requests, way))


def drawn(folder: Path, omni: Omni, encoder: SiglipVisionModel, requests: list[Request], way: Way) -> Drawn:
    """The data of one task, from the folder's cache where it has them."""
    name, fixed, saved = drawn_fixed(folder, omni, encoder, requests, way)
    hidden = key_of(fixed, digest(omni.mllm.model))
    saved |= kept(folder / f"{name}-hidden-{hidden}.safetensors", lambda: draw_hidden(omni, requests, way))
    states, text = (Ragged(saved[name], saved[f"{name}_offsets"]) for name in ("hidden", "text"))
    return Drawn(saved["target"], saved.get("source"), states, text, saved["embeddings"])

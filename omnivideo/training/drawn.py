"""The data of stages 2b and 3: everything that is frozen there, computed once.

Per request: latents of the target and of the source, last hidden states of the MLLM, text embeddings, and the visual
encoder's embeddings of the target (Eq. 1).  Ragged rows are kept flat with their offsets, in half precision.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SiglipVisionModel

from omnivideo.models.mllm import hidden_states
from omnivideo.models.omni import Omni
from omnivideo.training.latents import digest, encode_scenes, to_pixels
from omnivideo.training.recipes.visual_encoder import embed_frames
from omnivideo.training.samples import Request

CHUNK = 32
Tell = Callable[[int, int], None]


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


@dataclass
class Row:
    """One sample of a batch: latents [z, T, h, w], hidden states [N, M], text [L, D], embeddings [Q, E]."""

    target: Tensor
    source: Tensor | None
    hidden: Tensor
    text: Tensor
    embeddings: Tensor

    def to(self, device: torch.device) -> "Row":
        """The same row on a device."""
        source = None if self.source is None else self.source.to(device)
        parts = (self.hidden.to(device), self.text.to(device), self.embeddings.to(device))
        return Row(self.target.to(device), source, *parts)


def pick_rows(rng: random.Random, tasks: Sequence[Drawn], count: int, edits: float = 0.5) -> list[Row]:
    """A mixed batch: `count` samples of tasks that share resolution and frame count (hybrid mixed batching).

    `edits` is the share of the tasks that have a source, where both kinds are there.
    """
    rows, shares = [], [1 - edits if task.source is None else edits for task in tasks]
    for drawn in rng.choices(tasks, shares, k=count):
        at = rng.randrange(len(drawn))
        source = None if drawn.source is None else drawn.source[at].float()
        rows.append(Row(drawn.target[at].float(), source, drawn.hidden[at], drawn.text[at],
                        drawn.embeddings[at].float()))  # fmt: skip
    return rows


@torch.no_grad()
def draw_fixed(omni: Omni, encoder: SiglipVisionModel, requests: list[Request], tell: Tell) -> dict[str, Tensor]:
    """What does not hang on the MLLM: latents, text embeddings, and the visual encoder's of the target."""
    text, embeddings = [], []
    queries = omni.bridge.vision_head.decoder_query.shape[1]
    for chunk in chunks(requests, tell):
        text += omni.texts([one.text for one in chunk])
        embeddings.append(embed_frames(encoder, to_pixels(one.target for one in chunk), queries).half())
    tensors = {"target": encode_scenes(omni.vae, [one.target for one in requests]), "embeddings": torch.cat(embeddings)}
    sources = [one.source for one in requests if one.source is not None]
    if sources:
        tensors["source"] = encode_scenes(omni.vae, sources)
    return tensors | flat("text", text)


@torch.no_grad()
def draw_hidden(omni: Omni, requests: list[Request], tell: Tell) -> dict[str, Tensor]:
    """The MLLM's last hidden states."""
    hidden = []
    for chunk in chunks(requests, tell):
        asked = [(one.message, one.kind) for one in chunk]
        states, padding = hidden_states(omni.mllm, omni.mllm_tokenizer, asked, omni.pixels)
        hidden += [row[~gone] for row, gone in zip(states, padding, strict=True)]
    return flat("hidden", hidden)


def chunks(requests: list[Request], tell: Tell) -> Iterator[list[Request]]:
    for first in range(0, len(requests), CHUNK):
        yield requests[first : first + CHUNK]
        tell(min(first + CHUNK, len(requests)), len(requests))


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


def drawn(folder: Path, omni: Omni, encoder: SiglipVisionModel, requests: list[Request], tell: Tell) -> Drawn:
    """The data of one task, from the folder's cache where it has them."""
    name = f"{requests[0].task}-{len(requests)}"
    fixed = key_of(requests, *map(digest, (omni.vae, omni.text_encoder, encoder)))
    hidden = key_of(fixed, digest(omni.mllm.model))
    saved = kept(folder / f"{name}-{fixed}.safetensors", lambda: draw_fixed(omni, encoder, requests, tell))
    saved |= kept(folder / f"{name}-hidden-{hidden}.safetensors", lambda: draw_hidden(omni, requests, tell))
    states, text = (Ragged(saved[name], saved[f"{name}_offsets"]) for name in ("hidden", "text"))
    return Drawn(saved["target"], saved.get("source"), states, text, saved["embeddings"])

"""The data of stages 2b and 3: everything that is frozen there, computed once.

Per request: latents of the target and of the source, last hidden states of the MLLM, text embeddings, and the visual
encoder's embeddings of the target (Eq. 1).  Ragged rows are kept flat with their offsets, in half precision.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
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


@dataclass
class Row:
    """One sample of a batch: latents [z, T, h, w], hidden states [N, M], text [L, D], embeddings [Q, E]."""

    target: Tensor
    source: Tensor | None
    hidden: Tensor
    text: Tensor
    embeddings: Tensor


def pick_rows(rng: random.Random, tasks: Sequence[Drawn], count: int) -> list[Row]:
    """A mixed batch: `count` samples of tasks that share resolution and frame count (hybrid mixed batching)."""
    rows = []
    for _ in range(count):
        drawn = rng.choice(tasks)
        at = rng.randrange(len(drawn))
        source = None if drawn.source is None else drawn.source[at].float()
        rows.append(Row(drawn.target[at].float(), source, drawn.hidden[at], drawn.text[at],
                        drawn.embeddings[at].float()))  # fmt: skip
    return rows


@torch.no_grad()
def draw(omni: Omni, encoder: SiglipVisionModel, requests: list[Request], tell: Tell) -> dict[str, Tensor]:
    """The tensors of a cache file."""
    hidden, text, embeddings = [], [], []
    for first in range(0, len(requests), CHUNK):
        chunk = requests[first : first + CHUNK]
        states, padding = hidden_states(
            omni.mllm, omni.mllm_tokenizer, [(one.message, one.kind) for one in chunk], omni.pixels
        )
        hidden += [row[~gone] for row, gone in zip(states, padding, strict=True)]
        text += omni.texts([one.text for one in chunk])
        queries = omni.bridge.vision_head.decoder_query.shape[1]
        embeddings.append(embed_frames(encoder, to_pixels(one.target for one in chunk), queries).half())
        tell(min(first + CHUNK, len(requests)), len(requests))
    tensors = {"target": encode_scenes(omni.vae, [one.target for one in requests]), "embeddings": torch.cat(embeddings)}
    for name, rows in (("hidden", hidden), ("text", text)):
        ragged = Ragged.of(rows)
        tensors |= {name: ragged.flat, f"{name}_offsets": ragged.offsets}
    sources = [one.source for one in requests if one.source is not None]
    if sources:
        tensors["source"] = encode_scenes(omni.vae, sources)
    return tensors


def drawn(folder: Path, omni: Omni, encoder: SiglipVisionModel, requests: list[Request], tell: Tell) -> Drawn:
    """The data of one task, from the folder's cache where it has it."""
    parts = (omni.vae, omni.mllm.model, omni.text_encoder, encoder)
    key = hashlib.sha256(repr((requests, [digest(part) for part in parts])).encode()).hexdigest()[:16]
    path = folder / f"{requests[0].task}-{len(requests)}-{key}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(draw(omni, encoder, requests, tell), partial)
        partial.rename(path)
    saved = load_file(path)
    hidden, text = (Ragged(saved[name], saved[f"{name}_offsets"]) for name in ("hidden", "text"))
    return Drawn(saved["target"], saved.get("source"), hidden, text, saved["embeddings"])

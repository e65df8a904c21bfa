"""What is frozen, computed once: latents and text states beside the shards.

    00000.<digest>.safetensors     KEY/target, KEY/source [z, T, h, w] and KEY/text [L, D], in half precision

The digest is over the weights and the buckets, so another model's cache is never taken for this one's.  A shard that
has its file is done; a run that was killed goes on with the next.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from omnivideo.errors import NotStored, UnreadableMedia
from omnivideo.models.checkpoint import read_index, strictly
from omnivideo.models.conditions import check_words, encode_text
from omnivideo.models.omni import Omni
from omnivideo.models.vae import encode, from_bytes
from omnivideo.presets import preset
from omnivideo.training.data.batches import Bucket, Mix, Order, bucket_for
from omnivideo.training.data.sample import Problems, Sample, fitted
from omnivideo.training.data.shards import Entry, Library
from omnivideo.training.data.shelves import Shelf

TOGETHER = 8  # samples of one bucket that the VAE encodes at once
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Fit:
    """The buckets that samples are brought to, and the frames a second that clips are seen at (8; in stage 3, 12)."""

    buckets: tuple[Bucket, ...]
    fps: float = 8.0

    def of(self, entry: Entry) -> Bucket:
        """Raises InvalidInput for a clip that is too short."""
        shape = entry.shape
        return bucket_for(self.buckets, entry.task, shape.width, shape.height, shape.frames, shape.fps, self.fps)

    def pixels(self, sample: Sample, bucket: Bucket) -> dict[str, np.ndarray]:
        """[F, H, W, 3] of the target and, where there is one, the source.  Raises UnreadableMedia."""
        return {
            name: fitted(data, bucket.width, bucket.height, bucket.frames, self.fps)
            for name in ("source", "target") if (data := getattr(sample, name)) is not None
        }  # fmt: skip


@dataclass
class Frozen:
    """The models whose outputs are kept."""

    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    most_words: int
    name: str = ""  # of the weights

    @classmethod
    def load(cls, folder: Path, device: str, dtype: torch.dtype = torch.float32) -> "Frozen":
        """The two models of a weights folder, without the rest of it."""
        vae = strictly(AutoencoderKLWan, folder, "vae", dtype).to(device).eval()
        text_encoder = strictly(UMT5EncoderModel, folder, "text_encoder", dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        words = preset(read_index(folder)["preset"]).text_tokens
        return cls(vae, text_encoder, tokenizer, words, name_of(folder))

    @classmethod
    def of(cls, omni: Omni) -> "Frozen":
        return cls(omni.vae, omni.text_encoder, omni.tokenizer, omni.preset.text_tokens)

    def digest(self, fit: Fit) -> str:
        return digest_of(self.name, fit)

    def check(self, text: str) -> None:
        """Raises ConditionTooLong for a text that `text` would not take."""
        check_words(len(self.tokenizer(text, verbose=False).input_ids), self.most_words)

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """[L, D]; raises ConditionTooLong."""
        return encode_text(self.tokenizer, self.text_encoder, [text], self.most_words)[0][0].half().cpu()

    @torch.no_grad()
    def latents(self, pixels: Sequence[np.ndarray]) -> list[Tensor]:
        """[z, T, h, w] of each, from pixels [F, H, W, 3] of one shape."""
        if not pixels:
            return []
        batch = from_bytes(np.stack(pixels)).to(self.vae.device, self.vae.dtype)
        return list(encode(self.vae, batch).half().cpu())


def name_of(folder: Path) -> str:
    """What tells a weights folder's VAE and text encoder from others."""
    files = read_index(folder)["sha256"].items()
    used = {name: value for name, value in files if name.startswith(("vae/", "text_encoder/"))}
    return json.dumps(used, sort_keys=True)


def digest_of(name: str, fit: Fit) -> str:
    return hashlib.sha256(repr((name, fit)).encode()).hexdigest()[:12]


def ordered(
    library: Library, fit: Fit, mix: Mix, wanted: Callable[[Entry], bool] = lambda entry: True
) -> tuple[Order, list[int]]:
    """The order of the batches of a library's wanted samples, and the number in the library of each of them."""
    numbers, buckets = [], []
    for number, entry in enumerate(library.entries):
        if not wanted(entry):
            continue
        with library.problems.skipping(f"{entry.shard}/{entry.key}"):
            buckets.append(fit.of(entry))
            numbers.append(number)
    return Order([library.entries[number].task for number in numbers], buckets, mix), numbers


# ---------------------------------------------------------------- making


def cache_name(shard: str, digest: str) -> str:
    return f"{shard.removesuffix('.tar')}.{digest}.safetensors"


def encode_all(library: Library, frozen: Frozen, fit: Fit, tell: Callable[[int, int], None]) -> int:
    """Encodes every shard that has no file yet; `tell` hears of samples done and in all.  Returns samples encoded."""
    digest, done = frozen.digest(fit), 0
    there = set(library.shelf.names(".safetensors"))
    drawn = [(at, entry) for at, entry in enumerate(library.entries) if not entry.task.endswith("understanding")]
    left = [(at, entry) for at, entry in drawn if cache_name(entry.shard, digest) not in there]
    for shard, some in groupby(left, key=lambda pair: pair[1].shard):
        tensors: dict[str, Tensor] = {}
        for chunk in chunks(list(some), fit, library.problems):
            tensors |= encode_chunk(library, frozen, fit, chunk)
            done += len(chunk)
            tell(done, len(left))
        put(library.shelf, cache_name(shard, digest), tensors)
    return done


def chunks(some: list[tuple[int, Entry]], fit: Fit, problems: Problems) -> Iterator[list[tuple[int, Bucket]]]:
    """The numbers of a shard's samples with their bucket, a few of one bucket and kind of task at a time."""
    placed = []
    for at, entry in some:
        with problems.skipping(f"{entry.shard}/{entry.key}"):
            placed.append((fit.of(entry), entry.task, at))
    for _, group in groupby(sorted(placed), key=lambda one: one[:2]):
        same = [(at, bucket) for bucket, _, at in group]
        yield from (same[first : first + TOGETHER] for first in range(0, len(same), TOGETHER))


def encode_chunk(library: Library, frozen: Frozen, fit: Fit, chunk: list[tuple[int, Bucket]]) -> dict[str, Tensor]:
    """Tensors by name of samples of one bucket and task; what cannot be read or is too long is noted and left out."""
    texts: dict[str, Tensor] = {}
    pixels: dict[str, np.ndarray] = {}
    for at, bucket in chunk:
        entry = library.entries[at]
        with library.problems.skipping(f"{entry.shard}/{entry.key}"):
            sample = library[at]
            seen = fit.pixels(sample, bucket)
            texts[f"{entry.key}/text"] = frozen.text(sample.text)
            pixels |= {f"{entry.key}/{name}": part for name, part in seen.items()}
    return texts | dict(zip(pixels, frozen.latents(list(pixels.values())), strict=True))


def put(shelf: Shelf, name: str, tensors: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        shelf.put(path)


# ---------------------------------------------------------------- using


class Cache:
    """The tensors of single samples, read by their place in the file: neither disk nor S3 has to give all of it."""

    def __init__(self, shelf: Shelf, digest: str):
        self.shelf, self.digest = shelf, digest
        self.tables: dict[str, tuple[int, dict]] = {}

    def __call__(self, entry: Entry) -> dict[str, Tensor]:
        """text, target and, where something is edited, source; nothing where they were not encoded.

        Raises UnreadableMedia where the file is damaged.
        """
        name = cache_name(entry.shard, self.digest)
        try:
            start, table = self.table(name)
            keys = {part: f"{entry.key}/{part}" for part in ("text", "target", "source")}
            return {part: self.tensor(name, start, table[key]) for part, key in keys.items() if key in table}
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError):
            raise UnreadableMedia("cache", f"{name} is damaged; remove it, then encode again") from None

    def table(self, name: str) -> tuple[int, dict]:
        """Where a file's tensors begin, and its header (safetensors: 8 bytes of length, JSON, tensors)."""
        if name not in self.tables:
            try:
                length = int.from_bytes(self.shelf.read(name, 0, 8), "little")
                self.tables[name] = (8 + length, json.loads(self.shelf.read(name, 8, length)))
            except NotStored:  # nor is it asked for again
                self.tables[name] = (0, {})
        return self.tables[name]

    def tensor(self, name: str, start: int, row: dict) -> Tensor:
        first, last = row["data_offsets"]
        data = bytearray(self.shelf.read(name, start + first, last - first))
        if len(data) != math.prod(row["shape"]) * DTYPES[row["dtype"]].itemsize:
            raise ValueError(f"{len(data)} bytes")
        return torch.frombuffer(data, dtype=DTYPES[row["dtype"]]).view(row["shape"])

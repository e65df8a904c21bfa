"""The latent cache: outputs of the frozen encoders, stored beside the shards.

    00000.<digest>.safetensors     KEY/target, KEY/source [z, T, h, w] and KEY/text [L, D], in half precision

The digest covers the weights and the buckets, so a cache is never used with another model. A shard that has its file is
complete; a killed run continues with the next one.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from omnivideo.contracts import TASKS
from omnivideo.errors import ArtifactNotFound, UnreadableMedia
from omnivideo.media.read import read_fitted_media
from omnivideo.models.conditions import encode_text, tokenize_prompts
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.vae import encode_pixels, pixels_from_bytes
from omnivideo.models.weights.checkpoint import load_strict
from omnivideo.models.weights.shipped import read_index
from omnivideo.presets import TextConfig, get_preset
from omnivideo.training.data.batch_sampler import BatchSampler, Bucket, MixConfig, select_bucket
from omnivideo.training.data.file_store import FileStore
from omnivideo.training.data.sample import TRAINING_LIMITS, SkipReport, TrainingSample
from omnivideo.training.data.webdataset import SampleRef, ShardDataset

ENCODE_BATCH_SIZE = 8  # samples of one bucket that the VAE encodes at once
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class BucketAssigner:
    """Assigns samples to buckets; clips are sampled at `fps` (8; in stage 3, 12)."""

    buckets: tuple[Bucket, ...]
    fps: float = 8.0

    @property
    def digest_key(self) -> str:
        """Return the text to digest, as in version 0.1, so that its caches and checkpoints are still found."""
        return f"Fit(buckets={self.buckets!r}, fps={self.fps!r})"

    def assign_bucket(self, entry: SampleRef) -> Bucket:
        """Return a sample's bucket; raise InvalidInput for a clip that is too short."""
        shape = entry.shape
        return select_bucket(self.buckets, entry.task, shape.width, shape.height, shape.frames, shape.fps, self.fps)

    def load_pixels(self, sample: TrainingSample, bucket: Bucket) -> dict[str, np.ndarray]:
        """Return the pixels [F, H, W, 3] of the target and of the source, if there is one; raise UnreadableMedia."""
        return {
            name: read_fitted_media(
                data, bucket.width, bucket.height, bucket.frames, self.fps, TRAINING_LIMITS, field=name
            )
            for name in ("source", "target") if (data := getattr(sample, name)) is not None
        }  # fmt: skip


@dataclass
class FrozenEncoders:
    """The models whose outputs are cached."""

    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    text_config: TextConfig
    weights_fingerprint: str = ""

    @classmethod
    def load(cls, folder: Path, device: str, dtype: torch.dtype = torch.float32) -> "FrozenEncoders":
        """Load the two models of a weights folder without the others."""
        vae = load_strict(AutoencoderKLWan, folder, "vae", dtype).to(device).eval()
        text_encoder = load_strict(UMT5EncoderModel, folder, "text_encoder", dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        text_config = get_preset(read_index(folder)["preset"]).text
        return cls(vae, text_encoder, tokenizer, text_config, fingerprint_weights(folder))

    @classmethod
    def from_omni(cls, omni: OmniVideoModel) -> "FrozenEncoders":
        """Return the encoders of a loaded model."""
        return cls(omni.vae, omni.text_encoder, omni.tokenizer, omni.preset.text)

    def compute_digest(self, assigner: BucketAssigner) -> str:
        """Return the digest of caches with these weights and buckets."""
        return compute_cache_digest(self.weights_fingerprint, assigner)

    def check_text_length(self, text: str) -> None:
        """Raise ConditionTooLong for a text that `encode_prompt` would refuse."""
        tokenize_prompts(self.tokenizer, [text], self.text_config)

    @torch.no_grad()
    def encode_prompt(self, text: str) -> Tensor:
        """Return text embeddings [L, D]; raise ConditionTooLong."""
        return encode_text(self.tokenizer, self.text_encoder, [text], self.text_config)[0][0].half().cpu()

    @torch.no_grad()
    def encode_latents(self, pixels: Sequence[np.ndarray]) -> list[Tensor]:
        """Return latents [z, T, h, w] of each clip, from pixels [F, H, W, 3] of one shape."""
        if not pixels:
            return []
        batch = pixels_from_bytes(np.stack(pixels)).to(self.vae.device, self.vae.dtype)
        return list(encode_pixels(self.vae, batch).half().cpu())


def fingerprint_weights(folder: Path) -> str:
    """Return the hashes of a weights folder's VAE and text encoder as text."""
    files = read_index(folder)["sha256"].items()
    encoder_files = {name: value for name, value in files if name.startswith(("vae/", "text_encoder/"))}
    return json.dumps(encoder_files, sort_keys=True)


def compute_cache_digest(weights_fingerprint: str, assigner: BucketAssigner) -> str:
    """Return twelve hex digits over the weights and the buckets."""
    return hashlib.sha256(f"({weights_fingerprint!r}, {assigner.digest_key})".encode()).hexdigest()[:12]


def build_batch_sampler(
    dataset: ShardDataset,
    assigner: BucketAssigner,
    mix: MixConfig,
    include: Callable[[SampleRef], bool] = lambda entry: True,
) -> tuple[BatchSampler, list[int]]:
    """Return the sampler over the included samples, and the index of each in the data set."""
    sample_indices, buckets = [], []
    for index, entry in enumerate(dataset.entries):
        if not include(entry):
            continue
        with dataset.skip_report.skip_on_error(f"{entry.shard}/{entry.key}"):
            buckets.append(assigner.assign_bucket(entry))
            sample_indices.append(index)
    return BatchSampler([dataset.entries[number].task for number in sample_indices], buckets, mix), sample_indices


# ---------------------------------------------------------------- writing


def cache_name(shard: str, digest: str) -> str:
    """Return the file name of a shard's cache."""
    return f"{shard.removesuffix('.tar')}.{digest}.safetensors"


def encode_shards(
    dataset: ShardDataset, encoders: FrozenEncoders, assigner: BucketAssigner, on_progress: Callable[[int, int], None]
) -> int:
    """Encode every shard without a cache file; return the number of samples encoded.

    `on_progress` is called with the samples done and their total.
    """
    digest, encoded_count = encoders.compute_digest(assigner), 0
    cache_files = set(dataset.file_store.list_names(".safetensors"))
    generative_entries = [(index, entry) for index, entry in enumerate(dataset.entries) if entry.task in TASKS]
    remaining = [pair for pair in generative_entries if cache_name(pair[1].shard, digest) not in cache_files]
    for shard, shard_entries in groupby(remaining, key=lambda pair: pair[1].shard):
        tensors: dict[str, Tensor] = {}
        for chunk in group_into_chunks(list(shard_entries), assigner, dataset.skip_report):
            tensors |= encode_chunk(dataset, encoders, assigner, chunk)
            encoded_count += len(chunk)
            on_progress(encoded_count, len(remaining))
        store_tensors(dataset.file_store, cache_name(shard, digest), tensors)
    return encoded_count


def group_into_chunks(
    indexed_entries: list[tuple[int, SampleRef]], assigner: BucketAssigner, skip_report: SkipReport
) -> Iterator[list[tuple[int, Bucket]]]:
    """Yield indices of a shard's samples with their bucket, in chunks of one bucket and one task."""
    placements = []
    for index, entry in indexed_entries:
        with skip_report.skip_on_error(f"{entry.shard}/{entry.key}"):
            placements.append((assigner.assign_bucket(entry), entry.task, index))
    for _, group in groupby(sorted(placements), key=lambda placement: placement[:2]):
        indexed_buckets = [(index, bucket) for bucket, _, index in group]
        yield from (
            indexed_buckets[first : first + ENCODE_BATCH_SIZE]
            for first in range(0, len(indexed_buckets), ENCODE_BATCH_SIZE)
        )


def encode_chunk(
    dataset: ShardDataset, encoders: FrozenEncoders, assigner: BucketAssigner, chunk: list[tuple[int, Bucket]]
) -> dict[str, Tensor]:
    """Return tensors by name for samples of one bucket and task; unreadable or too long ones are skipped."""
    texts: dict[str, Tensor] = {}
    pixels: dict[str, np.ndarray] = {}
    for index, bucket in chunk:
        entry = dataset.entries[index]
        with dataset.skip_report.skip_on_error(f"{entry.shard}/{entry.key}"):
            sample = dataset[index]
            sample_pixels = assigner.load_pixels(sample, bucket)
            texts[f"{entry.key}/text"] = encoders.encode_prompt(sample.text)
            pixels |= {f"{entry.key}/{name}": part for name, part in sample_pixels.items()}
    return texts | dict(zip(pixels, encoders.encode_latents(list(pixels.values())), strict=True))


def store_tensors(file_store: FileStore, name: str, tensors: dict[str, Tensor]) -> None:
    """Write tensors as a safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        file_store.put_file(path)


# ---------------------------------------------------------------- reading


class LatentCache:
    """Reads the tensors of single samples by their byte ranges, without reading the whole file."""

    def __init__(self, file_store: FileStore, digest: str):
        self.file_store, self.digest = file_store, digest
        self.headers: dict[str, tuple[int, dict[str, Any]]] = {}

    def __call__(self, entry: SampleRef) -> dict[str, Tensor]:
        """Return a sample's `text`, `target` and, for edits, `source`; nothing if it was not encoded.

        Raises UnreadableMedia if the file is damaged.
        """
        name = cache_name(entry.shard, self.digest)
        try:
            start, header = self.read_header(name)
            keys = {part: f"{entry.key}/{part}" for part in ("text", "target", "source")}
            return {part: self.read_tensor(name, start, header[key]) for part, key in keys.items() if key in header}
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError):
            raise UnreadableMedia("cache", f"{name} is damaged; delete it, then run `omnivideo data encode`") from None

    def read_header(self, name: str) -> tuple[int, dict[str, Any]]:
        """Return the offset of a file's tensors, and its header (safetensors: 8 bytes of length, JSON, tensors)."""
        if name not in self.headers:
            try:
                length = int.from_bytes(self.file_store.read_range(name, 0, 8), "little")
                self.headers[name] = (8 + length, json.loads(self.file_store.read_range(name, 8, length)))
            except ArtifactNotFound:  # the absence is cached, so that it is not requested again
                self.headers[name] = (0, {})
        return self.headers[name]

    def read_tensor(self, name: str, start: int, tensor_info: dict[str, Any]) -> Tensor:
        """Read one tensor; raise ValueError if bytes are missing."""
        first, last = tensor_info["data_offsets"]
        data = bytearray(self.file_store.read_range(name, start + first, last - first))
        if len(data) != math.prod(tensor_info["shape"]) * DTYPES[tensor_info["dtype"]].itemsize:
            raise ValueError(f"{len(data)} bytes")
        return torch.frombuffer(data, dtype=DTYPES[tensor_info["dtype"]]).view(tensor_info["shape"])

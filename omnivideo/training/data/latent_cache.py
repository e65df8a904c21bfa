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

from omnivideo.contracts import TASKS
from omnivideo.errors import ArtifactNotFound, UnreadableMedia
from omnivideo.media.read import read_fitted_media
from omnivideo.models.conditions import check_prompt_length, encode_text
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.vae import encode_pixels, pixels_from_bytes
from omnivideo.models.weights.checkpoint import load_strict, read_index
from omnivideo.presets import get_preset
from omnivideo.training.data.batch_sampler import BatchSampler, Bucket, MixConfig, select_bucket
from omnivideo.training.data.file_store import FileStore
from omnivideo.training.data.sample import TRAINING_LIMITS, SkipReport, TrainingSample
from omnivideo.training.data.webdataset import SampleRef, ShardDataset

ENCODE_BATCH_SIZE = 8  # samples of one bucket that the VAE encodes at once
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class BucketAssigner:
    """The buckets that samples are brought to, and the frames a second that clips are seen at (8; in stage 3, 12)."""

    buckets: tuple[Bucket, ...]
    fps: float = 8.0

    @property
    def digest_key(self) -> str:
        """What digests are over, spelled as in version 0.1: other caches and checkpoints would not be found again."""
        return f"Fit(buckets={self.buckets!r}, fps={self.fps!r})"

    def assign_bucket(self, entry: SampleRef) -> Bucket:
        """Raises InvalidInput for a clip that is too short."""
        shape = entry.shape
        return select_bucket(self.buckets, entry.task, shape.width, shape.height, shape.frames, shape.fps, self.fps)

    def load_pixels(self, sample: TrainingSample, bucket: Bucket) -> dict[str, np.ndarray]:
        """[F, H, W, 3] of the target and, where there is one, the source.  Raises UnreadableMedia."""
        return {
            name: read_fitted_media(
                data, bucket.width, bucket.height, bucket.frames, self.fps, TRAINING_LIMITS, field=name
            )
            for name in ("source", "target") if (data := getattr(sample, name)) is not None
        }  # fmt: skip


@dataclass
class FrozenEncoders:
    """The models whose outputs are kept."""

    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    max_text_tokens: int
    weights_fingerprint: str = ""  # of the weights

    @classmethod
    def load(cls, folder: Path, device: str, dtype: torch.dtype = torch.float32) -> "FrozenEncoders":
        """The two models of a weights folder, without the rest of it."""
        vae = load_strict(AutoencoderKLWan, folder, "vae", dtype).to(device).eval()
        text_encoder = load_strict(UMT5EncoderModel, folder, "text_encoder", dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        max_text_tokens = get_preset(read_index(folder)["preset"]).max_text_tokens
        return cls(vae, text_encoder, tokenizer, max_text_tokens, fingerprint_weights(folder))

    @classmethod
    def from_omni(cls, omni: OmniVideoModel) -> "FrozenEncoders":
        return cls(omni.vae, omni.text_encoder, omni.tokenizer, omni.preset.max_text_tokens)

    def compute_digest(self, assigner: BucketAssigner) -> str:
        return compute_cache_digest(self.weights_fingerprint, assigner)

    def check_text_length(self, text: str) -> None:
        """Raises ConditionTooLong for a text that `text` would not take."""
        check_prompt_length(len(self.tokenizer(text, verbose=False).input_ids), self.max_text_tokens)

    @torch.no_grad()
    def encode_prompt(self, text: str) -> Tensor:
        """[L, D]; raises ConditionTooLong."""
        return encode_text(self.tokenizer, self.text_encoder, [text], self.max_text_tokens)[0][0].half().cpu()

    @torch.no_grad()
    def encode_latents(self, pixels: Sequence[np.ndarray]) -> list[Tensor]:
        """[z, T, h, w] of each, from pixels [F, H, W, 3] of one shape."""
        if not pixels:
            return []
        batch = pixels_from_bytes(np.stack(pixels)).to(self.vae.device, self.vae.dtype)
        return list(encode_pixels(self.vae, batch).half().cpu())


def fingerprint_weights(folder: Path) -> str:
    """What tells a weights folder's VAE and text encoder from others."""
    files = read_index(folder)["sha256"].items()
    encoder_files = {name: value for name, value in files if name.startswith(("vae/", "text_encoder/"))}
    return json.dumps(encoder_files, sort_keys=True)


def compute_cache_digest(weights_fingerprint: str, assigner: BucketAssigner) -> str:
    return hashlib.sha256(f"({weights_fingerprint!r}, {assigner.digest_key})".encode()).hexdigest()[:12]


def build_batch_sampler(
    dataset: ShardDataset,
    assigner: BucketAssigner,
    mix: MixConfig,
    include: Callable[[SampleRef], bool] = lambda entry: True,
) -> tuple[BatchSampler, list[int]]:
    """The order of the batches of a library's wanted samples, and the number in the library of each of them."""
    sample_indices, buckets = [], []
    for index, entry in enumerate(dataset.entries):
        if not include(entry):
            continue
        with dataset.skip_report.skip_on_error(f"{entry.shard}/{entry.key}"):
            buckets.append(assigner.assign_bucket(entry))
            sample_indices.append(index)
    return BatchSampler([dataset.entries[number].task for number in sample_indices], buckets, mix), sample_indices


# ---------------------------------------------------------------- making


def cache_name(shard: str, digest: str) -> str:
    return f"{shard.removesuffix('.tar')}.{digest}.safetensors"


def encode_shards(
    dataset: ShardDataset, encoders: FrozenEncoders, assigner: BucketAssigner, on_progress: Callable[[int, int], None]
) -> int:
    """Encodes every shard that has no file yet; `tell` hears of samples done and in all.  Returns samples encoded."""
    digest, encoded_count = encoders.compute_digest(assigner), 0
    cache_files = set(dataset.file_store.list_names(".safetensors"))
    generative_entries = [(at, entry) for at, entry in enumerate(dataset.entries) if entry.task in TASKS]
    remaining = [(at, entry) for at, entry in generative_entries if cache_name(entry.shard, digest) not in cache_files]
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
    """The numbers of a shard's samples with their bucket, a few of one bucket and kind of task at a time."""
    placements = []
    for index, entry in indexed_entries:
        with skip_report.skip_on_error(f"{entry.shard}/{entry.key}"):
            placements.append((assigner.assign_bucket(entry), entry.task, index))
    for _, group in groupby(sorted(placements), key=lambda placement: placement[:2]):
        indexed_buckets = [(at, bucket) for bucket, _, at in group]
        yield from (
            indexed_buckets[first : first + ENCODE_BATCH_SIZE]
            for first in range(0, len(indexed_buckets), ENCODE_BATCH_SIZE)
        )


def encode_chunk(
    dataset: ShardDataset, encoders: FrozenEncoders, assigner: BucketAssigner, chunk: list[tuple[int, Bucket]]
) -> dict[str, Tensor]:
    """Tensors by name of samples of one bucket and task; what cannot be read or is too long is noted and left out."""
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
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        file_store.put_file(path)


# ---------------------------------------------------------------- using


class LatentCache:
    """The tensors of single samples, read by their place in the file: neither disk nor S3 has to give all of it."""

    def __init__(self, file_store: FileStore, digest: str):
        self.file_store, self.digest = file_store, digest
        self.headers: dict[str, tuple[int, dict]] = {}

    def __call__(self, entry: SampleRef) -> dict[str, Tensor]:
        """text, target and, where something is edited, source; nothing where they were not encoded.

        Raises UnreadableMedia where the file is damaged.
        """
        name = cache_name(entry.shard, self.digest)
        try:
            start, header = self.read_header(name)
            keys = {part: f"{entry.key}/{part}" for part in ("text", "target", "source")}
            return {part: self.read_tensor(name, start, header[key]) for part, key in keys.items() if key in header}
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError):
            raise UnreadableMedia("cache", f"{name} is damaged; remove it, then encode again") from None

    def read_header(self, name: str) -> tuple[int, dict]:
        """Where a file's tensors begin, and its header (safetensors: 8 bytes of length, JSON, tensors)."""
        if name not in self.headers:
            try:
                length = int.from_bytes(self.file_store.read_range(name, 0, 8), "little")
                self.headers[name] = (8 + length, json.loads(self.file_store.read_range(name, 8, length)))
            except ArtifactNotFound:  # nor is it asked for again
                self.headers[name] = (0, {})
        return self.headers[name]

    def read_tensor(self, name: str, start: int, tensor_info: dict) -> Tensor:
        first, last = tensor_info["data_offsets"]
        data = bytearray(self.file_store.read_range(name, start + first, last - first))
        if len(data) != math.prod(tensor_info["shape"]) * DTYPES[tensor_info["dtype"]].itemsize:
            raise ValueError(f"{len(data)} bytes")
        return torch.frombuffer(data, dtype=DTYPES[tensor_info["dtype"]]).view(tensor_info["shape"])

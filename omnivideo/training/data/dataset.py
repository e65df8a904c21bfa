"""The samples of an epoch in order, from shards and the latent cache, as batches of the stages.

Stage 1 needs only the shards. From stage 2a on, latents and text embeddings come from the cache (`omnivideo data
encode`) if it has them. Missing ones, the MLLM's hidden states and in stage 3 the visual encoder's embeddings are
computed from the media as they are needed.

A sample that cannot be read is left out of its batch, whose mean is over the others, and is named in the data set's
skip report. A process without a readable sample processes a blank one, which does not count.
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

from omnivideo.contracts import TASKS, get_generation_task, is_editing_task
from omnivideo.media.read import read_fitted_media
from omnivideo.models.mllm import (
    VISUAL_TOKEN_PAIRS,
    MLLMMedia,
    MLLMMessage,
    add_position_ids,
    forward_hidden_states,
    prepare_hidden_state_inputs,
)
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.vae import pixels_from_bytes
from omnivideo.training.data.batch import FlowBatch, MicroBatch, Stage1Batch
from omnivideo.training.data.batch_sampler import Bucket, GlobalBatch, MixConfig
from omnivideo.training.data.chat_batch import collate_chat_batch
from omnivideo.training.data.latent_cache import (
    ENCODE_BATCH_SIZE,
    BucketAssigner,
    FrozenEncoders,
    LatentCache,
    build_batch_sampler,
)
from omnivideo.training.data.sample import TRAINING_LIMITS, SkippedSample, SkipReport, TrainingSample
from omnivideo.training.data.webdataset import SampleRef, ShardDataset
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.placement import move_cpu_parts_to_device
from omnivideo.training.engine.recipe import step_seed
from omnivideo.training.planning.flops import count_mllm_flops
from omnivideo.training.recipes.losses import embed_frames, select_frame_indices

T = TypeVar("T")
log = logging.getLogger("omnivideo.training")


@dataclass
class RankSlice:
    """A process's part of a step.

    `sample_indices` are its samples in the data set and `batch_slice` their positions in the global batch. With fewer
    samples than processes, some processes repeat a sample of another; the repetitions do not count.
    """

    bucket: Bucket
    sample_indices: list[int]
    global_size: int
    batch_slice: slice
    is_counted: bool


class EpochDataset:
    """The samples of a data set that a stage uses, epoch after epoch.

    `micro_batch_size` is the maximum number of samples in one forward and backward pass of a process; with None, its
    part of a batch is a single pass.
    """

    def __init__(
        self,
        name: str,
        dataset: ShardDataset,
        assigner: BucketAssigner,
        mix: MixConfig,
        include: Callable[[SampleRef], bool],
    ):
        self.name, self.dataset, self.assigner = name, dataset, assigner
        self.micro_batch_size: int | None = None
        self.batch_sampler, self.sample_indices = build_batch_sampler(dataset, assigner, mix, include)
        self.epoch_lengths: list[int] = []

    def get_global_batch(self, step: int) -> GlobalBatch:
        """Return the batch of a step; steps are counted across epochs."""
        epoch = 0
        while True:
            if epoch == len(self.epoch_lengths):
                self.epoch_lengths.append(len(self.batch_sampler.get_epoch_batches(epoch)))
            if step < self.epoch_lengths[epoch]:
                return self.batch_sampler.get_epoch_batches(epoch)[step]
            step, epoch = step - self.epoch_lengths[epoch], epoch + 1

    def batch_size(self, step: int) -> int:
        """Return the number of samples of a step over all processes."""
        return len(self.get_global_batch(step).indices)

    def compute_digest(self) -> str:
        """Return sixteen hex digits over the samples, their buckets and their order.

        A sample is identified by its key and by the positions of its members in the shard, since keys are only numbers.
        """
        hasher = hashlib.sha256(f"({self.batch_sampler.compute_digest()!r}, {self.assigner.digest_key})".encode())
        for entry in (self.dataset.entries[number] for number in self.sample_indices):
            hasher.update(repr((entry.shard, entry.key, sorted(entry.members.items()))).encode())
        return hasher.hexdigest()[:16]

    def get_rank_slice(self, step: int) -> RankSlice:
        """Return this process's part of a step."""
        batch = self.get_global_batch(step)
        global_size, batch_slice = len(batch.indices), current_rank().local_slice(len(batch.indices))
        is_counted = batch_slice.stop > batch_slice.start
        batch_slice = batch_slice if is_counted else slice(0, 1)
        return RankSlice(
            batch.bucket,
            [self.sample_indices[index] for index in batch.indices[batch_slice]],
            global_size,
            batch_slice,
            is_counted,
        )

    def split_micro_batches(self, rows: list[T]) -> list[list[T]]:
        """Split rows as evenly as possible into parts of at most `micro_batch_size`."""
        count = -(-len(rows) // (self.micro_batch_size or len(rows)))
        return [rows[len(rows) * part // count : len(rows) * (part + 1) // count] for part in range(count)]

    def build_message(self, sample: TrainingSample, text: str, bucket: Bucket) -> MLLMMessage:
        """Return the message to the MLLM: the text, with the source if there is one."""
        media: tuple[MLLMMedia, ...] = ()
        if sample.source is not None:
            frames = read_fitted_media(
                sample.source, bucket.width, bucket.height, bucket.frames, self.assigner.fps, TRAINING_LIMITS
            )
            media = (MLLMMedia(frames, self.assigner.fps, bucket.group == "video"),)
        return MLLMMessage(text, media)

    def load_target_frames(
        self, omni: OmniVideoModel, encoder: SiglipVisionModel, sample: TrainingSample, bucket: Bucket
    ) -> Tensor:
        """Return the target's frames for the visual encoder, uint8 [1, F, S, S, 3], or [0, ...] without a target."""
        side, tokens = encoder.config.image_size, omni.bridge.vision_head.num_queries
        frame_indices = select_frame_indices(bucket.frames, tokens).tolist() if bucket.group == "video" else [0]
        if sample.target is None:
            return torch.zeros(0, len(frame_indices), side, side, 3, dtype=torch.uint8)
        frames = read_fitted_media(
            sample.target, side, side, bucket.frames, self.assigner.fps, TRAINING_LIMITS,
            frame_indices=frame_indices, field="target",
        )  # fmt: skip
        return torch.from_numpy(frames)[None]


def make_blank_sample(bucket: Bucket) -> TrainingSample:
    """Return a request for a black image with an empty prompt."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return TrainingSample(get_generation_task(bucket.group), target=file.getvalue())


def load_readable(
    dataset: ShardDataset, rank_slice: RankSlice, build: Callable[[int, TrainingSample, SampleRef | None], T]
) -> tuple[list[T], bool, list[SkippedSample]]:
    """Call `build` for each sample of the slice that can be read, with its position in the global batch.

    Return the results, whether they count, and the skipped samples. If no sample can be read, the result is that of a
    blank one, which has no SampleRef and does not count.
    """
    skip_report, built = SkipReport(), list[T]()
    for position, sample_index in zip(
        range(rank_slice.global_size)[rank_slice.batch_slice], rank_slice.sample_indices, strict=True
    ):
        entry = dataset.entries[sample_index]
        with skip_report.skip_on_error(f"{entry.shard}/{entry.key}"):
            built.append(build(position, dataset[sample_index], entry))
    is_counted = rank_slice.is_counted and bool(built)
    return (
        built or [build(rank_slice.batch_slice.start, make_blank_sample(rank_slice.bucket), None)],
        is_counted,
        skip_report.skipped_samples,
    )


def log_new_skips(dataset: ShardDataset, skipped_samples: list[SkippedSample]) -> None:
    """Add skips to the data set's report and log the new ones, since a run may end before its report is written."""
    for skip in dataset.skip_report.merge_skips(skipped_samples):
        log.warning("skipped, %s: %s: %s", *skip)


def compute_pass_weights(counts: Sequence[int], device: torch.device) -> list[float]:
    """Return the weight of each pass's mean among those of all processes, given the samples in each pass.

    This is a collective operation: every process has to call it.
    """
    mean_count = float(current_rank().global_mean(torch.tensor(float(sum(counts)), device=device)))
    return [count * len(counts) / max(1e-6, mean_count) for count in counts]


# ---------------------------------------------------------------- stage 1


class Stage1Dataset(EpochDataset):
    """Stage 1's samples of all six tasks. If a medium has several questions, each epoch asks one at random."""

    def __init__(
        self,
        omni: OmniVideoModel,
        dataset: ShardDataset,
        assigner: BucketAssigner,
        mix: MixConfig,
        encoder: SiglipVisionModel,
    ):
        super().__init__("stage1", dataset, assigner, mix, lambda entry: True)
        self.omni, self.encoder = omni, encoder

    def load_batch(self, step: int) -> tuple[list[Stage1Batch], list[SkippedSample]]:
        """Read this process's part of a step, as one batch for each pass, and the samples that were skipped."""
        rank_slice, rng = self.get_rank_slice(step), random.Random(step_seed("stage1/turns", step))
        question_draws = [rng.random() for _ in range(rank_slice.global_size)]

        def build_example(
            position: int, sample: TrainingSample, entry: SampleRef | None
        ) -> tuple[tuple[MLLMMessage, str], Tensor]:
            return self.build_request_and_answer(
                sample, question_draws[position], rank_slice.bucket
            ), self.load_target_frames(self.omni, self.encoder, sample, rank_slice.bucket)

        rows, is_counted, skipped_samples = load_readable(self.dataset, rank_slice, build_example)
        return [
            self.build_batch(micro_batch_rows, is_counted) for micro_batch_rows in self.split_micro_batches(rows)
        ], skipped_samples

    def build_batch(self, rows: list[tuple[tuple[MLLMMessage, str], Tensor]], is_counted: bool) -> Stage1Batch:
        """Collate rows into a batch, with requests for generation first."""
        rows.sort(key=lambda row: not len(row[1]))
        inputs, labels = collate_chat_batch(
            self.omni.mllm, self.omni.mllm_tokenizer, [row[0] for row in rows], self.omni.vision_config
        )
        pixels = torch.cat([row[1] for row in rows])
        if not is_counted:
            labels, pixels = torch.full_like(labels, -100), pixels[:0]
        return Stage1Batch(inputs, labels, pixels)

    def to_micro_batches(self, batch: tuple[list[Stage1Batch], list[SkippedSample]]) -> list[Stage1Batch]:
        """Return the batches with their loss weights, and with pixels in [-1, 1]."""
        micro_batches, skipped_samples = batch
        log_new_skips(self.dataset, skipped_samples)
        weights = compute_pass_weights([len(batch.target_pixels) for batch in micro_batches], self.omni.device)
        return [
            replace(batch, loss_weight=weight, target_pixels=pixels_from_bytes(batch.target_pixels.numpy()))
            for batch, weight in zip(micro_batches, weights, strict=True)
        ]

    def build_request_and_answer(
        self, sample: TrainingSample, question_draw: float, bucket: Bucket
    ) -> tuple[MLLMMessage, str]:
        """Return a request and its answer; a request for generation is answered with the tokens that start it."""
        if sample.target is not None:
            return self.build_message(sample, sample.text, bucket), "".join(VISUAL_TOKEN_PAIRS[bucket.group])
        question, answer = sample.turns[int(question_draw * len(sample.turns))]
        return self.build_message(sample, question, bucket), answer


# ---------------------------------------------------------------- from stage 2a on

Tensors = dict[str, Tensor]


@dataclass
class LoadedSample:
    """A sample as read from disk.

    `cached_tensors` are its latents and text embeddings; without them, `pixels` [F, H, W, 3] have to be encoded.
    `target_frames` uint8 [1, F, S, S, 3] are for the visual encoder.
    """

    batch_position: int  # in the global batch
    message: MLLMMessage
    cached_tensors: Tensors
    pixels: Tensors
    target_frames: Tensor | None


@dataclass
class LoadedBatch:
    """A process's part of a batch for one pass, before any model has seen it; only `counted_rows` of its rows count."""

    cached_tensors: list[Tensors]
    pixels: list[Tensors]
    texts: list[str]
    dropout_draws: list[float]
    batch_positions: list[int]
    global_size: int
    counted_rows: int
    mllm_inputs: Tensors
    target_frames: Tensor | None


class FlowDataset(EpochDataset):
    """A FlowSource over shards. With an `encoder` the targets are embedded for the alignment loss (Eq. 1)."""

    def __init__(
        self,
        name: str,
        omni: OmniVideoModel,
        dataset: ShardDataset,
        cache: LatentCache,
        assigner: BucketAssigner,
        mix: MixConfig,
        encoder: SiglipVisionModel | None = None,
    ):
        allows_edits = name not in ("stage2a", "stage2b_generation")
        tasks = {task for task in TASKS if allows_edits or not is_editing_task(task)}
        super().__init__(name, dataset, assigner, mix, lambda entry: entry.task in tasks)
        self.omni, self.cache, self.encoder, self.frozen_encoders = omni, cache, encoder, FrozenEncoders.from_omni(omni)

    def load_batch(self, step: int) -> tuple[list[LoadedBatch], list[SkippedSample]]:
        """Read this process's part of a step, as one batch for each pass, and the samples that were skipped."""
        rank_slice = self.get_rank_slice(step)
        rng = random.Random(step_seed(f"{self.name}/lots", step))
        dropout_draws = [rng.random() for _ in range(rank_slice.global_size)]

        def build_row(position: int, sample: TrainingSample, entry: SampleRef | None) -> LoadedSample:
            return self.load_sample(position, sample, self.cache(entry) if entry else {}, rank_slice.bucket)

        rows, is_counted, skipped_samples = load_readable(self.dataset, rank_slice, build_row)
        return [
            self.collate_samples(micro_batch_rows, dropout_draws, rank_slice, is_counted)
            for micro_batch_rows in self.split_micro_batches(rows)
        ], skipped_samples

    def collate_samples(
        self, rows: list[LoadedSample], dropout_draws: list[float], rank_slice: RankSlice, is_counted: bool
    ) -> LoadedBatch:
        """Collate samples, and prepare the MLLM's inputs."""
        requests = [(row.message, rank_slice.bucket.group) for row in rows]
        mllm_inputs = prepare_hidden_state_inputs(self.omni.mllm_tokenizer, requests, self.omni.vision_config)
        target_frames = [row.target_frames for row in rows if row.target_frames is not None]
        return LoadedBatch(
            [row.cached_tensors for row in rows], [row.pixels for row in rows],
            [row.message.text for row in rows], [dropout_draws[row.batch_position] for row in rows],
            [row.batch_position for row in rows],
            rank_slice.global_size, len(rows) if is_counted else 0,
            add_position_ids(self.omni.mllm, mllm_inputs),
            torch.cat(target_frames) if target_frames else None,
        )  # fmt: skip

    def load_sample(
        self, position: int, sample: TrainingSample, cached_tensors: Tensors, bucket: Bucket
    ) -> LoadedSample:
        """Return the sample with what the models need; raise InvalidInput if it cannot be used."""
        pixels: Tensors = {}
        if not cached_tensors:
            self.frozen_encoders.check_text_length(sample.text)
            pixels = {name: torch.from_numpy(part) for name, part in self.assigner.load_pixels(sample, bucket).items()}
        target_frames = (
            None if self.encoder is None else self.load_target_frames(self.omni, self.encoder, sample, bucket)
        )
        return LoadedSample(
            position, self.build_message(sample, sample.text, bucket), cached_tensors, pixels, target_frames
        )

    def to_micro_batches(self, batch: tuple[list[LoadedBatch], list[SkippedSample]]) -> list[MicroBatch]:
        """Run the frozen models over the loaded batches."""
        loaded_batches, skipped_samples = batch
        log_new_skips(self.dataset, skipped_samples)
        weights = compute_pass_weights([loaded.counted_rows for loaded in loaded_batches], self.omni.device)
        return [self.build_micro_batch(loaded, weight) for loaded, weight in zip(loaded_batches, weights, strict=True)]

    @torch.no_grad()
    def build_micro_batch(self, loaded_batch: LoadedBatch, weight: float) -> MicroBatch:
        """Add the outputs of the frozen models that the cache does not hold."""
        rows = collate_cached(self.encode_missing(loaded_batch))
        states, padding = forward_hidden_states(self.omni.mllm, loaded_batch.mllm_inputs)
        rows.hidden_states = states.masked_fill(padding[..., None], 0.0).float()
        rows.hidden_lengths = (~padding).sum(1).tolist()
        if self.encoder is not None and loaded_batch.target_frames is not None:
            target_pixels = pixels_from_bytes(loaded_batch.target_frames.numpy())
            rows.visual_embeddings = embed_frames(self.encoder, target_pixels, self.omni.bridge.vision_head.num_queries)
        frozen_flops = count_mllm_flops(self.omni.mllm, loaded_batch.mllm_inputs)
        return MicroBatch(
            rows,
            loaded_batch.dropout_draws,
            loaded_batch.global_size,
            loaded_batch.batch_positions,
            weight,
            frozen_flops,
        )

    def encode_missing(self, loaded_batch: LoadedBatch) -> list[Tensors]:
        """Return the latents and text embeddings of each row.

        Missing ones are encoded as for the cache, even inside a region of lower precision.
        """
        rows = [dict(tensors) for tensors in loaded_batch.cached_tensors]
        missing = [
            (row, name, part.numpy())
            for row, parts in zip(rows, loaded_batch.pixels, strict=True) for name, part in parts.items()
        ]  # fmt: skip
        chunk_size = ENCODE_BATCH_SIZE if missing and len(missing[0][2]) == 1 else 1  # one clip fills a batch
        if missing:
            move_cpu_parts_to_device(self.omni)
        with torch.autocast(self.omni.device.type, enabled=False):
            for chunk in (missing[start : start + chunk_size] for start in range(0, len(missing), chunk_size)):
                chunk_latents = self.frozen_encoders.encode_latents([part for *_, part in chunk])
                for (row, name, _), latents in zip(chunk, chunk_latents, strict=True):
                    row[name] = latents
            for row, parts, text in zip(rows, loaded_batch.pixels, loaded_batch.texts, strict=True):
                if parts:
                    row["text"] = self.frozen_encoders.encode_prompt(text)
        return rows


def collate_cached(cached_samples: list[Tensors]) -> FlowBatch:
    """Collate the cached tensors; hidden states and visual embeddings are still empty."""
    text = [sample["text"].float() for sample in cached_samples]
    sources = [sample["source"].float() for sample in cached_samples if "source" in sample]
    empty = torch.zeros(len(cached_samples), 0)
    return FlowBatch(
        torch.stack([sample["target"].float() for sample in cached_samples]),
        torch.tensor(["source" in sample for sample in cached_samples]),
        torch.stack(sources) if sources else None,
        empty, [],
        pad_sequence(text, batch_first=True), [len(row) for row in text],
        empty,
    )  # fmt: skip

"""Hybrid mixed batching (paper section 4.2): the samples of each step of an epoch, for any number of ranks.

A step is one batch of one group (images or videos) and one bucket (width, height, frames). Its samples share the
forward and backward pass, whatever their tasks. The order depends only on the samples, the mix and the epoch. Ranks
matter only when a batch is divided among them, so a run can resume in the middle of an epoch, from its SamplerState,
on any number of ranks. This module knows neither tensors nor processes: samples are indices.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np

from omnivideo.contracts import TRAINING_TASKS, Medium, TrainingTask, get_task_medium
from omnivideo.errors import CheckpointError, InvalidInput

BATCH_SIZE_OPTIONS: dict[Medium, str] = {"image": "stills", "video": "clips"}  # command-line options of batch sizes

# Paper, Table 1: percentages of the samples.
PAPER_TASK_MIX: dict[TrainingTask, float] = {
    "image-understanding": 37.9,
    "video-understanding": 4.36,
    "text-to-image": 33.05,
    "text-to-video": 3.97,
    "image-editing": 18.95,
    "video-editing": 1.76,
}


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape that samples are cropped and resized to: px, and 4k + 1 frames; an image has one."""

    width: int
    height: int
    frames: int

    @property
    def group(self) -> Medium:
        """Return "video" for more than one frame."""
        return "video" if self.frames > 1 else "image"

    @property
    def pixel_count(self) -> int:
        """Return the pixels of one sample in all frames."""
        return self.width * self.height * self.frames

    def aspect_distance(self, width: int, height: int) -> float:
        """Return the distance between the aspect ratios in log space; 0 means equal."""
        return abs(math.log(width / height * self.height / self.width))


@dataclass(frozen=True)
class MixConfig:
    """The composition of an epoch.

    task_ratio: shares of the tasks; None takes every sample once.
    batch_sizes: samples in a batch over all ranks, for each group.
    group_weights: numbers of batches of the groups relative to each other; None follows the task ratio.
    batch_multiple: batches are multiples of it where possible, so that each of its divisors as the number of ranks
        gives equal parts.
    fold_small_buckets: merge a bucket with fewer samples than batch_multiple into a similar one.
    mix_tasks: False restricts every batch to one task, for comparison.
    """

    task_ratio: Mapping[TrainingTask, float] | None = field(default_factory=lambda: dict(PAPER_TASK_MIX))
    batch_sizes: Mapping[Medium, int] = field(default_factory=lambda: {"image": 64, "video": 32})
    group_weights: Mapping[Medium, float] | None = None
    batch_multiple: int = 8
    fold_small_buckets: bool = True
    seed: int = 0
    mix_tasks: bool = True

    def __post_init__(self) -> None:
        for task, share in (self.task_ratio or {}).items():
            if task not in TRAINING_TASKS or not 0 <= share < math.inf:
                raise InvalidInput(
                    "ratio", f"{task!r} at {share!r}; allowed: 0 or more for {', '.join(TRAINING_TASKS)}"
                )
        if self.batch_multiple < 1:
            raise InvalidInput("batch_multiple", f"{self.batch_multiple}; allowed: 1 or more")
        for group in get_args(Medium):
            size = self.batch_sizes.get(group, 0)
            if size < 1 or size % self.batch_multiple:
                raise InvalidInput(
                    BATCH_SIZE_OPTIONS[group], f"{size}; allowed: a positive multiple of {self.batch_multiple}"
                )
        if self.group_weights is not None and (
            set(self.group_weights) != set(get_args(Medium))
            or not all(0 < weight < math.inf for weight in self.group_weights.values())
        ):
            raise InvalidInput(
                "group-weight", f"{dict(self.group_weights)}; allowed: a number above 0 for both image and video"
            )


# The fields' names in version 0.1. Digests keep them, so that checkpoints of that version still match their data.
MIX_DIGEST_KEYS = {
    "task_ratio": "ratio",
    "batch_sizes": "sizes",
    "group_weights": "weights",
    "batch_multiple": "unit",
    "fold_small_buckets": "fold",
    "mix_tasks": "mixed",
}


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one step over all ranks."""

    bucket: Bucket
    indices: np.ndarray


@dataclass(frozen=True)
class SamplerState:
    """A run's position in its data: the epoch, and the index of its next batch."""

    epoch: int = 0
    batch_index: int = 0


class BatchSampler:
    """Yields the batches of every epoch, as indices of samples, which are given by their tasks and buckets."""

    def __init__(self, tasks: Sequence[TrainingTask], buckets: Sequence[Bucket], mix: MixConfig = MixConfig()):
        if not len(tasks) == len(buckets) > 0:
            raise InvalidInput("shards", f"{len(tasks)} tasks and {len(buckets)} buckets; allowed: one each, 1 or more")
        self.mix = mix
        self.buckets = sorted(set(buckets))
        self.sample_tasks = np.array([TRAINING_TASKS.index(task) for task in tasks], dtype=np.int8)
        bucket_numbers = {bucket: index for index, bucket in enumerate(self.buckets)}
        self.sample_buckets = np.array([bucket_numbers[bucket] for bucket in buckets], dtype=np.int32)
        self.quotas = self.compute_quotas()
        self.cached_epoch: tuple[int, list[GlobalBatch]] | None = None

    # ------------------------------------------------------------ the samples of an epoch

    def compute_task_shares(self) -> dict[int, float]:
        """Return the weight of each task that has samples."""
        present = sorted(set(self.sample_tasks.tolist()))
        ratio = self.mix.task_ratio
        if ratio is None:
            task_shares = {task: float((self.sample_tasks == task).sum()) for task in present}
        else:
            task_shares = {
                task: ratio.get(TRAINING_TASKS[task], 0.0)
                for task in present
                if ratio.get(TRAINING_TASKS[task], 0.0) > 0
            }
        if not task_shares:
            raise InvalidInput(
                "ratio",
                f"every task with samples has a share of 0; allowed: above 0 for one of "
                f"{', '.join(TRAINING_TASKS[task] for task in present)}",
            )
        return self.apply_group_weights(task_shares)

    def apply_group_weights(self, shares: dict[int, float]) -> dict[int, float]:
        """Scale the shares of each group so that the numbers of batches follow `group_weights`."""
        if self.mix.group_weights is None:
            return shares
        totals: dict[Medium, float] = {"image": 0.0, "video": 0.0}
        for task, share in shares.items():
            totals[get_task_group(task)] += share
        target_shares = {
            group: weight * self.mix.batch_sizes[group] for group, weight in self.mix.group_weights.items()
        }
        return {
            task: share / totals[get_task_group(task)] * target_shares[get_task_group(task)]
            for task, share in shares.items()
        }

    def compute_quotas(self) -> dict[int, int]:
        """Return the samples of each task in an epoch, limited by the scarcest task, without repetition."""
        shares = self.compute_task_shares()
        available = {task: int((self.sample_tasks == task).sum()) for task in shares}
        if self.mix.task_ratio is None and self.mix.group_weights is None:
            return available
        # One more than available: counts that were rounded from exactly these shares are then used completely.
        scale = min((available[task] + 1) / share for task, share in shares.items())
        return {task: min(available[task], math.ceil(scale * share - 1e-9)) for task, share in shares.items()}

    def select_samples(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's samples, and the position of each in the epoch from 0 to 1.

        A task's samples form a ring in one shuffled order, of which every epoch takes the next segment. So no sample
        repeats within an epoch, and all are used equally often over many epochs. Each task is spread evenly.
        """
        indices, moments = [], []
        for task, quota in self.quotas.items():
            ring = self.make_rng("ring", task).permutation(np.flatnonzero(self.sample_tasks == task))
            stretch = ring[(epoch * quota + np.arange(quota)) % len(ring)]
            rng = self.make_rng("epoch", task, epoch)
            indices.append(rng.permutation(stretch))
            moments.append((np.arange(quota) + rng.random(quota)) / quota)
        return np.concatenate(indices), np.concatenate(moments)

    def make_rng(self, *key: object) -> np.random.Generator:
        """Return a generator that depends only on the mix's seed and the key."""
        digest = hashlib.sha256(repr((self.mix.seed, *key)).encode()).digest()
        return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))

    # ------------------------------------------------------------ batches

    def get_epoch_batches(self, number: int) -> list[GlobalBatch]:
        """Return all batches of an epoch in order; the last epoch is cached."""
        if self.cached_epoch is None or self.cached_epoch[0] != number:
            self.cached_epoch = (number, self.build_batches(number))
        return self.cached_epoch[1]

    def build_batches(self, number: int) -> list[GlobalBatch]:
        """Divide an epoch's samples into batches, and interleave those of the two groups."""
        indices, moments = self.select_samples(number)
        indices = indices[np.argsort(moments, kind="stable")]
        groups: dict[Medium, list[GlobalBatch]] = {"image": [], "video": []}
        for bucket, members in self.group_by_bucket(indices):
            groups[bucket.group] += [
                GlobalBatch(bucket, part) for part in self.split_into_batches(members, bucket.group)
            ]
        for group, batches in groups.items():
            self.make_rng("batches", group, number).shuffle(batches)
        return interleave_batches(groups["image"], groups["video"])

    def group_by_bucket(self, indices: np.ndarray) -> Iterator[tuple[Bucket, np.ndarray]]:
        """Yield the samples of each bucket, or of each bucket and task if tasks are not mixed."""
        bucket_indices = self.fold_buckets(indices)
        keys = bucket_indices * len(TRAINING_TASKS) + (0 if self.mix.mix_tasks else self.sample_tasks[indices])
        for key in np.unique(keys):
            yield self.buckets[int(key) // len(TRAINING_TASKS)], indices[keys == key]

    def fold_buckets(self, indices: np.ndarray) -> np.ndarray:
        """Return the index of each sample's bucket after merging small buckets into the most similar ones."""
        bucket_indices: np.ndarray = self.sample_buckets[indices].astype(np.int64)
        counts = np.bincount(bucket_indices, minlength=len(self.buckets))
        for small in np.argsort(counts, kind="stable") if self.mix.fold_small_buckets else ():
            if (
                0 < counts[small] < self.mix.batch_multiple
                and (target := self.find_nearest_bucket(int(small), counts)) is not None
            ):
                bucket_indices[bucket_indices == small] = target
                counts[target] += counts[small]
                counts[small] = 0
        return bucket_indices

    def find_nearest_bucket(self, bucket_index: int, counts: np.ndarray) -> int | None:
        """Return the bucket to merge into: the most frames up to the present number, then the nearest aspect ratio."""
        bucket = self.buckets[bucket_index]
        others = [
            (bucket.frames - other.frames, other.aspect_distance(bucket.width, bucket.height), index)
            for index, other in enumerate(self.buckets)
            if index != bucket_index and counts[index] and other.group == bucket.group and other.frames <= bucket.frames
        ]
        return min(others)[2] if others else None

    def split_into_batches(self, members: np.ndarray, group: Medium) -> list[np.ndarray]:
        """Return batches of nearly equal size without padding; all but one are multiples of `batch_multiple`."""
        unit = self.mix.batch_multiple
        units = math.ceil(len(members) / unit)
        batches = math.ceil(units * unit / self.mix.batch_sizes[group])
        ends = [min(len(members), (units * (index + 1) // batches) * unit) for index in range(batches)]
        return np.split(members, ends[:-1])

    # ------------------------------------------------------------ the position of a run

    def iterate_batches(self, state: SamplerState = SamplerState()) -> Iterator[tuple[SamplerState, GlobalBatch]]:
        """Yield an endless sequence of batches from `state` on, each with the state after it."""
        while True:
            batches = self.get_epoch_batches(state.epoch)
            for index in range(state.batch_index, len(batches)):
                next_state = (
                    SamplerState(state.epoch, index + 1) if index + 1 < len(batches) else SamplerState(state.epoch + 1)
                )
                yield next_state, batches[index]
            state = SamplerState(state.epoch + 1)

    def dump_state(self, state: SamplerState) -> dict[str, Any]:
        """Return the position in the data for a checkpoint."""
        return {"order": self.compute_digest(), "epoch": state.epoch, "at": state.batch_index}

    def restore_state(self, checkpoint: Mapping[str, Any]) -> SamplerState:
        """Return a checkpoint's position; raise CheckpointError if its data or mix differ from these."""
        if checkpoint["order"] != self.compute_digest():
            raise CheckpointError("data: the checkpoint was made with other samples or buckets, or with another mix")
        return SamplerState(checkpoint["epoch"], checkpoint["at"])

    def compute_digest(self) -> str:
        """Return a digest of everything that the order depends on, as sixteen hex digits."""
        mix = {MIX_DIGEST_KEYS.get(name, name): value for name, value in asdict(self.mix).items()}
        hasher = hashlib.sha256(repr((sorted(mix.items(), key=str), self.buckets)).encode())
        hasher.update(self.sample_tasks.tobytes() + self.sample_buckets.tobytes())
        return hasher.hexdigest()[:16]


def get_task_group(task_index: int) -> Medium:
    """Return the group of a task, given by its index in TRAINING_TASKS."""
    return get_task_medium(TRAINING_TASKS[task_index])


def interleave_batches(first: list[GlobalBatch], second: list[GlobalBatch]) -> list[GlobalBatch]:
    """Merge two lists, keeping their orders and spreading each evenly."""
    positions = [((index + 0.5) / len(batches), list_index, index)
                 for list_index, batches in enumerate((first, second)) for index in range(len(batches))]  # fmt: skip
    return [(first, second)[list_index][index] for _, list_index, index in sorted(positions)]


@dataclass(frozen=True)
class EpochStats:
    """The size of an epoch; `wasted_fraction` is the share of the ranks' pixels that are padding or waiting."""

    steps: int
    samples: int
    wasted_fraction: float
    steps_per_1000_samples: dict[TrainingTask, float]  # steps with samples of a task per 1000 samples of the epoch
    max_sample_gap: dict[TrainingTask, int]  # the largest number of samples between two such steps


def measure_epoch(sampler: BatchSampler, world_size: int, epoch: int = 0) -> EpochStats:
    """Measure an epoch on `world_size` ranks, which wait for each other once per step."""
    batches = sampler.get_epoch_batches(epoch)
    samples = sum(len(batch.indices) for batch in batches)
    useful = sum(len(batch.indices) * batch.bucket.pixel_count for batch in batches)
    slots = sum(math.ceil(len(batch.indices) / world_size) * world_size * batch.bucket.pixel_count for batch in batches)
    updates, gaps = {}, {}
    ends = np.cumsum([len(batch.indices) for batch in batches])
    for task in sampler.quotas:
        step_ends = [
            end for end, batch in zip(ends, batches, strict=True) if (sampler.sample_tasks[batch.indices] == task).any()
        ]
        updates[TRAINING_TASKS[task]] = 1000 * len(step_ends) / samples
        gaps[TRAINING_TASKS[task]] = int(max(np.diff([0, *step_ends, samples])))
    return EpochStats(len(batches), samples, 1 - useful / slots, updates, gaps)


# ---------------------------------------------------------------- shapes

ASPECT_RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 2.0)
GRID_PX = 16  # px; VAE and patch embedding need multiples of it


def build_buckets(
    width: int, height: int, frame_counts: Sequence[int], aspect_ratios: Sequence[float] = ASPECT_RATIOS
) -> list[Bucket]:
    """Return buckets of about this area, in this and the usual aspect ratios, for each number of frames."""
    if min(width, height) < GRID_PX:
        raise InvalidInput("size", f"{width}x{height}; allowed: sides of {GRID_PX} px or more")
    if any(frames < 1 or frames % 4 != 1 for frames in frame_counts):
        raise InvalidInput("frames", f"{', '.join(map(str, frame_counts))}; allowed: 4k + 1, e.g. 1, 5, 9")
    area, sizes = width * height, {(round_to_grid(width), round_to_grid(height))}
    sizes |= {
        (round_to_grid(math.sqrt(area * ratio)), round_to_grid(math.sqrt(area / ratio))) for ratio in aspect_ratios
    }
    return sorted(Bucket(wide, tall, frames) for wide, tall in sizes for frames in frame_counts)


def round_to_grid(side: float) -> int:
    """Return the nearest multiple of GRID_PX, at least one."""
    return max(GRID_PX, round(side / GRID_PX) * GRID_PX)


def select_bucket(
    buckets: Sequence[Bucket], task: TrainingTask, width: int, height: int, frames: int, fps: float, target_fps: float
) -> Bucket:
    """Return the bucket that keeps most of a medium, sampled at `target_fps`.

    It has the most frames that the medium can fill, then the nearest aspect ratio. Raises InvalidInput for a clip
    that is too short for every bucket.
    """
    available_frames = 1 if "image" in task else math.floor((frames - 1) * target_fps / fps + 1e-6) + 1
    candidates = [
        bucket
        for bucket in buckets
        if bucket.group == get_task_group(TRAINING_TASKS.index(task)) and bucket.frames <= available_frames
    ]
    if not candidates:
        raise InvalidInput("frames", f"{available_frames} at {target_fps:g} per second; no bucket is so short")
    return min(candidates, key=lambda bucket: (-bucket.frames, bucket.aspect_distance(width, height)))

"""Hybrid mixed batching (paper section 4.2): which samples make up each step of an epoch, for any number of ranks.

A step is one batch of one group (images or videos) and of one bucket (width, height, frames); whatever task they are
of, its samples share the forward and backward pass.  The order is a function of the samples, the mix and the epoch
alone.  Ranks come in only where a batch is dealt out, so a run goes on in the middle of an epoch, from its `Place`, on
any number of ranks.  Nothing here knows tensors or processes: samples are indices.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np

from omnivideo.contracts import TRAINING_TASKS, Medium, TrainingTask, get_task_medium
from omnivideo.errors import CheckpointError, InvalidInput

# Table 1, in percent of the samples.
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
    """The shape that samples are brought to: px, and frames (4k + 1; 1 is an image)."""

    width: int
    height: int
    frames: int

    @property
    def group(self) -> Medium:
        return "video" if self.frames > 1 else "image"

    @property
    def pixel_count(self) -> int:
        return self.width * self.height * self.frames

    def aspect_distance(self, width: int, height: int) -> float:
        """How unlike the aspect ratios are: 0 for the same."""
        return abs(math.log(width / height * self.height / self.width))


@dataclass(frozen=True)
class MixConfig:
    """How an epoch is put together.

    `ratio`: shares of the tasks; None takes all samples once.  `sizes`: samples of a batch, over all ranks.  `weights`:
    how many batches of a group come for those of the other; None leaves that to the ratio.  `unit`: batches are
    multiples of it wherever that is possible, so that 1, 2, 4 ... `unit` ranks get equal parts; with `fold` a bucket of
    fewer samples joins another one.  `mixed` off gives every batch to one task, for comparison.
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
                    "ratio", f"{task!r} at {share!r}; allowed: 0 and more for {', '.join(TRAINING_TASKS)}"
                )
        if self.batch_multiple < 1:
            raise InvalidInput("unit", f"{self.batch_multiple} is not 1 or more")
        for group in get_args(Medium):
            size = self.batch_sizes.get(group, 0)
            if size < 1 or size % self.batch_multiple:
                raise InvalidInput(
                    "sizes", f"{size} {group}s a batch is not a positive multiple of unit, {self.batch_multiple}"
                )
        if self.group_weights is not None and (
            set(self.group_weights) != set(get_args(Medium))
            or not all(0 < one < math.inf for one in self.group_weights.values())
        ):
            raise InvalidInput("weights", f"{dict(self.group_weights)}; allowed: above 0 for both image and video")


# Fields as digests spell them since version 0.1: a checkpoint's data would not be known again.
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
    """One step: all ranks' samples."""

    bucket: Bucket
    indices: np.ndarray


@dataclass(frozen=True)
class SamplerState:
    """Where a run stands in its data: the next batch is number `at` of epoch `epoch`."""

    epoch: int = 0
    batch_index: int = 0


class BatchSampler:
    """The batches of every epoch over samples of these tasks and buckets (one entry each, by index)."""

    def __init__(self, tasks: Sequence[TrainingTask], buckets: Sequence[Bucket], mix: MixConfig = MixConfig()):
        if not len(tasks) == len(buckets) > 0:
            raise InvalidInput("data", f"{len(tasks)} tasks and {len(buckets)} buckets; allowed: one each, 1 or more")
        self.mix = mix
        self.buckets = sorted(set(buckets))
        self.sample_tasks = np.array([TRAINING_TASKS.index(task) for task in tasks], dtype=np.int8)
        bucket_numbers = {bucket: at for at, bucket in enumerate(self.buckets)}
        self.sample_buckets = np.array([bucket_numbers[bucket] for bucket in buckets], dtype=np.int32)
        self.quotas = self.compute_quotas()
        self.cached_epoch: tuple[int, list[GlobalBatch]] | None = None

    # ------------------------------------------------------------ what an epoch takes

    def compute_task_shares(self) -> dict[int, float]:
        """The weight of each task that there are samples of."""
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
            raise InvalidInput("ratio", f"it asks for none of {', '.join(TRAINING_TASKS[task] for task in present)}")
        return self.apply_group_weights(task_shares)

    def apply_group_weights(self, shares: dict[int, float]) -> dict[int, float]:
        """Shares with those of a group scaled so that the groups' batches come by `weights`."""
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
        """Samples of each task in an epoch: as many as the scarcest task allows without a repetition."""
        shares = self.compute_task_shares()
        available = {task: int((self.sample_tasks == task).sum()) for task in shares}
        if self.mix.task_ratio is None and self.mix.group_weights is None:
            return available
        # One more than there are: counts that were themselves rounded from these shares are all taken.
        scale = min((available[task] + 1) / share for task, share in shares.items())
        return {task: min(available[task], math.ceil(scale * share - 1e-9)) for task, share in shares.items()}

    def select_samples(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's samples, and how far into the epoch (0 to 1) each is to come.

        A task's samples stand in a ring, in one shuffled order; every epoch takes the next stretch of it.  So none
        comes twice in an epoch, and each equally often in the long run.  Every task is spread evenly over the epoch.
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
        digest = hashlib.sha256(repr((self.mix.seed, *key)).encode()).digest()
        return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))

    # ------------------------------------------------------------ into batches

    def get_epoch_batches(self, number: int) -> list[GlobalBatch]:
        """All batches of an epoch, in order."""
        if self.cached_epoch is None or self.cached_epoch[0] != number:
            self.cached_epoch = (number, self.build_batches(number))
        return self.cached_epoch[1]

    def build_batches(self, number: int) -> list[GlobalBatch]:
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
        """The samples of each bucket; of each bucket and task where batches are not mixed."""
        bucket_indices = self.fold_buckets(indices)
        keys = bucket_indices * len(TRAINING_TASKS) + (0 if self.mix.mix_tasks else self.sample_tasks[indices])
        for key in np.unique(keys):
            yield self.buckets[int(key) // len(TRAINING_TASKS)], indices[keys == key]

    def fold_buckets(self, indices: np.ndarray) -> np.ndarray:
        """The number of each sample's bucket, where buckets too small for a unit join the one most like them."""
        bucket_indices = self.sample_buckets[indices].astype(np.int64)
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
        """The fullest kind of shape to crop a bucket's samples to: no more frames, then the most like aspect ratio."""
        bucket = self.buckets[bucket_index]
        others = [
            (bucket.frames - other.frames, other.aspect_distance(bucket.width, bucket.height), into)
            for into, other in enumerate(self.buckets)
            if into != bucket_index and counts[into] and other.group == bucket.group and other.frames <= bucket.frames
        ]
        return min(others)[2] if others else None

    def split_into_batches(self, members: np.ndarray, group: Medium) -> list[np.ndarray]:
        """Batches of nearly equal size, all but one of them a multiple of the unit; none is padded."""
        unit = self.mix.batch_multiple
        units = math.ceil(len(members) / unit)
        batches = math.ceil(units * unit / self.mix.batch_sizes[group])
        ends = [min(len(members), (units * (at + 1) // batches) * unit) for at in range(batches)]
        return np.split(members, ends[:-1])

    # ------------------------------------------------------------ a run through it

    def iterate_batches(self, state: SamplerState = SamplerState()) -> Iterator[tuple[SamplerState, GlobalBatch]]:
        """Every batch from `place` on, without end, with the place after it."""
        while True:
            batches = self.get_epoch_batches(state.epoch)
            for index in range(state.batch_index, len(batches)):
                next_state = (
                    SamplerState(state.epoch, index + 1) if index + 1 < len(batches) else SamplerState(state.epoch + 1)
                )
                yield next_state, batches[index]
            state = SamplerState(state.epoch + 1)

    def dump_state(self, state: SamplerState) -> dict[str, Any]:
        """What a checkpoint keeps of the data."""
        return {"order": self.compute_digest(), "epoch": state.epoch, "at": state.batch_index}

    def restore_state(self, checkpoint: Mapping[str, Any]) -> SamplerState:
        """The place of a checkpoint; raises CheckpointError where its data or mix are not these."""
        if checkpoint["order"] != self.compute_digest():
            raise CheckpointError("data: the checkpoint was made with other samples, buckets or another mix")
        return SamplerState(checkpoint["epoch"], checkpoint["at"])

    def compute_digest(self) -> str:
        """Sixteen hex digits over all that the order hangs on."""
        mix = {MIX_DIGEST_KEYS.get(name, name): value for name, value in asdict(self.mix).items()}
        hasher = hashlib.sha256(repr((sorted(mix.items(), key=str), self.buckets)).encode())
        hasher.update(self.sample_tasks.tobytes() + self.sample_buckets.tobytes())
        return hasher.hexdigest()[:16]


def get_task_group(task_index: int) -> Medium:
    return get_task_medium(TRAINING_TASKS[task_index])


def interleave_batches(first: list[GlobalBatch], second: list[GlobalBatch]) -> list[GlobalBatch]:
    """Both lists in their order, each spread evenly over the whole."""
    moments = [((at + 0.5) / len(batches), which, at) for which, batches in enumerate((first, second))
               for at in range(len(batches))]  # fmt: skip
    return [(first, second)[which][at] for _, which, at in sorted(moments)]


@dataclass(frozen=True)
class EpochStats:
    """What an epoch comes to.  `waste` is the part of the ranks' work that is padding or waiting, in pixels."""

    steps: int
    samples: int
    wasted_fraction: float
    steps_per_1000_samples: dict[
        TrainingTask, float
    ]  # steps that a task has a part in, for each 1000 samples of the epoch
    max_sample_gap: dict[TrainingTask, int]  # the most samples between two such steps


def measure_epoch(sampler: BatchSampler, world_size: int, epoch: int = 0) -> EpochStats:
    """Walks through an epoch as `world` ranks would, which wait for each other once a step."""
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
GRID_PX = 16  # px; VAE and patch embedding


def build_buckets(
    width: int, height: int, frame_counts: Sequence[int], aspect_ratios: Sequence[float] = ASPECT_RATIOS
) -> list[Bucket]:
    """Buckets of about this area in the usual aspect ratios and in its own, for each number of frames."""
    if min(width, height) < GRID_PX or any(frames < 1 or frames % 4 != 1 for frames in frame_counts):
        raise InvalidInput(
            "buckets", f"{width}x{height}, frames {frame_counts}: {GRID_PX} px and more, and 4k + 1 frames"
        )
    area, sizes = width * height, {(round_to_grid(width), round_to_grid(height))}
    sizes |= {
        (round_to_grid(math.sqrt(area * ratio)), round_to_grid(math.sqrt(area / ratio))) for ratio in aspect_ratios
    }
    return sorted(Bucket(wide, tall, frames) for wide, tall in sizes for frames in frame_counts)


def round_to_grid(side: float) -> int:
    return max(GRID_PX, round(side / GRID_PX) * GRID_PX)


def select_bucket(
    buckets: Sequence[Bucket], task: TrainingTask, width: int, height: int, frames: int, fps: float, target_fps: float
) -> Bucket:
    """The bucket that loses least of a medium, which is to be seen at `wanted` frames a second: the most frames that
    it has, then the nearest aspect ratio.  Raises InvalidInput for a clip that is too short for all of them.
    """
    available_frames = 1 if "image" in task else math.floor((frames - 1) * target_fps / fps + 1e-6) + 1
    candidates = [
        bucket
        for bucket in buckets
        if bucket.group == get_task_group(TRAINING_TASKS.index(task)) and bucket.frames <= available_frames
    ]
    if not candidates:
        raise InvalidInput("frames", f"{available_frames} at {target_fps:g} a second; no bucket is so short")
    return min(candidates, key=lambda bucket: (-bucket.frames, bucket.aspect_distance(width, height)))

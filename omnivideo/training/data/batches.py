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
from typing import Any, Literal, get_args

import numpy as np

from omnivideo.errors import CheckpointError, InvalidInput

Task = Literal[
    "image-understanding", "video-understanding", "text-to-image", "text-to-video", "image-editing", "video-editing"
]
TASKS: tuple[Task, ...] = get_args(Task)
Group = Literal["image", "video"]

# Table 1, in percent of the samples.
PAPER: dict[Task, float] = {
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
    def group(self) -> Group:
        return "video" if self.frames > 1 else "image"

    @property
    def pixels(self) -> int:
        return self.width * self.height * self.frames

    def far(self, width: int, height: int) -> float:
        """How unlike the aspect ratios are: 0 for the same."""
        return abs(math.log(width / height * self.height / self.width))


@dataclass(frozen=True)
class Mix:
    """How an epoch is put together.

    `ratio`: shares of the tasks; None takes all samples once.  `sizes`: samples of a batch, over all ranks.  `weights`:
    how many batches of a group come for those of the other; None leaves that to the ratio.  `unit`: batches are
    multiples of it wherever that is possible, so that 1, 2, 4 ... `unit` ranks get equal parts; with `fold` a bucket of
    fewer samples joins another one.  `mixed` off gives every batch to one task, for comparison.
    """

    ratio: Mapping[Task, float] | None = field(default_factory=lambda: dict(PAPER))
    sizes: Mapping[Group, int] = field(default_factory=lambda: {"image": 64, "video": 32})
    weights: Mapping[Group, float] | None = None
    unit: int = 8
    fold: bool = True
    seed: int = 0
    mixed: bool = True

    def __post_init__(self) -> None:
        for task, share in (self.ratio or {}).items():
            if task not in TASKS or not 0 <= share < math.inf:
                raise InvalidInput("ratio", f"{task!r} at {share!r}; allowed: 0 and more for {', '.join(TASKS)}")
        if self.unit < 1:
            raise InvalidInput("unit", f"{self.unit} is not 1 or more")
        for group in get_args(Group):
            size = self.sizes.get(group, 0)
            if size < 1 or size % self.unit:
                raise InvalidInput("sizes", f"{size} {group}s a batch is not a positive multiple of unit, {self.unit}")
        if self.weights is not None and (
            set(self.weights) != set(get_args(Group)) or not all(0 < one < math.inf for one in self.weights.values())
        ):
            raise InvalidInput("weights", f"{dict(self.weights)}; allowed: above 0 for both image and video")


@dataclass(frozen=True)
class Batch:
    """One step: all ranks' samples."""

    bucket: Bucket
    indices: np.ndarray


@dataclass(frozen=True)
class Place:
    """Where a run stands in its data: the next batch is number `at` of epoch `epoch`."""

    epoch: int = 0
    at: int = 0


class Order:
    """The batches of every epoch over samples of these tasks and buckets (one entry each, by index)."""

    def __init__(self, tasks: Sequence[Task], buckets: Sequence[Bucket], mix: Mix = Mix()):
        if not len(tasks) == len(buckets) > 0:
            raise InvalidInput("data", f"{len(tasks)} tasks and {len(buckets)} buckets; allowed: one each, 1 or more")
        self.mix = mix
        self.buckets = sorted(set(buckets))
        self.task = np.array([TASKS.index(task) for task in tasks], dtype=np.int8)
        number = {bucket: at for at, bucket in enumerate(self.buckets)}
        self.bucket = np.array([number[bucket] for bucket in buckets], dtype=np.int32)
        self.quotas = self.count()
        self.kept: tuple[int, list[Batch]] | None = None

    # ------------------------------------------------------------ what an epoch takes

    def shares(self) -> dict[int, float]:
        """The weight of each task that there are samples of."""
        present = sorted(set(self.task.tolist()))
        ratio = self.mix.ratio
        if ratio is None:
            found = {task: float((self.task == task).sum()) for task in present}
        else:
            found = {task: ratio.get(TASKS[task], 0.0) for task in present if ratio.get(TASKS[task], 0.0) > 0}
        if not found:
            raise InvalidInput("ratio", f"it asks for none of {', '.join(TASKS[task] for task in present)}")
        return self.weighted(found)

    def weighted(self, shares: dict[int, float]) -> dict[int, float]:
        """Shares with those of a group scaled so that the groups' batches come by `weights`."""
        if self.mix.weights is None:
            return shares
        totals: dict[Group, float] = {"image": 0.0, "video": 0.0}
        for task, share in shares.items():
            totals[group_of(task)] += share
        wanted = {group: weight * self.mix.sizes[group] for group, weight in self.mix.weights.items()}
        return {task: share / totals[group_of(task)] * wanted[group_of(task)] for task, share in shares.items()}

    def count(self) -> dict[int, int]:
        """Samples of each task in an epoch: as many as the scarcest task allows without a repetition."""
        shares = self.shares()
        there = {task: int((self.task == task).sum()) for task in shares}
        if self.mix.ratio is None and self.mix.weights is None:
            return there
        # One more than there are: counts that were themselves rounded from these shares are all taken.
        scale = min((there[task] + 1) / share for task, share in shares.items())
        return {task: min(there[task], math.ceil(scale * share - 1e-9)) for task, share in shares.items()}

    def chosen(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's samples, and how far into the epoch (0 to 1) each is to come.

        A task's samples stand in a ring, in one shuffled order; every epoch takes the next stretch of it.  So none
        comes twice in an epoch, and each equally often in the long run.  Every task is spread evenly over the epoch.
        """
        indices, moments = [], []
        for task, quota in self.quotas.items():
            ring = self.rng("ring", task).permutation(np.flatnonzero(self.task == task))
            stretch = ring[(epoch * quota + np.arange(quota)) % len(ring)]
            rng = self.rng("epoch", task, epoch)
            indices.append(rng.permutation(stretch))
            moments.append((np.arange(quota) + rng.random(quota)) / quota)
        return np.concatenate(indices), np.concatenate(moments)

    def rng(self, *key: object) -> np.random.Generator:
        digest = hashlib.sha256(repr((self.mix.seed, *key)).encode()).digest()
        return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))

    # ------------------------------------------------------------ into batches

    def epoch(self, number: int) -> list[Batch]:
        """All batches of an epoch, in order."""
        if self.kept is None or self.kept[0] != number:
            self.kept = (number, self.make(number))
        return self.kept[1]

    def make(self, number: int) -> list[Batch]:
        indices, moments = self.chosen(number)
        indices = indices[np.argsort(moments, kind="stable")]
        groups: dict[Group, list[Batch]] = {"image": [], "video": []}
        for bucket, members in self.sorted_out(indices):
            groups[bucket.group] += [Batch(bucket, part) for part in self.cut(members, bucket.group)]
        for group, batches in groups.items():
            self.rng("batches", group, number).shuffle(batches)
        return alternate(groups["image"], groups["video"])

    def sorted_out(self, indices: np.ndarray) -> Iterator[tuple[Bucket, np.ndarray]]:
        """The samples of each bucket; of each bucket and task where batches are not mixed."""
        place = self.folded(indices)
        keys = place * len(TASKS) + (0 if self.mix.mixed else self.task[indices])
        for key in np.unique(keys):
            yield self.buckets[int(key) // len(TASKS)], indices[keys == key]

    def folded(self, indices: np.ndarray) -> np.ndarray:
        """The number of each sample's bucket, where buckets too small for a unit join the one most like them."""
        place = self.bucket[indices].astype(np.int64)
        counts = np.bincount(place, minlength=len(self.buckets))
        for at in np.argsort(counts, kind="stable") if self.mix.fold else ():
            if 0 < counts[at] < self.mix.unit and (into := self.nearest(int(at), counts)) is not None:
                place[place == at] = into
                counts[into] += counts[at]
                counts[at] = 0
        return place

    def nearest(self, at: int, counts: np.ndarray) -> int | None:
        """The fullest kind of shape to crop a bucket's samples to: no more frames, then the most like aspect ratio."""
        mine = self.buckets[at]
        others = [
            (mine.frames - other.frames, other.far(mine.width, mine.height), into)
            for into, other in enumerate(self.buckets)
            if into != at and counts[into] and other.group == mine.group and other.frames <= mine.frames
        ]
        return min(others)[2] if others else None

    def cut(self, members: np.ndarray, group: Group) -> list[np.ndarray]:
        """Batches of nearly equal size, all but one of them a multiple of the unit; none is padded."""
        unit = self.mix.unit
        units = math.ceil(len(members) / unit)
        batches = math.ceil(units * unit / self.mix.sizes[group])
        ends = [min(len(members), (units * (at + 1) // batches) * unit) for at in range(batches)]
        return np.split(members, ends[:-1])

    # ------------------------------------------------------------ a run through it

    def walk(self, place: Place = Place()) -> Iterator[tuple[Place, Batch]]:
        """Every batch from `place` on, without end, with the place after it."""
        while True:
            batches = self.epoch(place.epoch)
            for at in range(place.at, len(batches)):
                after = Place(place.epoch, at + 1) if at + 1 < len(batches) else Place(place.epoch + 1)
                yield after, batches[at]
            place = Place(place.epoch + 1)

    def state(self, place: Place) -> dict[str, Any]:
        """What a checkpoint keeps of the data."""
        return {"order": self.digest(), "epoch": place.epoch, "at": place.at}

    def resume(self, state: Mapping[str, Any]) -> Place:
        """The place of a checkpoint; raises CheckpointError where its data or mix are not these."""
        if state["order"] != self.digest():
            raise CheckpointError("data: the checkpoint was made with other samples, buckets or another mix")
        return Place(state["epoch"], state["at"])

    def digest(self) -> str:
        """Sixteen hex digits over all that the order hangs on."""
        seen = hashlib.sha256(repr((sorted(asdict(self.mix).items(), key=str), self.buckets)).encode())
        seen.update(self.task.tobytes() + self.bucket.tobytes())
        return seen.hexdigest()[:16]


def group_of(task: int) -> Group:
    return "video" if "video" in TASKS[task] else "image"


def alternate(first: list[Batch], second: list[Batch]) -> list[Batch]:
    """Both lists in their order, each spread evenly over the whole."""
    moments = [((at + 0.5) / len(batches), which, at) for which, batches in enumerate((first, second))
               for at in range(len(batches))]  # fmt: skip
    return [(first, second)[which][at] for _, which, at in sorted(moments)]


@dataclass(frozen=True)
class Measured:
    """What an epoch comes to.  `waste` is the part of the ranks' work that is padding or waiting, in pixels."""

    steps: int
    samples: int
    waste: float
    updates: dict[Task, float]  # steps that a task has a part in, for each 1000 samples of the epoch
    gap: dict[Task, int]  # the most samples between two such steps


def measure(order: Order, world: int, epoch: int = 0) -> Measured:
    """Walks through an epoch as `world` ranks would, which wait for each other once a step."""
    batches = order.epoch(epoch)
    samples = sum(len(batch.indices) for batch in batches)
    useful = sum(len(batch.indices) * batch.bucket.pixels for batch in batches)
    slots = sum(math.ceil(len(batch.indices) / world) * world * batch.bucket.pixels for batch in batches)
    updates, gaps = {}, {}
    ends = np.cumsum([len(batch.indices) for batch in batches])
    for task in order.quotas:
        seen = [end for end, batch in zip(ends, batches, strict=True) if (order.task[batch.indices] == task).any()]
        updates[TASKS[task]] = 1000 * len(seen) / samples
        gaps[TASKS[task]] = int(max(np.diff([0, *seen, samples])))
    return Measured(len(batches), samples, 1 - useful / slots, updates, gaps)


# ---------------------------------------------------------------- shapes

RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 2.0)
GRID = 16  # px; VAE and patch embedding


def buckets_around(width: int, height: int, lengths: Sequence[int], ratios: Sequence[float] = RATIOS) -> list[Bucket]:
    """Buckets of about this area in the usual aspect ratios and in its own, for each number of frames."""
    if min(width, height) < GRID or any(frames < 1 or frames % 4 != 1 for frames in lengths):
        raise InvalidInput("buckets", f"{width}x{height}, frames {lengths}: {GRID} px and more, and 4k + 1 frames")
    area, sizes = width * height, {(on_grid(width), on_grid(height))}
    sizes |= {(on_grid(math.sqrt(area * ratio)), on_grid(math.sqrt(area / ratio))) for ratio in ratios}
    return sorted(Bucket(wide, tall, frames) for wide, tall in sizes for frames in lengths)


def on_grid(side: float) -> int:
    return max(GRID, round(side / GRID) * GRID)


def bucket_for(
    buckets: Sequence[Bucket], task: Task, width: int, height: int, frames: int, fps: float, wanted: float
) -> Bucket:
    """The bucket that loses least of a medium, which is to be seen at `wanted` frames a second: the most frames that
    it has, then the nearest aspect ratio.  Raises InvalidInput for a clip that is too short for all of them.
    """
    there = 1 if "image" in task else math.floor((frames - 1) * wanted / fps + 1e-6) + 1
    fitting = [one for one in buckets if one.group == group_of(TASKS.index(task)) and one.frames <= there]
    if not fitting:
        raise InvalidInput("frames", f"{there} at {wanted:g} a second; no bucket is so short")
    return min(fitting, key=lambda one: (-one.frames, one.far(width, height)))

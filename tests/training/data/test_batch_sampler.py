"""The order of batches: every sample once an epoch, one shape a batch, the same on any number of ranks."""

import functools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from omnivideo.contracts import TRAINING_TASKS
from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.training.data.batch_sampler import (
    PAPER_TASK_MIX,
    BatchSampler,
    Bucket,
    GlobalBatch,
    MixConfig,
    SamplerState,
    build_buckets,
    measure_epoch,
)
from omnivideo.training.engine.data_parallel import DataParallelRank
from omnivideo.training.recipes.over_shards import build_mix

STILLS = [Bucket(64, 64, 1), Bucket(80, 48, 1), Bucket(48, 80, 1)]
CLIPS = [Bucket(64, 64, frames) for frames in (5, 9)] + [Bucket(80, 48, 9)]


def paper_counts(total: int) -> dict:
    """Whole samples of each task, in Table 1's shares."""
    exact = {task: total * share / sum(PAPER_TASK_MIX.values()) for task, share in PAPER_TASK_MIX.items()}
    counts = {task: int(value) for task, value in exact.items()}
    for task in sorted(exact, key=lambda name: counts[name] - exact[name])[: total - sum(counts.values())]:
        counts[task] += 1
    return counts


@functools.cache
def mixed_set(total: int = 10_000) -> tuple[list, list]:
    rng = np.random.default_rng(1)
    tasks = [task for task, count in paper_counts(total).items() for _ in range(count)]
    rng.shuffle(tasks)
    kinds = rng.choice(3, total, p=(0.6, 0.3, 0.1))
    shapes = [(CLIPS if "video" in task else STILLS)[kind] for task, kind in zip(tasks, kinds, strict=True)]
    return [str(task) for task in tasks], shapes


@pytest.fixture(scope="module")
def order() -> BatchSampler:
    return BatchSampler(*mixed_set())


def dealt(batch: GlobalBatch, world: int) -> list[list[int]]:
    """What each rank has, as `share.py` deals it out."""
    found = []
    for rank in range(world):
        share = DataParallelRank()
        share.rank, share.world_size = rank, world
        found.append(batch.indices[share.local_slice(len(batch.indices))].tolist())
    return found


def seen(order: BatchSampler, world: int, epoch: int = 0) -> list[int]:
    return [index for batch in order.get_epoch_batches(epoch) for rank in dealt(batch, world) for index in rank]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_ten_thousand_samples_come_once_an_epoch_on_any_number_of_ranks(order, world):
    assert sorted(seen(order, world)) == list(range(10_000))


def test_every_micro_batch_has_one_shape_and_no_more_than_two_percent_are_waste(order):
    tasks, shapes = mixed_set()
    for batch in order.get_epoch_batches(0):
        assert {shapes[index] for index in batch.indices} == {batch.bucket}
    for world in (1, 2, 4, 8):
        assert measure_epoch(order, world).wasted_fraction < 0.02
    assert len(tasks) == 10_000


def even_set(total: int = 10_000) -> tuple[list, list]:
    """Table 1's tasks over the usual aspect ratios around 832x480, evenly filled."""
    rng, around = np.random.default_rng(3), build_buckets(832, 480, (1, 17, 41))
    tasks = [task for task, count in paper_counts(total).items() for _ in range(count)]
    fitting = {group: [one for one in around if one.group == group] for group in ("image", "video")}
    shapes = [fitting["video" if "video" in task else "image"] for task in tasks]
    return tasks, [some[rng.integers(len(some))] for some in shapes]


def test_the_mix_that_stages_train_with_wastes_less_than_two_percent_on_two_ranks():
    """No sample is cropped to another bucket, and equal parts are what does it."""
    tasks, shapes = even_set()
    order = BatchSampler(tasks, shapes, build_mix())
    assert measure_epoch(order, 2).wasted_fraction < 0.02
    assert all({shapes[index] for index in batch.indices} == {batch.bucket} for batch in order.get_epoch_batches(0))
    assert measure_epoch(BatchSampler(tasks, shapes, replace(build_mix(), batch_multiple=1)), 2).wasted_fraction > 0.02


def test_what_ranks_wait_for_is_measured(order):
    pixels = np.array([batch.bucket.pixel_count for batch in order.get_epoch_batches(0)])
    lengths = np.array([[len(rank) for rank in dealt(batch, 3)] for batch in order.get_epoch_batches(0)])
    assert np.ptp(lengths, axis=1).max() <= 1  # nobody waits for more than one sample
    useful, there = (lengths.sum(axis=1) * pixels).sum(), (3 * lengths.max(axis=1) * pixels).sum()
    assert measure_epoch(order, 3).wasted_fraction == pytest.approx(1 - useful / there)


def test_images_and_videos_take_turns_evenly(order):
    kinds = [batch.bucket.group for batch in order.get_epoch_batches(0)]
    videos = [at for at, kind in enumerate(kinds) if kind == "video"]
    gaps = np.diff(videos)
    assert len(videos) > 20
    assert gaps.max() - gaps.min() <= 1


def test_weights_set_how_many_batches_of_a_group_come(order):
    even = BatchSampler(*mixed_set(), MixConfig(group_weights={"image": 1, "video": 1}))
    kinds = Counter(batch.bucket.group for batch in even.get_epoch_batches(0))
    assert abs(kinds["image"] - kinds["video"]) <= 4  # a bucket's last batch may be a small one
    tasks = Counter(mixed_set()[0][index] for index in seen(even, 1))
    assert tasks["text-to-image"] / tasks["image-editing"] == pytest.approx(33.05 / 18.95, rel=0.02)
    assert len(set(seen(even, 1))) == len(seen(even, 1))


def test_the_ratio_is_kept_and_what_an_epoch_leaves_comes_in_the_next():
    tasks = ["text-to-image"] * 900 + ["image-editing"] * 100
    order = BatchSampler(tasks, [STILLS[0]] * 1000, MixConfig(task_ratio={"text-to-image": 2, "image-editing": 1}))
    epochs = [seen(order, 2, epoch=number) for number in range(9)]
    for epoch in epochs:
        counts = Counter(tasks[index] for index in epoch)
        assert len(set(epoch)) == len(epoch)
        assert counts["image-editing"] == 100
        assert counts["text-to-image"] == pytest.approx(200, abs=3)
    stills = Counter(index for epoch in epochs for index in epoch if index < 900)
    assert len(stills) == 900 and max(stills.values()) - min(stills.values()) <= 1


def test_without_a_ratio_everything_comes_once():
    order = BatchSampler(
        ["text-to-image"] * 91 + ["video-editing"] * 30, [STILLS[0]] * 91 + [CLIPS[0]] * 30, MixConfig(task_ratio=None)
    )
    assert sorted(seen(order, 2)) == list(range(121))


def test_tasks_are_spread_over_the_batches(order):
    stills = [batch for batch in order.get_epoch_batches(0) if batch.bucket == STILLS[0]]
    edits = [(order.sample_tasks[batch.indices] == TRAINING_TASKS.index("image-editing")).mean() for batch in stills]
    assert np.std(edits) < 0.06
    assert min(edits) > 0


def run(order: BatchSampler, place: SamplerState, world: int, steps: int) -> tuple[SamplerState, list[list[int]]]:
    """What each step's ranks saw, together."""
    steps_seen = []
    for (after, batch), _ in zip(order.iterate_batches(place), range(steps), strict=False):
        steps_seen.append([index for rank in dealt(batch, world) for index in rank])
        place = after
    return place, steps_seen


def test_the_order_goes_on_in_mid_epoch_on_other_numbers_of_ranks(order):
    _, whole = run(order, SamplerState(), 1, 300)  # an epoch is shorter: the second one is reached
    place, resumed = SamplerState(), []
    for world, steps in ((2, 71), (1, 40), (4, 189)):
        state = order.dump_state(place)
        place = BatchSampler(*mixed_set()).restore_state(state)  # as a new process would
        place, some = run(order, place, world, steps)
        resumed += some
    assert len(order.get_epoch_batches(0)) < 300
    assert resumed == whole


def test_a_checkpoint_of_other_data_is_refused(order):
    state = order.dump_state(SamplerState(0, 3))
    tasks, shapes = mixed_set()
    for other in (BatchSampler(tasks, shapes, MixConfig(seed=1)), BatchSampler(tasks[1:], shapes[1:])):
        with pytest.raises(CheckpointError, match="other samples"):
            other.restore_state(state)


def test_another_seed_and_another_epoch_come_in_another_order(order):
    first = [tuple(batch.indices) for batch in order.get_epoch_batches(0)]
    assert first != [tuple(batch.indices) for batch in order.get_epoch_batches(1)]
    assert first != [
        tuple(batch.indices) for batch in BatchSampler(*mixed_set(), MixConfig(seed=1)).get_epoch_batches(0)
    ]


def test_a_bucket_of_a_few_joins_the_one_most_like_it():
    odd = Bucket(96, 48, 1)
    order = BatchSampler(
        ["text-to-image"] * 203, [STILLS[0]] * 100 + [STILLS[1]] * 100 + [odd] * 3, MixConfig(task_ratio=None)
    )
    batches = order.get_epoch_batches(0)
    assert {batch.bucket for batch in batches} == {STILLS[0], STILLS[1]}
    assert {200, 201, 202} <= {index for batch in batches if batch.bucket == STILLS[1] for index in batch.indices}


def test_a_bucket_of_a_few_stays_as_it_is_where_nothing_is_folded():
    tasks, shapes = ["text-to-image"] * 103, [STILLS[0]] * 100 + [STILLS[1]] * 3
    batches = BatchSampler(tasks, shapes, MixConfig(task_ratio=None, fold_small_buckets=False)).get_epoch_batches(0)
    assert {batch.bucket: len(batch.indices) for batch in batches if batch.bucket == STILLS[1]} == {STILLS[1]: 3}


def test_a_clip_never_joins_a_bucket_of_more_frames():
    order = BatchSampler(["text-to-video"] * 43, [CLIPS[1]] * 40 + [CLIPS[0]] * 3, MixConfig(task_ratio=None))
    assert {batch.bucket: len(batch.indices) for batch in order.get_epoch_batches(0) if batch.bucket == CLIPS[0]} == {
        CLIPS[0]: 3
    }


def test_mixed_batches_update_each_task_more_often_than_one_task_a_batch(order):
    mixed, alone = measure_epoch(order, 2), measure_epoch(BatchSampler(*mixed_set(), MixConfig(mix_tasks=False)), 2)
    assert mixed.samples == alone.samples == 10_000
    for task in TRAINING_TASKS:
        assert mixed.steps_per_1000_samples[task] > alone.steps_per_1000_samples[task]
    assert mixed.max_sample_gap["image-editing"] < alone.max_sample_gap["image-editing"]


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("ratio", {"task_ratio": {"text-to-sound": 1}}),
        ("ratio", {"task_ratio": {"text-to-image": -1}}),
        ("stills", {"batch_sizes": {"image": 12, "video": 8}}),
        ("clips", {"batch_sizes": {"image": 8}}),
        ("batch_multiple", {"batch_multiple": 0}),
        ("group-weight", {"group_weights": {"image": 1}}),
        ("group-weight", {"group_weights": {"image": 1, "video": math.inf}}),
        ("group-weight", {"group_weights": {"image": 1, "video": 1, "sound": 1}}),
    ],
)
def test_a_mix_that_cannot_be_is_refused(field, given):
    with pytest.raises(InvalidInput) as refused:
        MixConfig(**given)
    assert refused.value.field == field


def test_fewer_samples_than_ranks_leave_some_waiting():
    order = BatchSampler(["text-to-image"] * 3, [STILLS[0]] * 3, MixConfig(task_ratio=None))
    assert measure_epoch(order, 4).wasted_fraction == pytest.approx(1 / 4)


def test_the_stages_mix_is_as_asked():
    asked = build_mix(16, 4, 2, ["text-to-image=2", "video-editing=0.5"], ["image=1", "video=3"])
    assert asked.task_ratio == {"text-to-image": 2, "video-editing": 0.5} and asked.group_weights == {
        "image": 1,
        "video": 3,
    }
    assert asked.batch_sizes == {"image": 32, "video": 8} and asked.batch_multiple == 8
    assert (
        build_mix().task_ratio == PAPER_TASK_MIX
        and build_mix().group_weights is None
        and build_mix().batch_sizes == {"image": 64, "video": 24}
    )
    assert build_mix(clips=6).batch_multiple == 2  # it divides both sizes
    one, other = (BatchSampler(*mixed_set(), replace(build_mix(seed=seed), task_ratio=None)) for seed in (0, 1))
    assert sorted(seen(one, 1)) == sorted(seen(other, 1)) and seen(one, 1) != seen(other, 1)


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("ratio", {"ratio": ["text-to-sound=1"]}),
        ("ratio", {"ratio": ["text-to-image"]}),
        ("ratio", {"ratio": ["text-to-image=nan"]}),
        ("ratio", {"ratio": ["text-to-image=1", "text-to-image=2"]}),
        ("group-weight", {"weights": ["image=1"]}),
        ("group-weight", {"weights": ["image=1", "video=0"]}),
    ],
)
def test_shares_that_cannot_be_are_refused(field, given):
    with pytest.raises(InvalidInput) as refused:
        build_mix(**given)
    assert refused.value.field == field

"""The order of batches: each epoch has every sample once, each batch one shape, on any number of ranks."""

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


def count_paper_tasks(total: int) -> dict:
    """Return the number of samples of each task, in the proportions of Table 1."""
    exact = {task: total * share / sum(PAPER_TASK_MIX.values()) for task, share in PAPER_TASK_MIX.items()}
    counts = {task: int(value) for task, value in exact.items()}
    for task in sorted(exact, key=lambda name: counts[name] - exact[name])[: total - sum(counts.values())]:
        counts[task] += 1
    return counts


@functools.cache
def make_mixed_set(total: int = 10_000) -> tuple[list, list]:
    rng = np.random.default_rng(1)
    tasks = [task for task, count in count_paper_tasks(total).items() for _ in range(count)]
    rng.shuffle(tasks)
    kinds = rng.choice(3, total, p=(0.6, 0.3, 0.1))
    shapes = [(CLIPS if "video" in task else STILLS)[kind] for task, kind in zip(tasks, kinds, strict=True)]
    return [str(task) for task in tasks], shapes


@pytest.fixture(scope="module")
def order() -> BatchSampler:
    return BatchSampler(*make_mixed_set())


def split_among_ranks(batch: GlobalBatch, world: int) -> list[list[int]]:
    """Return the samples of each rank, as `DataParallelRank` splits the batch."""
    found = []
    for rank in range(world):
        share = DataParallelRank()
        share.rank, share.world_size = rank, world
        found.append(batch.indices[share.local_slice(len(batch.indices))].tolist())
    return found


def list_epoch_samples(order: BatchSampler, world: int, epoch: int = 0) -> list[int]:
    return [
        index for batch in order.get_epoch_batches(epoch) for rank in split_among_ranks(batch, world) for index in rank
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_an_epoch_has_every_sample_once_on_any_number_of_ranks(order, world):
    assert sorted(list_epoch_samples(order, world)) == list(range(10_000))


def test_every_micro_batch_has_one_shape_and_under_two_percent_are_wasted(order):
    tasks, shapes = make_mixed_set()
    for batch in order.get_epoch_batches(0):
        assert {shapes[index] for index in batch.indices} == {batch.bucket}
    for world in (1, 2, 4, 8):
        assert measure_epoch(order, world).wasted_fraction < 0.02
    assert len(tasks) == 10_000


def make_even_set(total: int = 10_000) -> tuple[list, list]:
    """Return the tasks of Table 1, spread evenly over the usual aspect ratios around 832x480."""
    rng, around = np.random.default_rng(3), build_buckets(832, 480, (1, 17, 41))
    tasks = [task for task, count in count_paper_tasks(total).items() for _ in range(count)]
    fitting = {group: [one for one in around if one.group == group] for group in ("image", "video")}
    shapes = [fitting["video" if "video" in task else "image"] for task in tasks]
    return tasks, [some[rng.integers(len(some))] for some in shapes]


def test_the_mix_of_the_stages_wastes_under_two_percent_on_two_ranks():
    """No sample is cropped to another bucket; the waste is low because the parts of the ranks are equal."""
    tasks, shapes = make_even_set()
    order = BatchSampler(tasks, shapes, build_mix())
    assert measure_epoch(order, 2).wasted_fraction < 0.02
    assert all({shapes[index] for index in batch.indices} == {batch.bucket} for batch in order.get_epoch_batches(0))
    assert measure_epoch(BatchSampler(tasks, shapes, replace(build_mix(), batch_multiple=1)), 2).wasted_fraction > 0.02


def test_the_waiting_of_ranks_is_measured(order):
    pixels = np.array([batch.bucket.pixel_count for batch in order.get_epoch_batches(0)])
    lengths = np.array([[len(rank) for rank in split_among_ranks(batch, 3)] for batch in order.get_epoch_batches(0)])
    assert np.ptp(lengths, axis=1).max() <= 1  # no rank waits for more than one sample
    useful, there = (lengths.sum(axis=1) * pixels).sum(), (3 * lengths.max(axis=1) * pixels).sum()
    assert measure_epoch(order, 3).wasted_fraction == pytest.approx(1 - useful / there)


def test_images_and_videos_alternate_evenly(order):
    kinds = [batch.bucket.group for batch in order.get_epoch_batches(0)]
    videos = [at for at, kind in enumerate(kinds) if kind == "video"]
    gaps = np.diff(videos)
    assert len(videos) > 20
    assert gaps.max() - gaps.min() <= 1


def test_weights_set_the_number_of_batches_of_a_group(order):
    even = BatchSampler(*make_mixed_set(), MixConfig(group_weights={"image": 1, "video": 1}))
    kinds = Counter(batch.bucket.group for batch in even.get_epoch_batches(0))
    assert abs(kinds["image"] - kinds["video"]) <= 4  # the last batch of a bucket may be small
    tasks = Counter(make_mixed_set()[0][index] for index in list_epoch_samples(even, 1))
    assert tasks["text-to-image"] / tasks["image-editing"] == pytest.approx(33.05 / 18.95, rel=0.02)
    assert len(set(list_epoch_samples(even, 1))) == len(list_epoch_samples(even, 1))


def test_the_ratio_is_kept_and_later_epochs_use_the_remaining_samples():
    tasks = ["text-to-image"] * 900 + ["image-editing"] * 100
    order = BatchSampler(tasks, [STILLS[0]] * 1000, MixConfig(task_ratio={"text-to-image": 2, "image-editing": 1}))
    epochs = [list_epoch_samples(order, 2, epoch=number) for number in range(9)]
    for epoch in epochs:
        counts = Counter(tasks[index] for index in epoch)
        assert len(set(epoch)) == len(epoch)
        assert counts["image-editing"] == 100
        assert counts["text-to-image"] == pytest.approx(200, abs=3)
    stills = Counter(index for epoch in epochs for index in epoch if index < 900)
    assert len(stills) == 900 and max(stills.values()) - min(stills.values()) <= 1


def test_without_a_ratio_every_sample_is_used_once():
    order = BatchSampler(
        ["text-to-image"] * 91 + ["video-editing"] * 30, [STILLS[0]] * 91 + [CLIPS[0]] * 30, MixConfig(task_ratio=None)
    )
    assert sorted(list_epoch_samples(order, 2)) == list(range(121))


def test_tasks_are_spread_over_the_batches(order):
    stills = [batch for batch in order.get_epoch_batches(0) if batch.bucket == STILLS[0]]
    edits = [(order.sample_tasks[batch.indices] == TRAINING_TASKS.index("image-editing")).mean() for batch in stills]
    assert np.std(edits) < 0.06
    assert min(edits) > 0


def run_steps(order: BatchSampler, place: SamplerState, world: int, steps: int) -> tuple[SamplerState, list[list[int]]]:
    """Return the state after some steps, and the samples of all ranks in each step."""
    steps_seen = []
    for (after, batch), _ in zip(order.iterate_batches(place), range(steps), strict=False):
        steps_seen.append([index for rank in split_among_ranks(batch, world) for index in rank])
        place = after
    return place, steps_seen


def test_the_order_resumes_within_an_epoch_on_other_numbers_of_ranks(order):
    _, uninterrupted = run_steps(order, SamplerState(), 1, 300)  # more steps than an epoch has
    place, resumed = SamplerState(), []
    for world, steps in ((2, 71), (1, 40), (4, 189)):
        state = order.dump_state(place)
        place = BatchSampler(*make_mixed_set()).restore_state(state)  # as in a new process
        place, some = run_steps(order, place, world, steps)
        resumed += some
    assert len(order.get_epoch_batches(0)) < 300
    assert resumed == uninterrupted


def test_a_checkpoint_with_other_data_is_refused(order):
    state = order.dump_state(SamplerState(0, 3))
    tasks, shapes = make_mixed_set()
    for other in (BatchSampler(tasks, shapes, MixConfig(seed=1)), BatchSampler(tasks[1:], shapes[1:])):
        with pytest.raises(CheckpointError, match="other samples"):
            other.restore_state(state)


def test_another_seed_or_epoch_has_another_order(order):
    first = [tuple(batch.indices) for batch in order.get_epoch_batches(0)]
    assert first != [tuple(batch.indices) for batch in order.get_epoch_batches(1)]
    assert first != [
        tuple(batch.indices) for batch in BatchSampler(*make_mixed_set(), MixConfig(seed=1)).get_epoch_batches(0)
    ]


def test_a_small_bucket_is_folded_into_the_most_similar_one():
    odd = Bucket(96, 48, 1)
    order = BatchSampler(
        ["text-to-image"] * 203, [STILLS[0]] * 100 + [STILLS[1]] * 100 + [odd] * 3, MixConfig(task_ratio=None)
    )
    batches = order.get_epoch_batches(0)
    assert {batch.bucket for batch in batches} == {STILLS[0], STILLS[1]}
    assert {200, 201, 202} <= {index for batch in batches if batch.bucket == STILLS[1] for index in batch.indices}


def test_a_small_bucket_is_kept_if_folding_is_disabled():
    tasks, shapes = ["text-to-image"] * 103, [STILLS[0]] * 100 + [STILLS[1]] * 3
    batches = BatchSampler(tasks, shapes, MixConfig(task_ratio=None, fold_small_buckets=False)).get_epoch_batches(0)
    assert {batch.bucket: len(batch.indices) for batch in batches if batch.bucket == STILLS[1]} == {STILLS[1]: 3}


def test_a_clip_is_not_folded_into_a_bucket_with_more_frames():
    order = BatchSampler(["text-to-video"] * 43, [CLIPS[1]] * 40 + [CLIPS[0]] * 3, MixConfig(task_ratio=None))
    assert {batch.bucket: len(batch.indices) for batch in order.get_epoch_batches(0) if batch.bucket == CLIPS[0]} == {
        CLIPS[0]: 3
    }


def test_mixed_batches_update_each_task_more_often_than_batches_of_one_task(order):
    mixed, alone = (
        measure_epoch(order, 2),
        measure_epoch(BatchSampler(*make_mixed_set(), MixConfig(mix_tasks=False)), 2),
    )
    assert mixed.samples == alone.samples == 10_000
    for task in TRAINING_TASKS:
        assert mixed.steps_per_1000_samples[task] > alone.steps_per_1000_samples[task]
    assert mixed.max_sample_gap["image-editing"] < alone.max_sample_gap["image-editing"]


@pytest.mark.parametrize(
    ("field", "options"),
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
def test_an_invalid_mix_is_refused(field, options):
    with pytest.raises(InvalidInput) as refused:
        MixConfig(**options)
    assert refused.value.field == field


def test_fewer_samples_than_ranks_are_wasteful():
    order = BatchSampler(["text-to-image"] * 3, [STILLS[0]] * 3, MixConfig(task_ratio=None))
    assert measure_epoch(order, 4).wasted_fraction == pytest.approx(1 / 4)


def test_the_mix_follows_its_options():
    mix = build_mix(16, 4, 2, ["text-to-image=2", "video-editing=0.5"], ["image=1", "video=3"])
    assert mix.task_ratio == {"text-to-image": 2, "video-editing": 0.5} and mix.group_weights == {
        "image": 1,
        "video": 3,
    }
    assert mix.batch_sizes == {"image": 32, "video": 8} and mix.batch_multiple == 8
    assert (
        build_mix().task_ratio == PAPER_TASK_MIX
        and build_mix().group_weights is None
        and build_mix().batch_sizes == {"image": 64, "video": 24}
    )
    assert build_mix(clips=6).batch_multiple == 2  # the greatest common divisor of both sizes
    one, other = (BatchSampler(*make_mixed_set(), replace(build_mix(seed=seed), task_ratio=None)) for seed in (0, 1))
    assert sorted(list_epoch_samples(one, 1)) == sorted(list_epoch_samples(other, 1)) and list_epoch_samples(
        one, 1
    ) != list_epoch_samples(other, 1)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("ratio", {"ratio": ["text-to-sound=1"]}),
        ("ratio", {"ratio": ["text-to-image"]}),
        ("ratio", {"ratio": ["text-to-image=nan"]}),
        ("ratio", {"ratio": ["text-to-image=1", "text-to-image=2"]}),
        ("group-weight", {"weights": ["image=1"]}),
        ("group-weight", {"weights": ["image=1", "video=0"]}),
    ],
)
def test_invalid_ratios_and_weights_are_refused(field, options):
    with pytest.raises(InvalidInput) as refused:
        build_mix(**options)
    assert refused.value.field == field

"""The order of batches: every sample once an epoch, one shape a batch, the same on any number of ranks."""

import functools
from collections import Counter

import numpy as np
import pytest

from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.training.data.batches import PAPER, TASKS, Batch, Bucket, Mix, Order, Place, measure, micros

STILLS = [Bucket(64, 64, 1), Bucket(80, 48, 1), Bucket(48, 80, 1)]
CLIPS = [Bucket(64, 64, frames) for frames in (5, 9)] + [Bucket(80, 48, 9)]


def paper_counts(total: int) -> dict:
    """Whole samples of each task, in Table 1's shares."""
    exact = {task: total * share / sum(PAPER.values()) for task, share in PAPER.items()}
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
def order() -> Order:
    return Order(*mixed_set())


def seen(order: Order, world: int, most: int = 16, epoch: int = 0) -> list[int]:
    parts = [micros(batch, rank, world, most) for batch in order.epoch(epoch) for rank in range(world)]
    return [int(index) for rank in parts for micro in rank for index in micro.indices]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_ten_thousand_samples_come_once_an_epoch_on_any_number_of_ranks(order, world):
    assert sorted(seen(order, world)) == list(range(10_000))


def test_every_micro_batch_has_one_shape_and_no_more_than_two_percent_are_waste(order):
    tasks, shapes = mixed_set()
    for batch in order.epoch(0):
        assert {shapes[index] for index in batch.indices} == {batch.bucket}
    for world in (1, 2, 4, 8):
        assert measure(order, world, 16).waste < 0.02
    assert len(tasks) == 10_000


def test_every_rank_has_as_many_passes_and_their_shares_add_up(order):
    for batch in order.epoch(0):
        ranks = [micros(batch, rank, 3, 4) for rank in range(3)]
        assert len({len(rank) for rank in ranks}) == 1
        assert all(len(micro.indices) for rank in ranks for micro in rank)
        assert sum(micro.share for rank in ranks for micro in rank) == pytest.approx(1)


def test_images_and_videos_take_turns_evenly(order):
    kinds = [batch.bucket.group for batch in order.epoch(0)]
    videos = [at for at, kind in enumerate(kinds) if kind == "video"]
    gaps = np.diff(videos)
    assert len(videos) > 20
    assert gaps.max() - gaps.min() <= 1


def test_weights_set_how_many_batches_of_a_group_come(order):
    even = Order(*mixed_set(), Mix(weights={"image": 1, "video": 1}))
    kinds = Counter(batch.bucket.group for batch in even.epoch(0))
    assert abs(kinds["image"] - kinds["video"]) <= 4  # a bucket's last batch may be a small one
    tasks = Counter(mixed_set()[0][index] for index in seen(even, 1))
    assert tasks["text-to-image"] / tasks["image-editing"] == pytest.approx(33.05 / 18.95, rel=0.02)
    assert len(set(seen(even, 1))) == len(seen(even, 1))


def test_the_ratio_is_kept_and_what_an_epoch_leaves_comes_in_the_next():
    tasks = ["text-to-image"] * 900 + ["image-editing"] * 100
    order = Order(tasks, [STILLS[0]] * 1000, Mix(ratio={"text-to-image": 2, "image-editing": 1}))
    epochs = [seen(order, 2, epoch=number) for number in range(9)]
    for epoch in epochs:
        counts = Counter(tasks[index] for index in epoch)
        assert len(set(epoch)) == len(epoch)
        assert counts["image-editing"] == 100
        assert counts["text-to-image"] == pytest.approx(200, abs=3)
    stills = Counter(index for epoch in epochs for index in epoch if index < 900)
    assert len(stills) == 900 and max(stills.values()) - min(stills.values()) <= 1


def test_without_a_ratio_everything_comes_once():
    order = Order(["text-to-image"] * 91 + ["video-editing"] * 30, [STILLS[0]] * 91 + [CLIPS[0]] * 30, Mix(ratio=None))
    assert sorted(seen(order, 2)) == list(range(121))


def test_tasks_are_spread_over_the_batches(order):
    stills = [batch for batch in order.epoch(0) if batch.bucket == STILLS[0]]
    edits = [(order.task[batch.indices] == TASKS.index("image-editing")).mean() for batch in stills]
    assert np.std(edits) < 0.06
    assert min(edits) > 0


def run(order: Order, place: Place, world: int, steps: int) -> tuple[Place, list[list[int]]]:
    """What each step's ranks saw, together."""
    steps_seen = []
    for (after, batch), _ in zip(order.walk(place), range(steps), strict=False):
        ranks = [micros(batch, rank, world, 8) for rank in range(world)]
        steps_seen.append([int(index) for rank in ranks for micro in rank for index in micro.indices])
        place = after
    return place, steps_seen


def test_the_order_goes_on_in_mid_epoch_on_other_numbers_of_ranks(order):
    _, whole = run(order, Place(), 1, 300)  # an epoch is shorter: the second one is reached
    place, resumed = Place(), []
    for world, steps in ((2, 71), (1, 40), (4, 189)):
        state = order.state(place)
        place = Order(*mixed_set()).resume(state)  # as a new process would
        place, some = run(order, place, world, steps)
        resumed += some
    assert len(order.epoch(0)) < 300
    assert resumed == whole


def test_a_checkpoint_of_other_data_is_refused(order):
    state = order.state(Place(0, 3))
    tasks, shapes = mixed_set()
    for other in (Order(tasks, shapes, Mix(seed=1)), Order(tasks[1:], shapes[1:])):
        with pytest.raises(CheckpointError, match="other samples"):
            other.resume(state)


def test_another_seed_and_another_epoch_come_in_another_order(order):
    first = [tuple(batch.indices) for batch in order.epoch(0)]
    assert first != [tuple(batch.indices) for batch in order.epoch(1)]
    assert first != [tuple(batch.indices) for batch in Order(*mixed_set(), Mix(seed=1)).epoch(0)]


def test_a_bucket_of_a_few_joins_the_one_most_like_it():
    odd = Bucket(96, 48, 1)
    order = Order(["text-to-image"] * 203, [STILLS[0]] * 100 + [STILLS[1]] * 100 + [odd] * 3, Mix(ratio=None))
    batches = order.epoch(0)
    assert {batch.bucket for batch in batches} == {STILLS[0], STILLS[1]}
    assert {200, 201, 202} <= {index for batch in batches if batch.bucket == STILLS[1] for index in batch.indices}


def test_a_clip_never_joins_a_bucket_of_more_frames():
    order = Order(["text-to-video"] * 43, [CLIPS[1]] * 40 + [CLIPS[0]] * 3, Mix(ratio=None))
    assert {batch.bucket: len(batch.indices) for batch in order.epoch(0) if batch.bucket == CLIPS[0]} == {CLIPS[0]: 3}


def test_mixed_batches_update_each_task_more_often_than_one_task_a_batch(order):
    mixed, alone = measure(order, 2, 16), measure(Order(*mixed_set(), Mix(mixed=False)), 2, 16)
    assert mixed.samples == alone.samples == 10_000
    for task in TASKS:
        assert mixed.updates[task] > alone.updates[task]
    assert mixed.gap["image-editing"] < alone.gap["image-editing"]


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("ratio", {"ratio": {"text-to-sound": 1}}),
        ("ratio", {"ratio": {"text-to-image": -1}}),
        ("sizes", {"sizes": {"image": 12, "video": 8}}),
        ("sizes", {"sizes": {"image": 8}}),
        ("unit", {"unit": 0}),
        ("weights", {"weights": {"image": 1}}),
    ],
)
def test_a_mix_that_cannot_be_is_refused(field, given):
    with pytest.raises(InvalidInput) as refused:
        Mix(**given)
    assert refused.value.field == field


def test_fewer_samples_than_ranks_are_refused():
    with pytest.raises(InvalidInput, match="4 and more"):
        micros(Batch(STILLS[0], np.arange(3)), 0, 4, 8)

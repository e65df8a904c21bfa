"""The stages over shards: real samples in the order of their epochs, whole or in shares."""

import json

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel
from typer.testing import CliRunner

from omnivideo.cli import app
from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.models.checkpoint import load, save_library_model
from omnivideo.training.data.batches import Mix
from omnivideo.training.data.encode import Cache, Frozen, encode_all
from omnivideo.training.data.rows import Lessons, ShardSource
from omnivideo.training.data.sample import Sample
from omnivideo.training.recipes import visual_encoder
from omnivideo.training.recipes.stages import Portion, flow_recipe
from omnivideo.training.share import Share, sharing
from omnivideo.training.trainer import Trainer
from tests.unit.test_data import mp4, png
from tests.unit.test_encode import FIT, library
from tests.unit.test_training import operations

SAMPLES = [
    *(Sample("text-to-image", f"a red ball {at}", target=png(at, (32, 32))) for at in range(4)),
    Sample("text-to-image", "a wide ball", target=png(9, (64, 32))),
    Sample("text-to-video", "a red ball rolls", target=mp4(9)),
    Sample("image-editing", "make it blue", png(3, (32, 32)), png(4, (32, 32))),
    *(Sample("video-editing", f"make it blue {at}", mp4(6 + at), mp4(8 + at)) for at in range(2)),
    Sample("image-understanding", source=png(1, (32, 32)), turns=(("what is it?", "a ball"), ("how many?", "two"))),
]


class Half(Share):
    """A share of two, or all; conditions are as long as any share's."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world

    def longest(self, length: int) -> int:
        return 120


@pytest.fixture(scope="module")
def made(weights, tmp_path_factory):
    there = library(tmp_path_factory.mktemp("shards"), SAMPLES)
    encode_all(there, Frozen.load(weights, "cpu"), FIT, lambda done, count: None)
    return there


def encoder() -> SiglipVisionModel:
    torch.manual_seed(2)
    return SiglipVisionModel(SiglipVisionConfig(**visual_encoder.CONFIG)).eval().requires_grad_(False)


def source(made, weights, name: str = "stage3", embedded: bool = True) -> ShardSource:
    cache = Cache(made.shelf, Frozen.load(weights, "cpu").digest(FIT))
    mix = Mix(ratio=None, sizes={"image": 3, "video": 2}, unit=1)
    return ShardSource(name, load(weights), made, cache, FIT, mix, encoder() if embedded else None)


def test_an_epoch_has_every_sample_that_is_drawn_once(made, weights):
    one = source(made, weights)
    steps = len(one.order.epoch(0))
    seen = [one.numbers[at] for step in range(steps) for at in one.batch(step).indices]
    assert sorted(seen) == list(range(9))
    again = [one.numbers[at] for step in range(steps, 2 * steps) for at in one.batch(step).indices]
    assert sorted(again) == sorted(seen) and again != seen
    alone = source(made, weights, "stage2b_generation")
    assert {made.entries[number].task for number in alone.numbers} == {"text-to-image", "text-to-video"}


def test_stage1_has_all_six_tasks_with_what_is_drawn_first(made, weights):
    omni = load(weights)
    mix = Mix(ratio=None, sizes={"image": 3, "video": 2}, unit=1)
    one = Lessons(omni, made, FIT, mix, encoder())
    said, seen = set(), []
    for step in range(3 * len(one.order.epoch(0))):
        tasks = [made.entries[one.numbers[at]].task for at in one.batch(step).indices]
        lesson = one.draw(step)
        words = [omni.mllm_tokenizer.decode(row[row != -100]) for row in lesson.labels]
        drawn = ["<BOV>" if task.endswith("to-video") or task == "video-editing" else "<BOI>" for task in tasks
                 if not task.endswith("understanding")]  # fmt: skip
        assert [word[:5] for word in words[: len(drawn)]] == drawn
        assert lesson.pixels.shape == (len(drawn), 3, one.batch(step).bucket.frames, 64, 64)
        said |= set(words[len(drawn) :])
        seen += [one.numbers[at] for at in one.batch(step).indices]
    assert sorted(seen) == sorted(3 * list(range(len(SAMPLES))))
    assert said == {"a ball<|im_end|>", "two<|im_end|>"}


def test_stage1_is_dealt_out_by_what_is_drawn(made, weights):
    """The shares' weights of Eq. 1 are as the whole batch's mean has it."""
    one = Lessons(load(weights), made, FIT, Mix(ratio=None, sizes={"image": 3, "video": 2}, unit=1), encoder())
    for step in range(len(one.order.epoch(0))):
        dealt = []
        for rank in range(2):
            with sharing(Half(rank, 2)):
                dealt.append(one.draw(step))
        whole = one.draw(step)
        assert sum(len(part.pixels) for part in dealt) == len(whole.pixels)
        assert sum(part.weight for part in dealt) == pytest.approx(2 * bool(len(whole.pixels)))
        kept = sum(int((part.labels != -100).sum()) for part in dealt)
        assert kept == int((whole.labels != -100).sum())


def test_rows_are_those_of_the_cache_and_the_models(made, weights):
    one = source(made, weights)
    for step in range(len(one.order.epoch(0))):
        numbers = [one.numbers[at] for at in one.batch(step).indices]
        dealt = one.ready(one.draw(step))
        assert isinstance(dealt, Portion) and dealt.weight == 1.0 and len(dealt.rows) == len(numbers) == dealt.whole
        rows = dealt.rows
        assert rows.embeddings.shape == (len(numbers), 4, 128) and rows.hidden.shape[:1] == (len(numbers),)
        sources = iter([] if rows.source is None else rows.source)
        for at, number in enumerate(numbers):
            kept = one.cache(made.entries[number])
            assert torch.equal(rows.target[at], kept["target"].float())
            assert torch.equal(rows.texts[at], kept["text"].float())
            assert ("source" in kept) == bool(rows.edited[at])
            if "source" in kept:
                assert torch.equal(next(sources), kept["source"].float())
            assert rows.hidden[at, rows.hidden_lengths[at] :].abs().sum() == 0


def test_two_shares_have_the_loss_of_one_also_where_they_are_not_equal(made, weights):
    """A batch of three in parts of two and one, and one of a single sample, which the second share has for nothing."""
    one = source(made, weights)
    recipe = flow_recipe("stage3", one.omni, one, steps=9, lr=1e-4, eq1=0.1)
    sizes = set()
    for step in range(len(one.order.epoch(0))):
        losses = []
        for share in (Half(0, 1), Half(0, 2), Half(1, 2)):
            torch.manual_seed(step)
            with sharing(share):
                losses.append(float(recipe.loss(step)["loss"].detach()))
        assert (losses[1] + losses[2]) / 2 == pytest.approx(losses[0], abs=1e-5)
        sizes.add(one.samples(step))
    assert {1, 3} <= sizes


def test_a_steps_operations_are_those_that_torch_counts(made, weights, tmp_path):
    """With the MLLM's, which are done on the way.  (A sample alone whose visual tokens are dropped has no gradients in
    the adapter.)"""
    one = source(made, weights)
    recipe = flow_recipe("stage3", one.omni, one, steps=9, lr=1e-4, eq1=0.1)
    Trainer(recipe, tmp_path)
    pairs = [(operations(recipe, step), recipe.flops(step)) for step in range(len(one.order.epoch(0)))]
    assert all(found == pytest.approx(counted, rel=0.05) for counted, found in pairs)
    assert sum(found for _, found in pairs) == pytest.approx(sum(counted for counted, _ in pairs), rel=0.02)


def test_a_run_goes_on_over_the_same_samples_only(made, weights, tmp_path):
    def recipe(data: str = "these"):
        one = source(made, weights, "stage2b", embedded=False)
        fresh = flow_recipe("stage2b", one.omni, one, steps=4, lr=1e-3, eq1=0.0)
        fresh.data = data
        return fresh

    def logged(name: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    Trainer(recipe(), tmp_path / "whole").run()
    Trainer(recipe(), tmp_path / "cut").run(until=2)
    Trainer(recipe(), tmp_path / "cut").run()
    assert logged("cut") == pytest.approx(logged("whole"), abs=1e-6) and len(logged("cut")) == 4
    with pytest.raises(CheckpointError, match="data: the checkpoint was made with other samples"):
        Trainer(recipe("others"), tmp_path / "cut")


def test_the_command_trains_over_shards(made, weights, tmp_path):
    save_library_model(encoder(), weights / "visual_encoder", torch.float16)
    given = ["--data", str(made.shelf.folder), "--weights", str(weights), "--runs", str(tmp_path), "--size", "64x64"]
    for stage in ("stage1", "stage2a", "stage2b", "stage3"):
        ran = CliRunner().invoke(app, ["train", stage, *given, "--frames", "5", "--steps", "2"], catch_exceptions=False)
        assert ran.exit_code == 0 and (tmp_path / stage / "state.pt").exists()
    for wrong, field in ((["decoder", *given], "recipe"), (["stage3", *given[:2]], "weights")):
        with pytest.raises(InvalidInput, match=field):
            CliRunner().invoke(app, ["train", *wrong, "--frames", "5"], catch_exceptions=False)
    with pytest.raises(InvalidInput, match="cache: there is no"):
        CliRunner().invoke(app, ["train", "stage3", *given, "--frames", "9"], catch_exceptions=False)

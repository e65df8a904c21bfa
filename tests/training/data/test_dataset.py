"""The stages over shards: real samples in the order of their epochs, whole or in shares."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel
from typer.testing import CliRunner

from omnivideo.cli.main import app
from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.media.read import read_fitted_media
from omnivideo.models.vae import pixels_from_bytes
from omnivideo.models.weights.checkpoint import load, save_library_model
from omnivideo.training.data.batch import MicroBatch
from omnivideo.training.data.batch_sampler import MixConfig
from omnivideo.training.data.dataset import EpochDataset, FlowDataset, Stage1Dataset
from omnivideo.training.data.latent_cache import FrozenEncoders, LatentCache, encode_shards
from omnivideo.training.data.prefetch import Prefetcher
from omnivideo.training.data.sample import SkipReport, TrainingSample
from omnivideo.training.data.visual_targets import embed_frames
from omnivideo.training.data.webdataset import ShardDataset
from omnivideo.training.engine.data_parallel import DataParallelRank, use_rank
from omnivideo.training.engine.recipe import Recipe, step_seed
from omnivideo.training.engine.trainer import Trainer, freeze_except
from omnivideo.training.recipes.flow import build_flow_recipe
from omnivideo.training.recipes.losses import flow_matching_loss
from omnivideo.training.recipes.stage1 import assemble_stage1_recipe
from omnivideo.training.recipes.stage2a import assemble_stage2a_recipe
from omnivideo.training.tiny import visual_encoder
from tests.support.training_samples import make_mp4, make_png
from tests.training.data.test_latent_cache import FIT, library
from tests.training.test_training import operations

SAMPLES = [
    *(TrainingSample("text-to-image", f"a red ball {at}", target=make_png(at, (32, 32))) for at in range(4)),
    TrainingSample("text-to-image", "a wide ball", target=make_png(9, (64, 32))),
    TrainingSample("text-to-video", "a red ball rolls", target=make_mp4(9)),
    TrainingSample("image-editing", "make it blue", make_png(3, (32, 32)), make_png(4, (32, 32))),
    *(TrainingSample("video-editing", f"make it blue {at}", make_mp4(6 + at), make_mp4(8 + at)) for at in range(2)),
    TrainingSample(
        "image-understanding", source=make_png(1, (32, 32)), turns=(("what is it?", "a ball"), ("how many?", "two"))
    ),
]


class Half(DataParallelRank):
    """A share of two, or all, of so many samples that count; conditions are as long as any share's."""

    def __init__(self, rank: int, world: int, whole: int):
        self.rank, self.world_size, self.whole = rank, world, whole

    def global_mean(self, counts: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.whole / self.world_size)

    def global_max(self, length: int) -> int:
        return 120


@pytest.fixture(scope="module")
def made(weights, tmp_path_factory):
    there = library(tmp_path_factory.mktemp("shards"), SAMPLES)
    encode_shards(there, FrozenEncoders.load(weights, "cpu"), FIT, lambda done, count: None)
    return there


def encoder() -> SiglipVisionModel:
    torch.manual_seed(2)
    return SiglipVisionModel(SiglipVisionConfig(**visual_encoder.CONFIG)).eval().requires_grad_(False)


def source(made, weights, name: str = "stage3", embedded: bool = True) -> FlowDataset:
    cache = LatentCache(made.file_store, FrozenEncoders.load(weights, "cpu").compute_digest(FIT))
    mix = MixConfig(task_ratio=None, batch_sizes={"image": 3, "video": 2}, batch_multiple=1)
    return FlowDataset(name, load(weights), made, cache, FIT, mix, encoder() if embedded else None)


def test_an_epoch_has_every_sample_that_is_drawn_once(made, weights):
    one = source(made, weights)
    steps = len(one.batch_sampler.get_epoch_batches(0))
    seen = [one.sample_indices[at] for step in range(steps) for at in one.get_global_batch(step).indices]
    assert sorted(seen) == list(range(9))
    again = [one.sample_indices[at] for step in range(steps, 2 * steps) for at in one.get_global_batch(step).indices]
    assert sorted(again) == sorted(seen) and again != seen
    alone = source(made, weights, "stage2b_generation")
    assert {made.entries[number].task for number in alone.sample_indices} == {"text-to-image", "text-to-video"}


def test_stage1_has_all_six_tasks_with_what_is_drawn_first(made, weights):
    omni = load(weights)
    mix = MixConfig(task_ratio=None, batch_sizes={"image": 3, "video": 2}, batch_multiple=1)
    one = Stage1Dataset(omni, made, FIT, mix, encoder())
    said, seen = set(), []
    for step in range(3 * len(one.batch_sampler.get_epoch_batches(0))):
        tasks = [made.entries[one.sample_indices[at]].task for at in one.get_global_batch(step).indices]
        (lesson,) = one.to_micro_batches(one.load_batch(step))
        words = [omni.mllm_tokenizer.decode(row[row != -100]) for row in lesson.labels]
        drawn = ["<BOV>" if task.endswith("to-video") or task == "video-editing" else "<BOI>" for task in tasks
                 if not task.endswith("understanding")]  # fmt: skip
        assert [word[:5] for word in words[: len(drawn)]] == drawn
        assert lesson.target_pixels.shape == (
            len(drawn),
            3,
            4 if one.get_global_batch(step).bucket.frames > 1 else 1,
            64,
            64,
        )
        said |= set(words[len(drawn) :])
        seen += [one.sample_indices[at] for at in one.get_global_batch(step).indices]
    assert sorted(seen) == sorted(3 * list(range(len(SAMPLES))))
    assert said == {"a ball<|im_end|>", "two<|im_end|>"}


def test_stage1_is_dealt_out_by_what_is_drawn(made, weights):
    """The shares' weights of Eq. 1 are as the whole batch's mean has it."""
    one = Stage1Dataset(
        load(weights),
        made,
        FIT,
        MixConfig(task_ratio=None, batch_sizes={"image": 3, "video": 2}, batch_multiple=1),
        encoder(),
    )
    for step in range(len(one.batch_sampler.get_epoch_batches(0))):
        dealt, (whole,) = [], one.to_micro_batches(one.load_batch(step))
        for rank in range(2):
            with use_rank(Half(rank, 2, len(whole.target_pixels))):
                dealt += one.to_micro_batches(one.load_batch(step))
        assert sum(len(part.target_pixels) for part in dealt) == len(whole.target_pixels)
        assert sum(part.loss_weight for part in dealt) == pytest.approx(2 * bool(len(whole.target_pixels)))
        kept = sum(int((part.labels != -100).sum()) for part in dealt)
        assert kept == int((whole.labels != -100).sum())


def test_rows_are_those_of_the_cache_and_the_models(made, weights):
    one = source(made, weights)
    one.frozen_encoders = None  # it has nothing to do
    for step in range(len(one.batch_sampler.get_epoch_batches(0))):
        numbers = [one.sample_indices[at] for at in one.get_global_batch(step).indices]
        (dealt,) = one.to_micro_batches(one.load_batch(step))
        assert (
            isinstance(dealt, MicroBatch)
            and dealt.loss_weight == 1.0
            and len(dealt.batch) == len(numbers) == dealt.global_size
        )
        rows = dealt.batch
        assert rows.visual_embeddings.shape == (len(numbers), 4, 128) and rows.hidden_states.shape[:1] == (
            len(numbers),
        )
        sources = iter([] if rows.source_latents is None else rows.source_latents)
        for at, number in enumerate(numbers):
            kept = one.cache(made.entries[number])
            assert torch.equal(rows.target_latents[at], kept["target"].float())
            assert torch.equal(rows.unpadded_texts[at], kept["text"].float())
            assert ("source" in kept) == bool(rows.has_source[at])
            frames = one.get_global_batch(step).bucket.frames
            seen = pixels_from_bytes(read_fitted_media(made[number].target, 64, 64, frames, FIT.fps)[None])
            assert torch.allclose(rows.visual_embeddings[at], embed_frames(one.encoder, seen, 4)[0], atol=1e-5)
            if "source" in kept:
                assert torch.equal(next(sources), kept["source"].float())
            assert rows.hidden_states[at, rows.hidden_lengths[at] :].abs().sum() == 0


def test_two_shares_have_the_loss_of_one_also_where_they_are_not_equal(made, weights):
    """A batch of three in parts of two and one, and one of a single sample, which the second share has for nothing."""
    one = source(made, weights)
    recipe = build_flow_recipe("stage3", one.omni, one, steps=9, lr=1e-4, alignment_weight=0.1)
    sizes = set()
    for step in range(len(one.batch_sampler.get_epoch_batches(0))):
        losses = []
        for rank, world in ((0, 1), (0, 2), (1, 2)):
            torch.manual_seed(step)
            with use_rank(Half(rank, world, one.batch_size(step))):
                losses.append(float(recipe.compute_losses(step)["loss"].detach()))
        assert (losses[1] + losses[2]) / 2 == pytest.approx(losses[0], abs=1e-5)
        sizes.add(one.batch_size(step))
    assert {1, 3} <= sizes


def staged(made, weights, name: str, micro: int | None, workers: int = 0) -> tuple[EpochDataset, Recipe]:
    """A stage whose passes have so many samples at the most."""
    if name == "stage1":
        lessons = Stage1Dataset(
            load(weights),
            made,
            FIT,
            MixConfig(task_ratio=None, batch_sizes={"image": 3, "video": 2}, batch_multiple=1),
            encoder(),
        )
        recipe = assemble_stage1_recipe(
            lessons.omni, lessons.encoder, lessons.load_batch, 6, lessons.batch_size, workers, lessons.to_micro_batches
        )
        lessons.micro_batch_size = micro
        return lessons, recipe
    one = source(made, weights, name, embedded=name == "stage3")
    one.micro_batch_size = micro
    if name == "stage2a":
        return one, assemble_stage2a_recipe(one.omni, one, 6, workers)
    return one, build_flow_recipe(name, one.omni, one, 6, 1e-3, 0.1 * (name == "stage3"), workers=workers)


def walked(made, weights, name: str, micro: int | None, folder: Path, workers: int = 0) -> list:
    """Loss and gradients of every step of an epoch."""
    one, recipe = staged(made, weights, name, micro, workers)
    trainer, found = Trainer(recipe, folder), []
    for trainer.step in range(len(one.batch_sampler.get_epoch_batches(0))):
        torch.manual_seed(step_seed(name, trainer.step))
        loss = float(trainer.accumulate_gradients()["loss"])
        gradients = {key: weight.grad for key, weight in trainer.trainable_parameters if weight.grad is not None}
        found.append((loss, gradients))
        recipe.model.zero_grad()
        if micro:
            assert (
                len(recipe.micro_batch_losses(trainer.step)) >= -(-one.batch_size(trainer.step) // micro) - 1
            )  # one may be lost
    return found


@pytest.mark.parametrize("name", ["stage1", "stage2a", "stage2b", "stage3"])
def test_small_passes_have_the_loss_and_gradients_of_one(made, weights, tmp_path, name):
    """Of all of a batch, of single samples, and of two at a time, drawn by another process."""
    whole = walked(made, weights, name, None, tmp_path)
    for some in (walked(made, weights, name, 1, tmp_path), walked(made, weights, name, 2, tmp_path, workers=1)):
        for (loss, gradients), (expected, others) in zip(some, whole, strict=True):
            assert loss == pytest.approx(expected, abs=1e-5)
            assert gradients.keys() == others.keys()
            assert all(torch.allclose(one, others[key], atol=1e-5, rtol=1e-4) for key, one in gradients.items())


def test_checkpointing_in_bf16_has_the_same_losses(made, weights, tmp_path):
    def losses(checkpointing: bool) -> list[float]:
        recipe = replace(staged(made, weights, "stage3", None)[1], precision=torch.bfloat16, optimizer="adamw")
        trainer = Trainer(replace(recipe, checkpointing=checkpointing), tmp_path / str(checkpointing))
        return [trainer.train_step()["loss"] for _ in range(2)]

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)


@pytest.mark.parametrize("name", ["stage1", "stage3"])
def test_an_unreadable_sample_weighs_nothing_in_passes_either(weights, tmp_path, name):
    there = library(tmp_path / "shards", SAMPLES)
    for number in (1, 4, 8):
        damage(there, number)
    whole, some = (walked(there, weights, name, micro, tmp_path / "run") for micro in (None, 1))
    assert [loss for loss, *_ in some] == pytest.approx([loss for loss, *_ in whole], abs=1e-5)
    assert len(there.skip_report.skipped_samples) == 3


@pytest.mark.parametrize(("micro", "each", "altogether"), [(None, 0.05, 0.02), (1, 0.06, 0.04)])
def test_a_steps_operations_are_those_that_torch_counts(made, weights, tmp_path, micro, each, altogether):
    """With the MLLM's, which are done on the way.  (A sample alone whose visual tokens are dropped has no gradients in
    the adapter.)"""
    one, recipe = staged(made, weights, "stage3", micro)
    Trainer(recipe, tmp_path)
    pairs = [
        (operations(recipe, step), recipe.step_flops(step))
        for step in range(len(one.batch_sampler.get_epoch_batches(0)))
    ]
    assert all(found == pytest.approx(counted, rel=each) for counted, found in pairs)
    assert sum(found for _, found in pairs) == pytest.approx(sum(counted for counted, _ in pairs), rel=altogether)


def test_a_run_goes_on_over_the_same_samples_only(made, weights, tmp_path):
    def recipe(data: str = "these"):
        one = source(made, weights, "stage2b", embedded=False)
        fresh = build_flow_recipe("stage2b", one.omni, one, steps=4, lr=1e-3, alignment_weight=0.0)
        fresh.data_digest = data
        return fresh

    def logged(name: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    Trainer(recipe(), tmp_path / "whole").run()
    Trainer(recipe(), tmp_path / "cut").run(stop_at_step=2)
    Trainer(recipe(), tmp_path / "cut").run()
    assert logged("cut") == pytest.approx(logged("whole"), abs=1e-6) and len(logged("cut")) == 4
    with pytest.raises(CheckpointError, match="data: the checkpoint was made with other samples"):
        Trainer(recipe("others"), tmp_path / "cut")


def test_a_run_does_not_go_on_over_another_library_of_the_same_shapes(made, weights, tmp_path):
    other = library(tmp_path / "other", [replace(SAMPLES[0], target=make_png(40, (32, 32))), *SAMPLES[1:]])
    encode_shards(other, FrozenEncoders.load(weights, "cpu"), FIT, lambda done, count: None)
    given = ["train", "stage2a", "--weights", str(weights), "--runs", str(tmp_path), "--size", "64x64", "--frames", "5"]
    ran = CliRunner().invoke(
        app, [*given, "--stop-at-step", "1", "--data", str(made.file_store.folder)], catch_exceptions=False
    )
    assert ran.exit_code == 0
    with pytest.raises(CheckpointError, match="data: the checkpoint was made with other samples"):
        CliRunner().invoke(app, [*given, "--data", str(tmp_path / "other")], catch_exceptions=False)


def test_the_digest_is_over_the_samples_and_what_they_are_brought_to(made):
    mix = MixConfig(task_ratio=None, batch_sizes={"image": 3, "video": 2}, batch_multiple=1)
    one, slower = (EpochDataset("some", made, fit, mix, lambda entry: True) for fit in (FIT, replace(FIT, fps=7.9)))
    assert (
        slower.batch_sampler.compute_digest() == one.batch_sampler.compute_digest()
        and slower.compute_digest() != one.compute_digest()
    )
    again = ShardDataset(made.file_store, SkipReport())
    assert EpochDataset("some", again, FIT, mix, lambda entry: True).compute_digest() == one.compute_digest()


def test_the_command_trains_over_shards(made, weights, tmp_path):
    save_library_model(encoder(), weights / "visual_encoder", torch.float16)
    given = [
        "--data",
        str(made.file_store.folder),
        "--weights",
        str(weights),
        "--runs",
        str(tmp_path),
        "--size",
        "64x64",
    ]
    for stage in ("stage1", "stage2a", "stage2b", "stage3"):
        ran = CliRunner().invoke(app, ["train", stage, *given, "--frames", "5", "--steps", "2"], catch_exceptions=False)
        assert ran.exit_code == 0 and (tmp_path / stage / "state.pt").exists()
    asked = ["--stills", "2", "--ratio", "text-to-image=1", "--micro-batch-size", "1"]
    asked += ["--runs", str(tmp_path / "asked")]
    ran = CliRunner().invoke(app, ["train", "stage3", *given, *asked, "--frames", "5", "--steps", "3"])
    lines = (tmp_path / "asked" / "stage3" / "log.jsonl").read_text().splitlines()
    assert ran.exit_code == 0 and [set(json.loads(line)) for line in lines] == 3 * [
        {"step", "loss", "vision", "stills"}
    ]
    looked = CliRunner().invoke(app, ["data", "inspect", given[1], "--frames", "5", *asked[:4]])
    assert "5 samples in 3 steps, 0.00% of 1 ranks' work wasted" in looked.output
    seeds = ["--seed", "1", "--seed", "2"]
    wrongs = (
        (["decoder", *given], "recipe"), (["stage3", *given[:2]], "weights"),
        (["stage3", "--micro-batch-size", "1"], "data"),
        (["stage3", *given, *seeds], "seed"),
    )  # fmt: skip
    for wrong, field in wrongs:
        with pytest.raises(InvalidInput, match=field):
            CliRunner().invoke(app, ["train", *wrong, "--frames", "5"], catch_exceptions=False)


# ---------------------------------------------------------------- without a cache


@pytest.mark.parametrize("kept", [0, 1])
def test_what_is_not_in_the_cache_is_computed_as_the_cache_has_it(made, weights, tmp_path, monkeypatch, kept):
    """Of three shards, so many are encoded."""
    monkeypatch.setattr("omnivideo.training.data.webdataset.MAX_SHARD_SAMPLES", 4)
    some = library(tmp_path, SAMPLES)
    encode_shards(some, FrozenEncoders.load(weights, "cpu"), FIT, lambda done, count: None)
    for path in sorted(tmp_path.glob("*.safetensors"))[kept:]:
        path.unlink()
    cached, bare = source(made, weights), source(some, weights)
    assert cached.batch_sampler.compute_digest() == bare.batch_sampler.compute_digest()
    recipes = [
        build_flow_recipe("stage3", one.omni, one, steps=9, lr=1e-4, alignment_weight=0.1) for one in (cached, bare)
    ]
    computed = []
    monkeypatch.setattr(
        bare.frozen_encoders,
        "encode_latents",
        lambda pixels, make=bare.frozen_encoders.encode_latents: computed.append(len(pixels)) or make(pixels),
    )
    for step in range(len(bare.batch_sampler.get_epoch_batches(0))):
        one, two = (each.to_micro_batches(each.load_batch(step))[0].batch for each in (cached, bare))
        for name in ("target_latents", "source_latents", "text_embeddings", "hidden_states", "visual_embeddings"):
            first, second = getattr(one, name), getattr(two, name)
            assert first is second is None or torch.allclose(first, second, atol=2e-3, rtol=2e-3)
        assert torch.equal(one.has_source, two.has_source) and one.text_lengths == two.text_lengths
        losses = []
        for recipe in recipes:
            torch.manual_seed(step)
            losses.append(float(recipe.compute_losses(step)["loss"].detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert sum(computed) == 2 * (12 - 4 * kept)  # 12 sources and targets, 4 of them in the first shard; asked for twice


def test_worker_processes_hand_over_the_same_rows(made, weights, tmp_path):
    bare = source(library(tmp_path, SAMPLES), weights)
    alone, ahead = bare.load_batch, Prefetcher(bare.load_batch, 2)
    for step in range(3):
        one, two = (bare.to_micro_batches(draw(step))[0].batch for draw in (alone, ahead))
        assert torch.equal(one.target_latents, two.target_latents) and torch.equal(one.hidden_states, two.hidden_states)


# ---------------------------------------------------------------- what cannot be read


def damage(there: ShardDataset, number: int) -> str:
    """Overwrites a sample's target in its shard, which keeps its size; returns its name."""
    entry = there.entries[number]
    name = next(name for name in entry.members if name.startswith("target"))
    offset, length = entry.members[name]
    with (there.file_store.folder / entry.shard).open("r+b") as file:
        file.seek(offset)
        file.write(b"x" * length)
    return f"{entry.shard}/{entry.key}"


@pytest.mark.parametrize("left", [0, 4, 200, -100])
def test_a_damaged_cache_is_named_and_its_samples_are_left_out(weights, tmp_path, monkeypatch, left):
    """Cut so that nothing, half of a length, of the header or of the tensors is left."""
    monkeypatch.setattr("omnivideo.training.data.webdataset.MAX_SHARD_SAMPLES", 4)
    there = library(tmp_path, SAMPLES)
    encode_shards(there, FrozenEncoders.load(weights, "cpu"), FIT, lambda done, count: None)
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:left])
    one = source(there, weights, "stage2b", embedded=False)
    kept = [
        part.counted_rows
        for step in range(len(one.batch_sampler.get_epoch_batches(0)))
        for part in one.load_batch(step)[0]
    ]
    for step in range(len(one.batch_sampler.get_epoch_batches(0))):
        one.to_micro_batches(one.load_batch(step))
    assert 5 <= sum(kept) < 9 and len(there.skip_report.skipped_samples) == 9 - sum(kept)
    assert all("cache: 00000." in what and "is damaged" in what for _, _, what in there.skip_report.skipped_samples)


@pytest.mark.parametrize("cached", [True, False])
def test_an_unreadable_sample_weighs_nothing_in_its_batch(weights, tmp_path, monkeypatch, cached):
    there, found = library(tmp_path, SAMPLES), list[torch.Tensor]()
    if cached:
        encode_shards(there, FrozenEncoders.load(weights, "cpu"), FIT, lambda done, count: None)

    def flow(*given, **more):
        found.append(flow_matching_loss(*given, **more))
        return found[-1]

    monkeypatch.setattr("omnivideo.training.recipes.flow.flow_matching_loss", flow)
    one = source(there, weights, "stage2b", embedded=False)
    recipe = build_flow_recipe("stage2b", one.omni, one, steps=9, lr=1e-4, alignment_weight=0.0)
    freeze_except(recipe.model, recipe.trainable)

    def loss(step: int) -> torch.Tensor:
        torch.manual_seed(step)
        return recipe.compute_losses(step)["loss"]

    sizes = [one.batch_size(step) for step in range(4)]
    among, alone = sizes.index(3), sizes.index(1)
    loss(among)
    first, _, third = found[0].tolist()
    gone = [one.sample_indices[one.get_global_batch(step).indices[at]] for step, at in ((among, 1), (alone, 0))]
    named = [damage(there, number) for number in gone]
    assert float(loss(among).detach()) == pytest.approx((first + third) / 2, abs=1e-5)
    nothing = loss(alone)
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert all(part.grad is None or not part.grad.any() for part in recipe.model.parameters())
    loss(among)  # as in the next epoch
    assert [where for _, where, _ in there.skip_report.skipped_samples] == named


def test_an_unreadable_sample_is_left_out_of_a_lesson(weights, tmp_path):
    there = library(tmp_path, SAMPLES)
    one = Stage1Dataset(
        load(weights),
        there,
        FIT,
        MixConfig(task_ratio=None, batch_sizes={"image": 3, "video": 2}, batch_multiple=1),
        encoder(),
    )
    recipe = assemble_stage1_recipe(
        one.omni, one.encoder, one.load_batch, 9, one.batch_size, to_micro_batches=one.to_micro_batches
    )
    steps = len(one.batch_sampler.get_epoch_batches(0))
    whole = [one.to_micro_batches(one.load_batch(step))[0] for step in range(steps)]
    named = {number: damage(there, number) for number in (1, 4)}
    for step in range(steps):
        numbers = [one.sample_indices[at] for at in one.get_global_batch(step).indices]
        (left,), lost = one.to_micro_batches(one.load_batch(step)), len(named.keys() & set(numbers))
        assert len(left.target_pixels) == len(whole[step].target_pixels) - lost
        losses = recipe.compute_losses(step)
        if lost == len(numbers):
            assert float(losses["loss"].detach()) == 0 == left.loss_weight
        else:
            assert len(left.labels) == len(numbers) - lost and float(losses["loss"].detach()) > 0
    assert sorted(where for _, where, _ in there.skip_report.skipped_samples) == sorted(named.values())


def test_the_command_says_what_it_does_not_use(made, weights, tmp_path):
    short = TrainingSample("text-to-video", "too short", target=make_mp4(2))
    there = library(tmp_path / "shards", [*SAMPLES, short])
    named = damage(there, 1)
    shutil.copy(tmp_path / "shards" / "00000.tar", tmp_path / "shards" / "00001.tar")
    with (tmp_path / "shards" / "00001.tar").open("r+b") as file:
        file.truncate(there.entries[3].members["json"][0] + 10)
    report = tmp_path / "report.jsonl"
    ran = CliRunner().invoke(
        app,
        [
            "train",
            "stage2b",
            "--data",
            str(there.file_store.folder),
            "--weights",
            str(weights),
            "--runs",
            str(tmp_path),
            "--size",
            "64x64",
            "--frames",
            "5",
            "--steps",
            "8",
            "--workers",
            "2",
            "--report",
            str(report),
        ],
        catch_exceptions=False,
    )
    assert ran.exit_code == 0
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    kinds = {row["where"]: row["kind"] for row in rows}
    assert kinds[named] == "unreadable media" and kinds["00000.tar/000000010"] == "wrong record"
    assert kinds["00001.tar"] == "broken shard" and kinds["00001.tar/000000001"] == "unreadable media"
    assert len(rows) == len(kinds)  # each once
    said = ran.stderr.split("skipped, ")
    assert any(line.startswith("wrong record: 1, the first 00000.tar/000000010: frames") for line in said)

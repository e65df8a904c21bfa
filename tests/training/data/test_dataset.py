"""The data of the stages over shards: the samples of an epoch in order, on one rank or two."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from omnivideo.cli.main import app
from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.media.read import read_fitted_media
from omnivideo.models.vae import pixels_from_bytes
from omnivideo.models.weights.checkpoint import load, save_library_model
from omnivideo.training.data.batch import MicroBatch
from omnivideo.training.data.batch_sampler import MixConfig
from omnivideo.training.data.dataset import EpochDataset, Stage1Dataset
from omnivideo.training.data.latent_cache import FrozenEncoders, encode_shards
from omnivideo.training.data.sample import SkipReport
from omnivideo.training.data.webdataset import ShardDataset
from omnivideo.training.engine.data_parallel import use_rank
from omnivideo.training.engine.trainer import Trainer
from omnivideo.training.recipes.flow import build_flow_recipe
from omnivideo.training.recipes.losses import embed_frames
from tests.support.recipes import count_flops, read_losses
from tests.support.shards import (
    ASSIGNER,
    SAMPLES,
    HalfRank,
    build_stage,
    damage_target,
    make_flow_dataset,
    make_stage1_dataset,
    make_visual_encoder,
    run_epoch,
    write_dataset,
)
from tests.support.training_samples import make_png


def test_an_epoch_has_every_generated_sample_once(encoded_dataset, weights):
    one = make_flow_dataset(encoded_dataset, weights)
    steps = len(one.batch_sampler.get_epoch_batches(0))
    seen = [one.sample_indices[at] for step in range(steps) for at in one.get_global_batch(step).indices]
    assert sorted(seen) == list(range(9))
    again = [one.sample_indices[at] for step in range(steps, 2 * steps) for at in one.get_global_batch(step).indices]
    assert sorted(again) == sorted(seen) and again != seen
    alone = make_flow_dataset(encoded_dataset, weights, "stage2b_generation")
    assert {encoded_dataset.entries[number].task for number in alone.sample_indices} == {
        "text-to-image",
        "text-to-video",
    }


def test_stage1_has_all_six_tasks_with_generation_first(encoded_dataset, weights):
    omni = load(weights)
    mix = MixConfig(task_ratio=None, batch_sizes={"image": 3, "video": 2}, batch_multiple=1)
    one = Stage1Dataset(omni, encoded_dataset, ASSIGNER, mix, make_visual_encoder())
    said, seen = set(), []
    for step in range(3 * len(one.batch_sampler.get_epoch_batches(0))):
        tasks = [encoded_dataset.entries[one.sample_indices[at]].task for at in one.get_global_batch(step).indices]
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


def test_stage1_is_split_by_its_generated_samples(encoded_dataset, weights):
    """The weights of the parts in Eq. 1 give the mean over the whole batch."""
    one = make_stage1_dataset(encoded_dataset, weights)
    for step in range(len(one.batch_sampler.get_epoch_batches(0))):
        dealt, (whole,) = [], one.to_micro_batches(one.load_batch(step))
        for rank in range(2):
            with use_rank(HalfRank(rank, 2, len(whole.target_pixels))):
                dealt += one.to_micro_batches(one.load_batch(step))
        assert sum(len(part.target_pixels) for part in dealt) == len(whole.target_pixels)
        assert sum(part.loss_weight for part in dealt) == pytest.approx(2 * bool(len(whole.target_pixels)))
        kept = sum(int((part.labels != -100).sum()) for part in dealt)
        assert kept == int((whole.labels != -100).sum())


def test_rows_agree_with_the_cache_and_the_models(encoded_dataset, weights):
    one = make_flow_dataset(encoded_dataset, weights)
    one.frozen_encoders = None  # everything is cached
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
            kept = one.cache(encoded_dataset.entries[number])
            assert torch.equal(rows.target_latents[at], kept["target"].float())
            assert torch.equal(rows.unpadded_texts[at], kept["text"].float())
            assert ("source" in kept) == bool(rows.has_source[at])
            frames = one.get_global_batch(step).bucket.frames
            seen = pixels_from_bytes(
                read_fitted_media(encoded_dataset[number].target, 64, 64, frames, ASSIGNER.fps)[None]
            )
            assert torch.allclose(rows.visual_embeddings[at], embed_frames(one.encoder, seen, 4)[0], atol=1e-5)
            if "source" in kept:
                assert torch.equal(next(sources), kept["source"].float())
            assert rows.hidden_states[at, rows.hidden_lengths[at] :].abs().sum() == 0


def test_two_ranks_have_the_loss_of_one_even_with_unequal_parts(encoded_dataset, weights):
    """A batch of three is split into two and one; a batch of one leaves the second rank without a counted sample."""
    one = make_flow_dataset(encoded_dataset, weights)
    recipe = build_flow_recipe("stage3", one.omni, one, steps=9, lr=1e-4, alignment_weight=0.1)
    sizes = set()
    for step in range(len(one.batch_sampler.get_epoch_batches(0))):
        losses = []
        for rank, world in ((0, 1), (0, 2), (1, 2)):
            torch.manual_seed(step)
            with use_rank(HalfRank(rank, world, one.batch_size(step))):
                losses.append(float(recipe.compute_losses(step)["loss"].detach()))
        assert (losses[1] + losses[2]) / 2 == pytest.approx(losses[0], abs=1e-5)
        sizes.add(one.batch_size(step))
    assert {1, 3} <= sizes


@pytest.mark.parametrize("name", ["stage1", "stage2a", "stage2b", "stage3"])
def test_micro_batches_have_the_loss_and_gradients_of_the_whole_batch(encoded_dataset, weights, tmp_path, name):
    """Compare a whole batch with micro-batches of one sample, and of two samples from a worker process."""
    whole = run_epoch(encoded_dataset, weights, name, None, tmp_path)
    for some in (
        run_epoch(encoded_dataset, weights, name, 1, tmp_path),
        run_epoch(encoded_dataset, weights, name, 2, tmp_path, workers=1),
    ):
        for (loss, gradients), (expected, others) in zip(some, whole, strict=True):
            assert loss == pytest.approx(expected, abs=1e-5)
            assert gradients.keys() == others.keys()
            assert all(torch.allclose(one, others[key], atol=1e-5, rtol=1e-4) for key, one in gradients.items())


def test_checkpointing_in_bf16_has_the_same_losses(encoded_dataset, weights, tmp_path):
    def losses(checkpointing: bool) -> list[float]:
        recipe = replace(
            build_stage(encoded_dataset, weights, "stage3", None)[1], precision=torch.bfloat16, optimizer="adamw"
        )
        trainer = Trainer(replace(recipe, checkpointing=checkpointing), tmp_path / str(checkpointing))
        return [trainer.train_step()["loss"] for _ in range(2)]

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)


@pytest.mark.parametrize("name", ["stage1", "stage3"])
def test_an_unreadable_sample_has_no_weight_in_micro_batches(weights, tmp_path, name):
    there = write_dataset(tmp_path / "shards", SAMPLES)
    for number in (1, 4, 8):
        damage_target(there, number)
    whole, some = (run_epoch(there, weights, name, micro, tmp_path / "run") for micro in (None, 1))
    assert [loss for loss, *_ in some] == pytest.approx([loss for loss, *_ in whole], abs=1e-5)
    assert len(there.skip_report.skipped_samples) == 3


@pytest.mark.parametrize(("micro", "each", "altogether"), [(None, 0.05, 0.02), (1, 0.06, 0.04)])
def test_the_flops_of_a_step_agree_with_torchs_counter(encoded_dataset, weights, tmp_path, micro, each, altogether):
    """Include the FLOPs of the MLLM, which runs during the step.

    A micro-batch of one sample whose visual tokens are dropped has no gradients in the adapter.
    """
    one, recipe = build_stage(encoded_dataset, weights, "stage3", micro)
    Trainer(recipe, tmp_path)
    pairs = [
        (count_flops(recipe, step), recipe.step_flops(step))
        for step in range(len(one.batch_sampler.get_epoch_batches(0)))
    ]
    assert all(found == pytest.approx(counted, rel=each) for counted, found in pairs)
    assert sum(found for _, found in pairs) == pytest.approx(sum(counted for counted, _ in pairs), rel=altogether)


def test_a_run_resumes_with_the_same_samples_only(encoded_dataset, weights, tmp_path):
    def recipe(data: str = "these"):
        one = make_flow_dataset(encoded_dataset, weights, "stage2b", embedded=False)
        fresh = build_flow_recipe("stage2b", one.omni, one, steps=4, lr=1e-3, alignment_weight=0.0)
        fresh.data_digest = data
        return fresh

    Trainer(recipe(), tmp_path / "uninterrupted").run()
    Trainer(recipe(), tmp_path / "resumed").run(stop_at_step=2)
    Trainer(recipe(), tmp_path / "resumed").run()
    losses = read_losses(tmp_path / "resumed")
    assert losses == pytest.approx(read_losses(tmp_path / "uninterrupted"), abs=1e-6) and len(losses) == 4
    with pytest.raises(CheckpointError, match="data: the checkpoint was made with other samples"):
        Trainer(recipe("others"), tmp_path / "resumed")


def test_a_run_does_not_resume_with_another_dataset_of_the_same_shapes(encoded_dataset, weights, tmp_path):
    other = write_dataset(tmp_path / "other", [replace(SAMPLES[0], target=make_png(40, (32, 32))), *SAMPLES[1:]])
    encode_shards(other, FrozenEncoders.load(weights, "cpu"), ASSIGNER, lambda done, count: None)
    given = ["train", "stage2a", "--weights", str(weights), "--runs", str(tmp_path), "--size", "64x64", "--frames", "5"]
    ran = CliRunner().invoke(
        app, [*given, "--stop-at-step", "1", "--data", str(encoded_dataset.file_store.folder)], catch_exceptions=False
    )
    assert ran.exit_code == 0
    with pytest.raises(CheckpointError, match="data: the checkpoint was made with other samples"):
        CliRunner().invoke(app, [*given, "--data", str(tmp_path / "other")], catch_exceptions=False)


def test_the_digest_covers_the_samples_and_their_buckets(encoded_dataset):
    mix = MixConfig(task_ratio=None, batch_sizes={"image": 3, "video": 2}, batch_multiple=1)
    one, slower = (
        EpochDataset("some", encoded_dataset, fit, mix, lambda entry: True)
        for fit in (ASSIGNER, replace(ASSIGNER, fps=7.9))
    )
    assert (
        slower.batch_sampler.compute_digest() == one.batch_sampler.compute_digest()
        and slower.compute_digest() != one.compute_digest()
    )
    again = ShardDataset(encoded_dataset.file_store, SkipReport())
    assert EpochDataset("some", again, ASSIGNER, mix, lambda entry: True).compute_digest() == one.compute_digest()


def test_the_command_trains_over_shards(encoded_dataset, weights, tmp_path_factory, tmp_path):
    weights = shutil.copytree(weights, tmp_path_factory.mktemp("weights") / "tiny")
    save_library_model(make_visual_encoder(), weights / "visual_encoder", torch.float16)
    given = [
        "--data",
        str(encoded_dataset.file_store.folder),
        "--weights",
        str(weights),
        "--runs",
        str(tmp_path),
        "--size",
        "64x64",
    ]
    few = ["--stills", "8", "--clips", "4", "--frames", "5", "--steps", "2"]
    for stage in ("stage1", "stage2a", "stage2b", "stage3"):
        ran = CliRunner().invoke(app, ["train", stage, *given, *few], catch_exceptions=False)
        assert ran.exit_code == 0 and (tmp_path / stage / "state.pt").exists()
    asked = ["--stills", "2", "--ratio", "text-to-image=1", "--micro-batch-size", "1"]
    asked += ["--runs", str(tmp_path / "asked")]
    ran = CliRunner().invoke(app, ["train", "stage3", *given, *asked, "--frames", "5", "--steps", "3"])
    lines = (tmp_path / "asked" / "stage3" / "log.jsonl").read_text().splitlines()
    assert ran.exit_code == 0 and [set(json.loads(line)) for line in lines] == 3 * [
        {"step", "loss", "vision", "stills"}
    ]
    looked = CliRunner().invoke(app, ["data", "inspect", given[1], "--frames", "5", *asked[:4]])
    assert "5 samples in 3 steps, 0.00% of the work of 1 ranks wasted" in looked.output
    seeds = ["--seed", "1", "--seed", "2"]
    wrongs = (
        (["decoder", *given], "recipe"), (["stage3", *given[:2]], "weights"),
        (["stage3", "--micro-batch-size", "1"], "data"),
        (["stage3", *given, *seeds], "seed"),
    )  # fmt: skip
    for wrong, field in wrongs:
        with pytest.raises(InvalidInput, match=field):
            CliRunner().invoke(app, ["train", *wrong, "--frames", "5"], catch_exceptions=False)

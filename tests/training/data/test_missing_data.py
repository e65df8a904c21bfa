"""Samples that are not cached are encoded during training; unreadable samples are reported and left out."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from omnivideo.cli.main import app
from omnivideo.training.data.latent_cache import FrozenEncoders, encode_shards
from omnivideo.training.data.prefetch import Prefetcher
from omnivideo.training.data.sample import TrainingSample
from omnivideo.training.engine.trainer import freeze_except
from omnivideo.training.recipes.flow import build_flow_recipe
from omnivideo.training.recipes.losses import flow_matching_loss
from omnivideo.training.recipes.stage1 import assemble_stage1_recipe
from tests.support.shards import (
    ASSIGNER,
    SAMPLES,
    damage_target,
    make_flow_dataset,
    make_stage1_dataset,
    write_dataset,
)
from tests.support.training_samples import make_mp4


@pytest.mark.parametrize("kept", [0, 1])
def test_uncached_samples_are_encoded_with_the_same_values(encoded_dataset, weights, tmp_path, monkeypatch, kept):
    """Of three shards, `kept` have their cache."""
    monkeypatch.setattr("omnivideo.training.data.webdataset.MAX_SHARD_SAMPLES", 4)
    some = write_dataset(tmp_path, SAMPLES)
    encode_shards(some, FrozenEncoders.load(weights, "cpu"), ASSIGNER, lambda done, count: None)
    for path in sorted(tmp_path.glob("*.safetensors"))[kept:]:
        path.unlink()
    cached, bare = make_flow_dataset(encoded_dataset, weights), make_flow_dataset(some, weights)
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
    assert sum(computed) == 2 * (12 - 4 * kept)  # of 12 sources and targets, the first shard has 4; two passes


def test_worker_processes_return_the_same_rows(encoded_dataset, weights, tmp_path):
    bare = make_flow_dataset(write_dataset(tmp_path, SAMPLES), weights)
    alone, ahead = bare.load_batch, Prefetcher(bare.load_batch, 2)
    for step in range(3):
        one, two = (bare.to_micro_batches(draw(step))[0].batch for draw in (alone, ahead))
        assert torch.equal(one.target_latents, two.target_latents) and torch.equal(one.hidden_states, two.hidden_states)


@pytest.mark.parametrize("left", [0, 4, 200, -100])
def test_a_damaged_cache_is_reported_and_its_samples_are_left_out(weights, tmp_path, monkeypatch, left):
    """Truncate the file to nothing, within its length field, within its header, and within its tensors."""
    monkeypatch.setattr("omnivideo.training.data.webdataset.MAX_SHARD_SAMPLES", 4)
    dataset = write_dataset(tmp_path, SAMPLES)
    encode_shards(dataset, FrozenEncoders.load(weights, "cpu"), ASSIGNER, lambda done, count: None)
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:left])
    one = make_flow_dataset(dataset, weights, "stage2b", embedded=False)
    kept = [
        part.counted_rows
        for step in range(len(one.batch_sampler.get_epoch_batches(0)))
        for part in one.load_batch(step)[0]
    ]
    for step in range(len(one.batch_sampler.get_epoch_batches(0))):
        one.to_micro_batches(one.load_batch(step))
    assert 5 <= sum(kept) < 9 and len(dataset.skip_report.skipped_samples) == 9 - sum(kept)
    assert all("cache: 00000." in what and "is damaged" in what for _, _, what in dataset.skip_report.skipped_samples)


@pytest.mark.parametrize("cached", [True, False])
def test_an_unreadable_sample_has_no_weight_in_its_batch(weights, tmp_path, monkeypatch, cached):
    dataset, found = write_dataset(tmp_path, SAMPLES), list[torch.Tensor]()
    if cached:
        encode_shards(dataset, FrozenEncoders.load(weights, "cpu"), ASSIGNER, lambda done, count: None)

    def record_loss(*arguments, **keywords):
        found.append(flow_matching_loss(*arguments, **keywords))
        return found[-1]

    monkeypatch.setattr("omnivideo.training.recipes.flow.flow_matching_loss", record_loss)
    one = make_flow_dataset(dataset, weights, "stage2b", embedded=False)
    recipe = build_flow_recipe("stage2b", one.omni, one, steps=9, lr=1e-4, alignment_weight=0.0)
    freeze_except(recipe.model, recipe.trainable)

    def compute_loss(step: int) -> torch.Tensor:
        torch.manual_seed(step)
        return recipe.compute_losses(step)["loss"]

    sizes = [one.batch_size(step) for step in range(4)]
    among, alone = sizes.index(3), sizes.index(1)
    compute_loss(among)
    first, _, third = found[0].tolist()
    damaged_numbers = [
        one.sample_indices[one.get_global_batch(step).indices[at]] for step, at in ((among, 1), (alone, 0))
    ]
    locations = [damage_target(dataset, number) for number in damaged_numbers]
    assert float(compute_loss(among).detach()) == pytest.approx((first + third) / 2, abs=1e-5)
    nothing = compute_loss(alone)
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert all(part.grad is None or not part.grad.any() for part in recipe.model.parameters())
    compute_loss(among)  # as the next epoch does
    assert [where for _, where, _ in dataset.skip_report.skipped_samples] == locations


def test_an_unreadable_sample_is_left_out_of_stage_1(weights, tmp_path):
    dataset = write_dataset(tmp_path, SAMPLES)
    one = make_stage1_dataset(dataset, weights)
    recipe = assemble_stage1_recipe(
        one.omni, one.encoder, one.load_batch, 9, one.batch_size, to_micro_batches=one.to_micro_batches
    )
    steps = len(one.batch_sampler.get_epoch_batches(0))
    whole = [one.to_micro_batches(one.load_batch(step))[0] for step in range(steps)]
    locations = {number: damage_target(dataset, number) for number in (1, 4)}
    for step in range(steps):
        numbers = [one.sample_indices[at] for at in one.get_global_batch(step).indices]
        (left,), lost = one.to_micro_batches(one.load_batch(step)), len(locations.keys() & set(numbers))
        assert len(left.target_pixels) == len(whole[step].target_pixels) - lost
        losses = recipe.compute_losses(step)
        if lost == len(numbers):
            assert float(losses["loss"].detach()) == 0 == left.loss_weight
        else:
            assert len(left.labels) == len(numbers) - lost and float(losses["loss"].detach()) > 0
    assert sorted(where for _, where, _ in dataset.skip_report.skipped_samples) == sorted(locations.values())


def test_the_command_reports_skipped_samples(encoded_dataset, weights, tmp_path):
    short = TrainingSample("text-to-video", "too short", target=make_mp4(2))
    dataset = write_dataset(tmp_path / "shards", [*SAMPLES, short])
    locations = damage_target(dataset, 1)
    shutil.copy(tmp_path / "shards" / "00000.tar", tmp_path / "shards" / "00001.tar")
    with (tmp_path / "shards" / "00001.tar").open("r+b") as file:
        file.truncate(dataset.entries[3].members["json"][0] + 10)
    report = tmp_path / "report.jsonl"
    ran = CliRunner().invoke(
        app,
        [
            "train",
            "stage2b",
            "--data",
            str(dataset.file_store.folder),
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
    assert kinds[locations] == "unreadable media" and kinds["00000.tar/000000010"] == "wrong record"
    assert kinds["00001.tar"] == "broken shard" and kinds["00001.tar/000000001"] == "unreadable media"
    assert len(rows) == len(kinds)  # each is reported once
    said = ran.stderr.split("skipped, ")
    assert any(line.startswith("wrong record: 1, the first 00000.tar/000000010: frames") for line in said)

"""Latents and text states beside the shards: the models' own, made once, found by sample."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from omnivideo.cli.main import app
from omnivideo.media.read import read_fitted_media
from omnivideo.models.vae import encode_pixels, pixels_from_bytes
from omnivideo.training.data.batch_sampler import MixConfig
from omnivideo.training.data.latent_cache import (
    BucketAssigner,
    FrozenEncoders,
    LatentCache,
    build_batch_sampler,
    cache_name,
    encode_shards,
)
from omnivideo.training.data.sample import TRAINING_LIMITS, TrainingSample
from tests.support.shards import ASSIGNER, write_dataset
from tests.support.training_samples import make_mp4, make_png, make_samples


@pytest.fixture(scope="module")
def frozen(weights):
    return FrozenEncoders.load(weights, "cpu")


def test_the_cache_holds_what_the_models_give(frozen, tmp_path):
    made = write_dataset(tmp_path, make_samples())
    told = []
    assert encode_shards(made, frozen, ASSIGNER, lambda done, count: told.append((done, count))) == 4
    assert told[-1] == (4, 4)
    cache = LatentCache(made.file_store, frozen.compute_digest(ASSIGNER))
    found = cache(made.entries[5])
    with torch.no_grad():
        pixels = pixels_from_bytes(read_fitted_media(make_mp4(7), 64, 64, 5, ASSIGNER.fps, TRAINING_LIMITS)[None])
        assert torch.allclose(found["target"].float(), encode_pixels(frozen.vae, pixels)[0], atol=2e-2, rtol=1e-2)
    assert found["source"].shape == found["target"].shape == (16, 2, 8, 8)
    assert torch.equal(found["text"], frozen.encode_prompt(made[5].text))
    assert set(cache(made.entries[2])) == {"text", "target"}
    assert not cache(made.entries[0])  # understanding: the MLLM sees its pixels


def test_what_is_done_is_not_done_again_and_other_buckets_are_another_cache(frozen, tmp_path, monkeypatch):
    monkeypatch.setattr("omnivideo.training.data.webdataset.MAX_SHARD_SAMPLES", 1)
    made = write_dataset(
        tmp_path, [TrainingSample("text-to-image", f"ball {at}", target=make_png(at)) for at in range(3)]
    )
    encode_shards(made, frozen, ASSIGNER, lambda done, count: None)
    (tmp_path / cache_name("00001.tar", frozen.compute_digest(ASSIGNER))).unlink()  # as a killed run leaves it
    assert encode_shards(made, frozen, ASSIGNER, lambda done, count: None) == 1
    assert encode_shards(made, frozen, ASSIGNER, lambda done, count: None) == 0
    other = BucketAssigner(ASSIGNER.buckets, fps=12)
    assert frozen.compute_digest(other) != frozen.compute_digest(ASSIGNER)
    assert LatentCache(made.file_store, frozen.compute_digest(ASSIGNER))(made.entries[0])
    assert not LatentCache(made.file_store, frozen.compute_digest(other))(made.entries[0])


def test_what_cannot_be_encoded_is_named_and_the_rest_goes_on(frozen, tmp_path):
    long = TrainingSample("text-to-image", "ball " * 500, target=make_png(1))
    short = TrainingSample("text-to-video", "ball", target=make_mp4(2))
    made = write_dataset(tmp_path, [long, short, TrainingSample("text-to-image", "ball", target=make_png(2))])
    encode_shards(made, frozen, ASSIGNER, lambda done, count: None)
    assert [where for _, where, _ in made.skip_report.skipped_samples] == ["00000.tar/000000001", "00000.tar/000000000"]
    assert LatentCache(made.file_store, frozen.compute_digest(ASSIGNER))(made.entries[2])["target"].shape[0] == 16


def test_the_command_encodes_and_says_under_which_name(weights, frozen, tmp_path):
    made = write_dataset(tmp_path, make_samples())
    given = ["data", "encode", str(tmp_path), "--weights", str(weights), "--frames", "5"]
    ran = CliRunner().invoke(app, given, catch_exceptions=False)
    digest = frozen.compute_digest(ASSIGNER)
    assert f"4 samples encoded; cache {digest}" in ran.output
    assert LatentCache(made.file_store, digest)(made.entries[4])["source"].shape == (
        16,
        1,
        6,
        12,
    )  # 2 : 1, as the picture
    assert "0 samples encoded" in CliRunner().invoke(app, given, catch_exceptions=False).output


def test_a_library_is_walked_in_batches(tmp_path):
    made = write_dataset(tmp_path, [*make_samples(), TrainingSample("text-to-video", "too short", target=make_mp4(2))])
    order, numbers = build_batch_sampler(
        made, ASSIGNER, MixConfig(task_ratio=None, batch_sizes={"image": 2, "video": 2}, batch_multiple=1)
    )
    seen = np.concatenate([batch.indices for batch in order.get_epoch_batches(0)])
    assert sorted(numbers[at] for at in seen) == [0, 1, 2, 3, 4, 5]
    assert made.skip_report.count_by_kind() == {"wrong record": 1}

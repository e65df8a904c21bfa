"""Latents and text embeddings beside the shards: computed once by the models, and found by sample."""

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
def encoders(weights):
    return FrozenEncoders.load(weights, "cpu")


def test_the_cache_has_the_outputs_of_the_models(encoders, tmp_path):
    dataset = write_dataset(tmp_path, make_samples())
    progress = []
    assert encode_shards(dataset, encoders, ASSIGNER, lambda done, count: progress.append((done, count))) == 4
    assert progress[-1] == (4, 4)
    cache = LatentCache(dataset.file_store, encoders.compute_digest(ASSIGNER))
    tensors = cache(dataset.entries[5])
    with torch.no_grad():
        pixels = pixels_from_bytes(read_fitted_media(make_mp4(7), 64, 64, 5, ASSIGNER.fps, TRAINING_LIMITS)[None])
        assert torch.allclose(tensors["target"].float(), encode_pixels(encoders.vae, pixels)[0], atol=2e-2, rtol=1e-2)
    assert tensors["source"].shape == tensors["target"].shape == (16, 2, 8, 8)
    assert torch.equal(tensors["text"], encoders.encode_prompt(dataset[5].text))
    assert set(cache(dataset.entries[2])) == {"text", "target"}
    assert not cache(dataset.entries[0])  # understanding tasks need no cache: the MLLM sees the pixels


def test_encoding_resumes_and_other_buckets_have_another_cache(encoders, tmp_path, monkeypatch):
    monkeypatch.setattr("omnivideo.training.data.webdataset.MAX_SHARD_SAMPLES", 1)
    dataset = write_dataset(
        tmp_path, [TrainingSample("text-to-image", f"ball {at}", target=make_png(at)) for at in range(3)]
    )
    encode_shards(dataset, encoders, ASSIGNER, lambda done, count: None)
    (tmp_path / cache_name("00001.tar", encoders.compute_digest(ASSIGNER))).unlink()  # as after a killed run
    assert encode_shards(dataset, encoders, ASSIGNER, lambda done, count: None) == 1
    assert encode_shards(dataset, encoders, ASSIGNER, lambda done, count: None) == 0
    other = BucketAssigner(ASSIGNER.buckets, fps=12)
    assert encoders.compute_digest(other) != encoders.compute_digest(ASSIGNER)
    assert LatentCache(dataset.file_store, encoders.compute_digest(ASSIGNER))(dataset.entries[0])
    assert not LatentCache(dataset.file_store, encoders.compute_digest(other))(dataset.entries[0])


def test_samples_that_cannot_be_encoded_are_reported_and_the_others_are_encoded(encoders, tmp_path):
    long = TrainingSample("text-to-image", "ball " * 500, target=make_png(1))
    short = TrainingSample("text-to-video", "ball", target=make_mp4(2))
    dataset = write_dataset(tmp_path, [long, short, TrainingSample("text-to-image", "ball", target=make_png(2))])
    encode_shards(dataset, encoders, ASSIGNER, lambda done, count: None)
    assert [where for _, where, _ in dataset.skip_report.skipped_samples] == [
        "00000.tar/000000001",
        "00000.tar/000000000",
    ]
    assert (
        LatentCache(dataset.file_store, encoders.compute_digest(ASSIGNER))(dataset.entries[2])["target"].shape[0] == 16
    )


def test_the_command_encodes_and_prints_the_digest(weights, encoders, tmp_path):
    dataset = write_dataset(tmp_path, make_samples())
    arguments = ["data", "encode", str(tmp_path), "--weights", str(weights), "--frames", "5"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    digest = encoders.compute_digest(ASSIGNER)
    assert f"4 samples encoded; cache {digest}" in result.output
    assert LatentCache(dataset.file_store, digest)(dataset.entries[4])["source"].shape == (
        16,
        1,
        6,
        12,
    )  # 2 : 1, like the image
    assert "0 samples encoded" in CliRunner().invoke(app, arguments, catch_exceptions=False).output


def test_a_dataset_is_read_in_batches(tmp_path):
    dataset = write_dataset(
        tmp_path, [*make_samples(), TrainingSample("text-to-video", "too short", target=make_mp4(2))]
    )
    order, numbers = build_batch_sampler(
        dataset, ASSIGNER, MixConfig(task_ratio=None, batch_sizes={"image": 2, "video": 2}, batch_multiple=1)
    )
    seen = np.concatenate([batch.indices for batch in order.get_epoch_batches(0)])
    assert sorted(numbers[at] for at in seen) == [0, 1, 2, 3, 4, 5]
    assert dataset.skip_report.count_by_kind() == {"wrong record": 1}

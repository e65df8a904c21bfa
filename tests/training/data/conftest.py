"""Fixtures of the data tests."""

import pytest

from omnivideo.training.data.latent_cache import FrozenEncoders, encode_shards
from tests.support.shards import ASSIGNER, SAMPLES, write_dataset


@pytest.fixture(scope="module")
def encoded_dataset(weights, tmp_path_factory):
    """Shards of SAMPLES with their latents."""
    dataset = write_dataset(tmp_path_factory.mktemp("shards"), SAMPLES)
    encode_shards(dataset, FrozenEncoders.load(weights, "cpu"), ASSIGNER, lambda done, count: None)
    return dataset

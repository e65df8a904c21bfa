"""Weights of the tiny preset at random, in the shipped layout: what every test of loading and running stands on."""

import random
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.remote import RemoteMLLM
from omnivideo.models import checkpoint
from omnivideo.models.mllm import VisionInputConfig
from omnivideo.models.omni import Bridge, OmniVideoModel, build_decoder
from omnivideo.presets import TINY
from omnivideo.training.recipes import mllm, text

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_tokenizer():
    return text.build_tokenizer(text.build_corpus(400))


@pytest.fixture(scope="session")
def mllm_tokenizer():
    rng = random.Random(0)
    samples = [mllm.sample_from_mix(rng) for _ in range(200)]
    return mllm.build_tokenizer([f"{message.text} {reply}" for message, reply in samples], vocab_size=600)


@pytest.fixture(scope="session")
def omni(text_tokenizer, mllm_tokenizer) -> OmniVideoModel:
    torch.manual_seed(0)
    return OmniVideoModel(
        preset=TINY,
        mllm=mllm.build_model(mllm_tokenizer),
        mllm_tokenizer=mllm_tokenizer,
        vision_config=VisionInputConfig(),
        bridge=Bridge(TINY),
        decoder=build_decoder(TINY),
        text_encoder=UMT5EncoderModel(UMT5Config(**text.CONFIG)),
        tokenizer=text_tokenizer,
        vae=AutoencoderKLWan(**TINY.vae),
    ).eval()


@pytest.fixture(scope="session")
def weights(omni, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    checkpoint.save(omni, folder)
    return folder


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """An untrained model would talk on to the limit."""
    monkeypatch.setattr(LocalMLLM, "most", 24)
    monkeypatch.setattr(RemoteMLLM, "most", 24)

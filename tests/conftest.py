"""Fixtures: random weights of the tiny preset in the shipped layout, and a service that uses them."""

import random
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.remote import RemoteMLLM
from omnivideo.models.omni import Bridge, OmniVideoModel, build_decoder
from omnivideo.models.weights import checkpoint
from omnivideo.presets import TINY
from omnivideo.training.tiny import mllm, text_encoder
from tests.support.openai_service import make_client, make_http_client, run_service
from tests.support.tiers import mark_tiers
from tests.support.vllm_server import find_vllm_python

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests before pytest selects them by `-m`."""
    mark_tiers(items)


@pytest.fixture(scope="session")
def text_tokenizer():
    return text_encoder.build_tokenizer(text_encoder.build_corpus(400))


@pytest.fixture(scope="session")
def mllm_tokenizer():
    rng = random.Random(0)
    examples = [mllm.sample_foundation_example(rng) for _ in range(200)]
    return mllm.build_tokenizer([f"{example.text} {example.answer}" for example in examples], vocab_size=600)


@pytest.fixture(scope="session")
def omni(text_tokenizer, mllm_tokenizer) -> OmniVideoModel:
    torch.manual_seed(0)
    return OmniVideoModel(
        preset=TINY,
        mllm=mllm.build_model(mllm_tokenizer),
        mllm_tokenizer=mllm_tokenizer,
        bridge=Bridge(TINY),
        decoder=build_decoder(TINY),
        text_encoder=UMT5EncoderModel(UMT5Config(**text_encoder.CONFIG)),
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
    """Limit the length of answers, because an untrained model never ends one."""
    monkeypatch.setattr(LocalMLLM, "max_tokens", 24)
    monkeypatch.setattr(RemoteMLLM, "max_tokens", 24)


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """Return the path of an interpreter that has vLLM, or skip."""
    try:
        return find_vllm_python()
    except LookupError as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def service(omni, tmp_path_factory):
    with run_service(tmp_path_factory.mktemp("service"), omni) as made:
        yield made


@pytest.fixture(scope="module")
def context(service):
    return service[1]


@pytest.fixture(scope="module")
def client(service):
    """Yield the unmodified openai client."""
    with make_client(service) as client:
        yield client


@pytest.fixture(scope="module")
def http(service):
    """Yield an HTTP client, for the routes that OpenAI does not have."""
    with make_http_client(service) as http:
        yield http

"""Our own server serves VILA on the same routes as the tiny preset's Qwen3-VL."""

import io
import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from safetensors.torch import load

from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.protocol import MediaPayload, MLLMPayload, VisualTokensRequest, WriteRequest
from omnivideo.backends.mllm.server import LRUObjectStore, create_mllm_app
from omnivideo.models.mllm import MLLMMedia, MLLMMessage
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.weights.vila import load_vila, load_vila_tokenizer
from tests.support import vila_weights
from tests.support.golden import golden_folder


@pytest.fixture(scope="module")
def omni() -> OmniVideoModel:
    """The parts that the MLLM's server uses."""
    folder = golden_folder() / "vila_ar_model"
    model = load_vila(folder, torch.float32)
    head = vila_weights.build_random_vision_head(model.llm.config.hidden_size)
    return OmniVideoModel(
        preset=vila_weights.build_preset(),
        mllm=cast("Any", model),
        mllm_tokenizer=load_vila_tokenizer(folder, model.get_input_embeddings().num_embeddings),
        bridge=cast("Any", SimpleNamespace(vision_head=head)),
        decoder=cast("Any", None),
        text_encoder=cast("Any", None),
        tokenizer=cast("Any", None),
        vae=cast("Any", None),
    )


@pytest.fixture(scope="module")
def client(omni) -> TestClient:
    return TestClient(create_mllm_app(LocalMLLM(omni, LRUObjectStore())))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def payload(pixels) -> MLLMPayload:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    media = MediaPayload(data=buffer.getvalue(), suffix="png", medium="image", fps=1.0)
    return MLLMPayload(text="make it blue", media=(media,))


@pytest.fixture(scope="module")
def message(pixels) -> MLLMMessage:
    return MLLMMessage("make it blue", (MLLMMedia(pixels[None], is_video=False),))


def post(client: TestClient, path: str, body: Any) -> Any:
    response = client.post(path, content=body.model_dump_json(), headers={"Content-Type": "application/json"})
    assert response.is_success, response.text
    return response


def test_route_and_agreement(client, omni, payload, message):
    route = post(client, "/v1/route", payload).json()
    expected = omni.bound_mllm.route(message)
    assert route == {"kind": expected.kind, "probability": pytest.approx(expected.probability)}
    agreement = post(client, "/v1/agreement", payload).json()["agreement"]
    assert agreement == pytest.approx(omni.bound_mllm.score_agreement(message))


def test_answer(client, omni, payload, message):
    lines = post(client, "/v1/write", WriteRequest(payload=payload, max_tokens=8)).text.splitlines()
    expected = "".join(omni.bound_mllm.stream_text(message, temperature=0.0, max_tokens=8))
    assert lines[-1] == "null" and "".join(map(json.loads, lines[:-1])) == expected and expected


def test_visual_tokens(client, omni, payload, message):
    response = post(client, "/v1/visual_tokens", VisualTokensRequest(payload=payload, medium="image"))
    with torch.no_grad():
        expected = omni.bridge.vision_head(*omni.bound_mllm.compute_features([(message, "image")]))
    torch.testing.assert_close(load(response.content)["visual_tokens"], expected, rtol=0, atol=1e-6)

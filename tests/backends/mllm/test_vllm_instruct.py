"""vLLM serves a stock Qwen3-VL, dense and mixture of experts, and gives the answers of the model in this process.

Both run in float32 on random weights: version 2's captions and hidden states, routes by likelihoods, plans by a schema.
"""

import pytest
import torch
from pydantic_core import from_json
from transformers import AutoTokenizer

from omnivideo.agent.mllm_plan import build_plan_schema
from omnivideo.backends.mllm.remote import RemoteMLLM
from omnivideo.contracts import Artifact, MLLMRequest
from omnivideo.media.artifacts import encode_clip, load_frames
from omnivideo.models.features import decode_features
from omnivideo.models.mllm import MLLMMedia, MLLMMessage
from omnivideo.models.qwen3_vl import InstructQwen3VL
from omnivideo.models.weights.qwen3_vl import load_qwen3_vl
from omnivideo.presets import get_preset
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.storage.objects.tensors import get_tensors
from tests.support.clips import make_clip
from tests.support.qwen_weights import PRESET, write_instruct_weights
from tests.support.servers import free_port
from tests.support.vllm_server import Server

pytestmark = [pytest.mark.slow, pytest.mark.golden, pytest.mark.timeout(1800)]
TEXT = "make it blue"


@pytest.fixture(scope="module", params=["dense", "experts"])
def folder(request, tmp_path_factory):
    return write_instruct_weights(tmp_path_factory.mktemp(request.param) / "weights", request.param == "experts")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return LocalObjectStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def remote_mllm(vllm_python, folder, store, tmp_path_factory):
    server = Server(vllm_python, folder, tmp_path_factory.mktemp("vllm"), free_port(), max_num_batched_tokens=64)
    server.start().wait(900)
    client = RemoteMLLM(server.address, store)
    yield client
    client.close()
    server.stop()


@pytest.fixture(scope="module")
def local(folder):
    model = load_qwen3_vl(folder, dtype=torch.float32).eval()
    return InstructQwen3VL(model, AutoTokenizer.from_pretrained(folder / "mllm"), get_preset(PRESET).mllm)


@pytest.fixture(scope="module", params=["edit", "generation"])
def requests(request, store):
    """The same request for the server and for the model in this process."""
    if request.param == "generation":
        return MLLMRequest(text=TEXT), MLLMMessage(TEXT)
    data, suffix = encode_clip(make_clip(13, 96, 64), 8.0)
    artifact = Artifact(
        key=store.put(data, suffix), medium="video", width=96, height=64, frames=13, fps=8.0, caption="",
        created_by="test",
    )  # fmt: skip
    media = MLLMMedia(load_frames(store, artifact), artifact.fps)
    return MLLMRequest(text=TEXT, artifacts=(artifact,)), MLLMMessage(TEXT, (media,))


def test_routes_and_agreement_are_equal(remote_mllm, local, requests):
    request, message = requests
    route, expected = remote_mllm.route(request), local.route(message)
    assert route.kind == expected.kind and route.probability == pytest.approx(expected.probability, abs=1e-4)
    assert remote_mllm.score_agreement(request) == pytest.approx(local.score_agreement(message), abs=1e-4)


def test_the_states_before_the_norm_and_the_caption_are_equal(remote_mllm, local, requests, store):
    request, message = requests
    features = decode_features(get_tensors(store, remote_mllm.predict_visual_tokens(request, "video")))
    states, _ = local.compute_features([(message, "video")])
    assert features.values.shape == states.shape
    assert (features.values - states).norm() / states.norm() < 1e-5
    assert features.caption == local.caption_target(message, "video")


def test_plans_are_equal_and_keep_to_the_schema(remote_mllm, local, requests):
    request, message = requests
    schema = build_plan_schema(1)
    plan = "".join(remote_mllm.stream_text(request.model_copy(update={"json_schema": schema})))
    scheduled = MLLMMessage(message.text, message.media, None, schema)
    assert plan == "".join(local.stream_text(scheduled, temperature=0.0, max_tokens=remote_mllm.max_tokens))
    # Random weights write long plans, which the limit of an answer's length may cut off.
    assert plan.startswith('{"actions":[{"action":') and from_json(plan, allow_partial=True)["actions"]

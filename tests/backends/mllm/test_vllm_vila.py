"""vLLM serves VILA and gives the same hidden states, routes and answers as the model in this process.

A step takes few tokens, so that prompts are computed in chunks.
"""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from omnivideo.backends.mllm.remote import RemoteMLLM
from omnivideo.contracts import Artifact, MLLMRequest
from omnivideo.media.artifacts import encode_clip, load_frames
from omnivideo.models.mllm import MLLMMedia, MLLMMessage, sanitize_text
from omnivideo.models.vila_answers import BoundVila
from omnivideo.models.weights.vila import load_vila, load_vila_tokenizer
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.storage.objects.tensors import get_tensors
from tests.support import vila_weights
from tests.support.servers import free_port
from tests.support.vllm_server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOLERANCE = 1e-5
NUM_REQUESTS = 40
WORDS = ["a", "red", "ball", "moves", "left", "what", "is", "this", "make", "it", "snow", "draw"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vila_weights.write_weights(tmp_path_factory.mktemp("vila") / "weights")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return LocalObjectStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def bound(folder):
    model = load_vila(folder / "mllm", torch.float32)
    return BoundVila(model, load_vila_tokenizer(folder / "mllm", model.get_input_embeddings().num_embeddings))


@pytest.fixture(scope="module")
def server(vllm_python, folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("vllm")
    vllm = Server(vllm_python, folder, place, free_port(), max_num_batched_tokens=64, max_model_len=2048)
    yield vllm.start().wait()
    vllm.stop()


@pytest.fixture
def remote_mllm(server, store):
    client = RemoteMLLM(server.address, store)
    client.max_tokens = 24
    yield client
    client.close()


def store_media(store, frames_FHW3: np.ndarray) -> Artifact:
    video = len(frames_FHW3) > 1
    data, suffix = encode_clip(frames_FHW3, 8.0)
    return Artifact(
        key=store.put(data, suffix), medium="video" if video else "image", width=frames_FHW3.shape[2],
        height=frames_FHW3.shape[1], frames=len(frames_FHW3), fps=8.0, caption="", created_by="test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def requests(store):
    """Requests with text only, an image, a clip, and both."""
    rng, pixels = random.Random(1), np.random.default_rng(1)
    all_media = [
        store_media(store, pixels.integers(0, 255, (frames, 48, 64, 3), dtype=np.uint8)) for frames in (1, 1, 9, 13)
    ]
    return [
        MLLMRequest(
            text=" ".join(rng.choices(WORDS, k=rng.choice([1, 2, 5, 30, 90]))),
            artifacts=tuple(rng.sample(all_media, (0, 1, 1, 2)[index % 4])),
            system=rng.choice([None, "think"]),
        )
        for index in range(NUM_REQUESTS)
    ]


def build_message(bound, store, request: MLLMRequest) -> MLLMMessage:
    media = tuple(
        MLLMMedia(load_frames(store, artifact), artifact.fps, artifact.medium == "video")
        for artifact in request.artifacts
    )
    return MLLMMessage(sanitize_text(request.text, bound.special_tokens), media, request.system)


@torch.no_grad()
def compute_visual_tokens(bound, message: MLLMMessage, medium: str) -> torch.Tensor:
    return vila_weights.build_random_vision_head()(*bound.compute_features([(message, medium)]))


def test_visual_tokens_are_those_of_the_hidden_states_in_this_process(bound, store, remote_mllm, requests):
    def predict(index: int) -> str:
        return remote_mllm.predict_visual_tokens(requests[index], ("image", "video")[index % 2])

    with ThreadPoolExecutor(8) as pool:  # several requests in one step of the engine
        references = list(pool.map(predict, range(NUM_REQUESTS)))
    seen = []
    for index, reference in enumerate(references):
        tokens = get_tensors(store, reference)["visual_tokens"]
        message = build_message(bound, store, requests[index])
        expected = compute_visual_tokens(bound, message, ("image", "video")[index % 2])
        torch.testing.assert_close(tokens, expected, rtol=0, atol=TOLERANCE)
        seen.append(expected)
    assert torch.cat(seen).std(0).min() > 100 * TOLERANCE  # so a wrong hidden state would have been noticed


def test_routes_are_those_in_this_process(bound, store, remote_mllm, requests):
    for request in requests[:12]:
        expected = bound.route(build_message(bound, store, request))
        route = remote_mllm.route(request)
        assert route.kind == expected.kind and route.probability == pytest.approx(expected.probability, abs=1e-4)


def test_answers_are_those_in_this_process(bound, store, remote_mllm, requests):
    def answer(request: MLLMRequest) -> str:
        return "".join(remote_mllm.stream_text(request))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answer, requests[:16]))
    for request, text in zip(requests, answers, strict=False):
        message = build_message(bound, store, request)
        assert text == "".join(bound.stream_text(message, temperature=0.0, max_tokens=remote_mllm.max_tokens))
    assert len(set(answers)) > 8


def test_agreement_is_that_in_this_process(bound, store, remote_mllm, requests):
    for request in requests[:4]:
        expected = bound.score_agreement(build_message(bound, store, request))
        assert remote_mllm.score_agreement(request) == pytest.approx(expected, abs=1e-4)

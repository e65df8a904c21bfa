"""The conversation tests with the shipped weights and the language model on vLLM."""

import random
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.remote import RemoteMLLM
from omnivideo.contracts import Artifact, MLLMRequest
from omnivideo.evaluation.planner import make_turn_sender, sample_script
from omnivideo.evaluation.suite import sample_routing_case
from omnivideo.media.artifacts import encode_clip
from omnivideo.models.weights.shipped import SHIPPED_WEIGHTS_FOLDER
from omnivideo.sdk.studio import Studio
from omnivideo.settings import load_settings
from omnivideo.wiring import ServiceWiring
from tests.agent.test_conversations import *  # noqa: F403
from tests.support.api_server import run_api_server
from tests.support.servers import free_port
from tests.support.vllm_server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WEIGHTS = SHIPPED_WEIGHTS_FOLDER / "tiny"
NUM_LABELLED = 400  # as in `omnivideo evaluate tiny`


@pytest.fixture(scope="module")
def server(vllm_python, tmp_path_factory):
    vllm = Server(vllm_python, WEIGHTS, tmp_path_factory.mktemp("vllm"), free_port()).start().wait()
    yield vllm
    vllm.stop()


def create_studio(home) -> Studio:
    return Studio(weights=WEIGHTS, home=home, device="cpu")


@pytest.fixture(scope="module")
def studio(server, tmp_path_factory):
    """A Studio whose language model is on vLLM; the tests of test_conversations run on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMNIVIDEO_MLLM", server.address)
        vllm_studio = create_studio(tmp_path_factory.mktemp("home"))
        assert isinstance(vllm_studio.conversations.mllm, RemoteMLLM)
    yield vllm_studio
    vllm_studio.conversations.mllm.close()


@pytest.fixture(scope="module")
def local_studio(tmp_path_factory):
    """Return a Studio with its language model in this process."""
    return create_studio(tmp_path_factory.mktemp("local"))


def request_from_message(store, message) -> MLLMRequest:
    artifacts = []
    for media in message.media:
        data, suffix = encode_clip(media.frames, media.fps)
        count, height, width, _ = media.frames.shape
        medium = "video" if media.is_video else "image"
        artifacts.append(Artifact(key=store.put(data, suffix), medium=medium, width=width, height=height, frames=count,
                              fps=media.fps, caption="", created_by="test"))  # fmt: skip
    return MLLMRequest(text=message.text, artifacts=tuple(artifacts))


def test_every_labelled_request_takes_the_same_route(studio):
    rng, remote_mllm = random.Random("evaluation/routing"), studio.conversations.mllm
    local = LocalMLLM(studio.omni, remote_mllm.store)
    requests = [request_from_message(local.store, sample_routing_case(rng)[0]) for _ in range(NUM_LABELLED)]
    with ThreadPoolExecutor(16) as pool:
        routes = list(pool.map(remote_mllm.route, requests))
    expected = [local.route(request) for request in requests]
    assert [route.kind for route in routes] == [route.kind for route in expected]
    expected_probabilities = [route.probability for route in expected]
    assert [route.probability for route in routes] == pytest.approx(expected_probabilities, abs=1e-4)


def test_a_conversation_of_ten_turns_has_the_same_results(studio, local_studio):
    outcomes = []
    for current_studio in (studio, local_studio):
        send = make_turn_sender(current_studio.open_thread().send)
        turns = [send(line.text, seed=3, steps=4) for line in sample_script(random.Random(4))]
        results = [turn.results for turn in turns if turn]
        outcomes.append([[(result.goal, result.route.kind, result.answer) for result in row] for row in results])
    assert outcomes[0] == outcomes[1] and len(outcomes[0]) >= 8  # a turn that ends with a question has no results


def test_a_turn_continues_after_vllm_is_killed_and_restarted(server, tmp_path):
    """The turn ends with the same answers, and the user is not asked again."""
    wiring = ServiceWiring(load_settings(home=tmp_path, mllm=server.address, weights=str(WEIGHTS)), "cpu")
    text = "draw a big red circle and a small blue square; how many shapes are there?"
    with run_api_server(wiring) as address, httpx.Client(base_url=address, timeout=600, trust_env=False) as http:
        undisturbed, _ = run_turn(http, text, lambda kind: None)
        next(restart := restart_once(server))
        turn, kinds = run_turn(http, text, restart.send)
    assert "waiting" in kinds and turn["state"] == undisturbed["state"] == "done"
    results, expected = turn["turn"]["results"], undisturbed["turn"]["results"]
    assert [result["answer"] for result in results] == [result["answer"] for result in expected]


def restart_once(server: Server) -> Generator[None, str]:
    """Receive the kinds of events: kill the server at a clip's first step, and start it when the turn waits for it."""
    while (yield) != "step":
        pass
    server.kill()
    while (yield) != "waiting":
        pass
    server.start()
    while True:
        yield


def run_turn(http: httpx.Client, text: str, on_event: Callable[[str], None]) -> tuple[dict, list[str]]:
    """Run a turn in a new thread and return it with the kinds of its events."""
    thread, kinds = http.post("/v1/threads").json()["id"], []
    body = {"text": text, "steps": 4, "seed": 3}
    turn_path = f"/v1/threads/{thread}/turns/" + http.post(f"/v1/threads/{thread}/turns", json=body).json()["id"]
    with http.stream("GET", f"{turn_path}/events") as events:
        for line in events.iter_lines():
            if line.startswith("event: "):
                kinds.append(line.removeprefix("event: "))
                on_event(kinds[-1])
    return http.get(turn_path).json(), kinds

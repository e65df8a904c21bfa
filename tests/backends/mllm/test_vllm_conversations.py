"""The planner's whole conversation suite once more, its language model behind vLLM, over the weights that we ship."""

import random
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.remote import RemoteMLLM
from omnivideo.contracts import Artifact, MLLMRequest
from omnivideo.evaluation.planner import make_turn_sender, sample_script
from omnivideo.evaluation.suite import sample_routing_case
from omnivideo.media.artifacts import encode_clip
from omnivideo.models.weights.checkpoint import SHIPPED_WEIGHTS_FOLDER
from omnivideo.sdk.studio import Studio
from omnivideo.settings import load_settings
from omnivideo.wiring import ServiceWiring
from tests.agent.test_conversations import *  # noqa: F403
from tests.support.api_server import serving
from tests.support.servers import free_port
from tests.support.vllm_server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WEIGHTS = SHIPPED_WEIGHTS_FOLDER / "tiny"
LABELLED = 400  # as many as `omnivideo evaluate tiny` asks


@pytest.fixture(scope="module")
def server(vllm_python, tmp_path_factory):
    served = Server(vllm_python, WEIGHTS, tmp_path_factory.mktemp("vllm"), free_port()).start().wait()
    yield served
    served.stop()


def studio_in(home) -> Studio:
    return Studio(weights=WEIGHTS, home=home, device="cpu")


@pytest.fixture(scope="module")
def studio(server, tmp_path_factory):
    """What the suite runs on: everything here but the language model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMNIVIDEO_MLLM", server.address)
        made = studio_in(tmp_path_factory.mktemp("home"))
        assert isinstance(made.conversations.mllm, RemoteMLLM)
    yield made
    made.conversations.mllm.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same, language model included."""
    return studio_in(tmp_path_factory.mktemp("whole"))


def asked(store, message) -> MLLMRequest:
    shown = []
    for one in message.media:
        data, suffix = encode_clip(one.frames, one.fps)
        count, height, width, _ = one.frames.shape
        medium = "video" if one.is_video else "image"
        shown.append(Artifact(key=store.put(data, suffix), medium=medium, width=width, height=height, frames=count,
                              fps=one.fps, caption="", created_by="test"))  # fmt: skip
    return MLLMRequest(text=message.text, artifacts=tuple(shown))


def test_every_labelled_request_takes_the_same_route(studio):
    rng, away = random.Random("evaluation/routing"), studio.conversations.mllm
    here = LocalMLLM(studio.omni, away.store)
    asks = [asked(away.store, sample_routing_case(rng)[0]) for _ in range(LABELLED)]
    with ThreadPoolExecutor(16) as pool:
        routed = list(pool.map(away.route, asks))
    expected = [here.route(ask) for ask in asks]
    assert [one.kind for one in routed] == [one.kind for one in expected]
    assert [one.probability for one in routed] == pytest.approx([one.probability for one in expected], abs=1e-4)


def test_a_conversation_of_ten_turns_goes_the_same_way(studio, whole):
    told = []
    for where in (studio, whole):
        say = make_turn_sender(where.open_thread().send)
        turns = [say(line.text, seed=3, steps=4) for line in sample_script(random.Random(4))]
        told.append([[(one.goal, one.route.kind, one.answer) for one in turn.results] for turn in turns if turn])
    assert told[0] == told[1] and len(told[0]) >= 8  # a turn that asks back says nothing more


def test_the_service_goes_on_when_vllm_is_killed_in_the_middle_of_a_turn(server, tmp_path):
    """Killed while it answers and started again: the turn ends as if nothing had been, and nobody asked again."""
    wiring = ServiceWiring(load_settings(home=tmp_path, mllm=server.address, weights=str(WEIGHTS)), "cpu")
    words = "draw a big red circle and a small blue square; how many shapes are there?"
    with serving(wiring) as address, httpx.Client(base_url=address, timeout=600, trust_env=False) as http:
        undisturbed, _ = played(http, words, lambda kind: None)
        next(fate := killed_once(server))
        turn, told = played(http, words, fate.send)
    assert "waiting" in told and turn["state"] == undisturbed["state"] == "done"
    results, expected = turn["turn"]["results"], undisturbed["turn"]["results"]
    assert [one["answer"] for one in results] == [one["answer"] for one in expected]


def killed_once(server: Server) -> Generator[None, str]:
    """Killed at the first step of the clip, and started again when the turn waits for it; takes an event a time."""
    while (yield) != "step":
        pass
    server.kill()
    while (yield) != "waiting":
        pass
    server.start()
    while True:
        yield


def played(http: httpx.Client, words: str, saw) -> tuple[dict, list[str]]:
    """A turn and the kinds of its events."""
    thread, told = http.post("/v1/threads").json()["id"], []
    begun = http.post(f"/v1/threads/{thread}/turns", json={"text": words, "steps": 4, "seed": 3}).json()["id"]
    with http.stream("GET", f"/v1/threads/{thread}/turns/{begun}/events") as events:
        for line in events.iter_lines():
            if line.startswith("event: "):
                told.append(line.removeprefix("event: "))
                saw(told[-1])
    return http.get(f"/v1/threads/{thread}/turns/{begun}").json(), told

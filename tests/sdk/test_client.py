"""The client library against a running service."""

import asyncio
import threading

import numpy as np
import pytest
from PIL import Image

from omnivideo import AsyncClient, Client
from omnivideo.contracts import StepProgress
from omnivideo.errors import ArtifactNotFound, InvalidInput, OmniVideoError, StoreError
from omnivideo.turns import QuestionAsked, TurnCompleted
from tests.support.api_server import build_scripted_wiring, run_api_server
from tests.support.servers import free_port

KEY = "a-key-for-the-tests"


@pytest.fixture(scope="module")
def address(omni, tmp_path_factory):
    wiring = build_scripted_wiring(tmp_path_factory.mktemp("service"), omni, admin_key=KEY)
    wiring.start_background_services(wiring.build_service_context())
    with run_api_server(wiring) as address:
        yield address


@pytest.fixture
def client(address):
    with Client(address, KEY) as client:
        yield client


def test_a_thread_has_the_methods_of_a_local_thread(client, tmp_path):
    thread = client.open_thread()
    events = list(thread.send("a red ball; now make it blue", steps=4))
    assert isinstance(events[-1], TurnCompleted) and any(isinstance(event, StepProgress) for event in events)
    assert [turn.number for turn in thread.get_turns()] == [1]
    first, second = thread.get_artifacts()
    assert second.source == first.key and [artifact.key for artifact in thread.get_lineage()] == [second.key, first.key]
    assert thread.fetch_artifact(first).frames.shape == (9, 64, 64, 3)
    branch = client.open_thread(thread.fork(1, "a-branch").id)
    assert branch.id == "a-branch" and len(branch.get_turns()) == 1
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    turn = list(branch.send("make it green", [tmp_path / "red.png"], steps=2))[-1].turn
    assert turn.attachments[0].caption == "red" and turn.results[0].artifact.source == turn.attachments[0].key
    last_event = list(client.open_thread().send("make it blue"))[-1]
    assert isinstance(last_event, QuestionAsked)


def test_clips_and_images(client, tmp_path):
    steps: list[int] = []
    clip = client.generate("a red ball", steps=8, seed=3, on_step=lambda step: steps.append(step.step))
    assert clip.frames.shape == (9, 64, 64, 3) and steps[-1] == 100
    assert np.array_equal(client.generate("a red ball", steps=8, seed=3).frames, clip.frames)
    saved = clip.save(tmp_path / "ball.mp4")
    assert client.edit(saved, "make it blue", steps=2).suffix == "mp4"
    image = client.generate("a red ball", image=True, steps=2, width=64, height=64)
    assert image.frames.shape == (1, 64, 64, 3) and "image/png" in image._repr_html_()
    assert client.edit(image.save(tmp_path / "ball.png"), "make it blue", steps=2).suffix == "png"
    assert client.understand(saved, "how many balls are there?").startswith("it is")


def test_a_batch_is_generated_once_and_resumed(client, tmp_path):
    prompts = [{"id": name, "prompt": f"a {name} ball", "steps": 2} for name in ("red", "green", "blue")]
    with pytest.raises(InvalidInput, match="line 4, frames: "):
        list(client.batch([*prompts, {"id": "odd", "prompt": "a ball", "frames": 10}], tmp_path / "odd"))
    outcomes = {outcome.id: outcome for outcome in client.batch(prompts, tmp_path / "out")}
    assert [outcomes[name].file for name in ("red", "green", "blue")] == ["red.mp4", "green.mp4", "blue.mp4"]
    assert (tmp_path / "out" / "red.mp4").stat().st_size > 0
    repeated = list(client.batch(prompts, tmp_path / "out"))
    assert all(outcome.file is None and outcome.error is None for outcome in repeated)  # all were done before


def test_the_async_client_generates_and_streams(address):
    async def use_client() -> tuple:
        async with AsyncClient(address, KEY) as client:
            clip, thread = await asyncio.gather(client.generate("a red ball", steps=2), client.open_thread())
            kinds = [event.kind async for event in thread.send("a red ball", steps=2)]
            return clip, kinds

    clip, kinds = asyncio.run(use_client())
    assert clip.suffix == "mp4" and kinds[-1] == "done"


def test_refusals_are_raised_as_errors_of_the_tree(client, address, tmp_path):
    with pytest.raises(InvalidInput, match="prompt: it is empty"):
        client.generate(" ")
    with pytest.raises(InvalidInput, match="width"):
        client.generate("a red ball", width=5000, height=64)
    with pytest.raises(InvalidInput, match="thread: there is no thread 'nothing'"):
        client.open_thread("nothing")
    with pytest.raises(ArtifactNotFound):
        client.event_loop.run(client.remote.connection.send_request("GET", "/v1/threads/nothing"))
    with Client(address, "wrong") as stranger, pytest.raises(OmniVideoError, match="API key"):
        stranger.open_thread()
    with pytest.raises(InvalidInput, match=r"attachments: 'none\.png' cannot be read"):
        list(client.open_thread().send("what is this?", [tmp_path / "none.png"]))


def test_the_client_waits_for_a_service_that_starts_late(omni, tmp_path, monkeypatch):
    """The first attempts fail, and the request still takes effect only once."""
    port = free_port()
    with Client(f"http://127.0.0.1:{port}") as client:
        with monkeypatch.context() as patched, pytest.raises(StoreError, match="service: it cannot be reached"):
            patched.setattr("omnivideo.sdk.connection.MAX_ATTEMPTS", 2)
            client.open_thread()
        threads: list = []
        opener = threading.Thread(target=lambda: threads.append(client.open_thread()))
        opener.start()
        with run_api_server(build_scripted_wiring(tmp_path, omni), port):
            opener.join(20)
            assert threads and threads[0].get_turns() == []

"""Studio, Client and AsyncClient do the same: one suite, run against each of them."""

import asyncio
import inspect
import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnivideo import AsyncClient, Client, Result, Studio
from omnivideo.errors import InvalidInput
from omnivideo.models.weights.shipped import find_shipped_weights
from omnivideo.sdk.async_thread import AsyncThread
from omnivideo.sdk.client import ClientThread
from omnivideo.sdk.options import GenerationOptions, SamplingOptions
from omnivideo.sdk.thread import StudioThread
from omnivideo.settings import load_settings
from omnivideo.turns import ArtifactReady, QuestionAsked, TurnCompleted
from omnivideo.wiring import ServiceWiring
from tests.support.api_server import run_api_server

KINDS = ["studio", "client", "async"]
LONG_STEPS = 150  # several seconds, unless the work is cancelled


class InEventLoop:
    """An AsyncClient, or a thread of it, whose methods are awaited in an event loop of the test."""

    def __init__(self, target, loop: asyncio.AbstractEventLoop):
        self.target, self.loop = target, loop

    def __getattr__(self, name: str):
        value = getattr(self.target, name)
        if not callable(value):
            return value

        def call(*arguments, **options):
            returned = value(*arguments, **options)
            if hasattr(returned, "__anext__"):
                return self.iterate(returned)
            awaited = self.loop.run_until_complete(returned)
            return InEventLoop(awaited, self.loop) if isinstance(awaited, AsyncThread) else awaited

        return call

    def iterate(self, items):
        """Yield the items; leaving the loop closes the iterator, as leaving an `async for` does."""
        end = object()

        async def receive():
            return await anext(items, end)

        try:
            while (item := self.loop.run_until_complete(receive())) is not end:
                yield item
        finally:
            self.loop.run_until_complete(items.aclose())


@pytest.fixture(scope="module")
def weights():
    return find_shipped_weights("tiny")  # they answer questions and choose between images and clips


@pytest.fixture(scope="module")
def wiring(weights, tmp_path_factory):
    settings = load_settings(home=tmp_path_factory.mktemp("service"), weights=str(weights))
    return ServiceWiring(settings, "cpu")


@pytest.fixture(scope="module")
def address(wiring):
    wiring.start_background_services(wiring.build_service_context())
    with run_api_server(wiring) as address:
        yield address


@contextmanager
def open_kind(kind, address, weights, home):
    if kind == "studio":
        yield Studio(weights=weights, device="cpu", home=home)
    elif kind == "client":
        with Client(address) as client:
            yield client
    else:
        with asyncio.Runner() as runner:
            client = AsyncClient(address)
            yield InEventLoop(client, runner.get_loop())
            runner.run(client.close())


@pytest.fixture(scope="module", params=KINDS)
def sdk(request, address, weights, tmp_path_factory):
    with open_kind(request.param, address, weights, tmp_path_factory.mktemp("studio")) as sdk:
        yield sdk


# ---------------------------------------------------------------- names and options

METHODS = [
    "open_thread", "batch", "route", "generate", "generate_many", "edit", "edit_many", "animate", "extend",
    "understand",
]  # fmt: skip
THREAD_METHODS = [
    "send", "fork", "get_turns", "get_artifacts", "get_open_question", "get_lineage", "fetch_artifact",
]  # fmt: skip


def describe_parameters(owner: type, name: str) -> list[tuple[str, object, object]]:
    parameters = inspect.signature(getattr(owner, name)).parameters.values()
    return [(parameter.name, parameter.default, parameter.annotation) for parameter in parameters]


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_the_same_options(name):
    first, *others = [describe_parameters(owner, name) for owner in (Studio, Client, AsyncClient)]
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", THREAD_METHODS)
def test_threads_have_the_same_options(name):
    first, *others = [describe_parameters(owner, name) for owner in (StudioThread, ClientThread, AsyncThread)]
    assert all([parameter[:2] for parameter in other] == [parameter[:2] for parameter in first] for other in others)


def test_several_results_take_the_options_of_one():
    for name, options in (("generate", GenerationOptions), ("edit", SamplingOptions)):
        keywords = {
            parameter.name
            for parameter in inspect.signature(getattr(Studio, name)).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        assert set(options.__annotations__) | set(SamplingOptions.__annotations__) == keywords


# ---------------------------------------------------------------- results

REFUSED = [
    ({"prompt": " "}, "prompt"),
    ({"frames": 10}, "frames"),
    ({"frames": 99}, "frames"),
    ({"steps": 0}, "steps"),
    ({"guidance_scale": 31.0}, "guidance_scale"),
    ({"width": 5000, "height": 64}, "width"),
    ({"seed": -2}, "seed"),
    ({"fps": 0.1}, "fps"),
    ({"seconds": 60}, "seconds"),
    ({"image": True, "fps": 4.0}, "fps"),
    ({"negative_prompt": "a " * 3000}, "negative_prompt"),
    ({"prompt": "a red ball " * 300}, "prompt"),
]


@pytest.mark.parametrize(("options", "field"), REFUSED)
def test_the_same_options_are_refused(sdk, options, field):
    options = {"prompt": "a red ball", "image": False, "steps": 2} | options
    with pytest.raises(InvalidInput) as raised:
        sdk.generate(options.pop("prompt"), **options)
    assert raised.value.field == field and str(raised.value).startswith(f"{field}: ")


def test_unknown_options_are_refused(sdk):
    with pytest.raises(TypeError, match="stepz"):
        sdk.generate("a red ball", stepz=2)


@pytest.fixture(scope="module")
def known(weights, tmp_path_factory):
    """Return the files that a Studio saves, which the other kinds are compared with."""
    folder = tmp_path_factory.mktemp("known")
    studio = Studio(weights=weights, device="cpu", home=folder / "home")
    clip = studio.generate("a small red circle moving right", steps=2, seed=3, image=False)
    picture = studio.generate("a large blue star", steps=2, seed=3, image=True)
    edited = studio.edit(clip, "make it blue", steps=2, seed=4)
    return {path.name: path for path in (clip.save(folder / "clip.mp4"), picture.save(folder / "picture.png"),
                                         edited.save(folder / "edited.mp4"))}  # fmt: skip


def compare_saved(result: Result, known_path: Path, folder: Path) -> None:
    """Check that a result is saved with the same bytes and the same manifest as a Studio saves it."""
    saved = result.save(folder / known_path.name)
    assert saved.read_bytes() == known_path.read_bytes()
    first, second = [json.loads(path.with_name(path.name + ".json").read_text()) for path in (saved, known_path)]
    own = ("seconds", "source", "source_latents", "visual_tokens")  # where it was made, not what it is
    assert {name: value for name, value in first.items() if name not in own} == {
        name: value for name, value in second.items() if name not in own
    }


def test_results_have_the_same_files_and_manifests(sdk, known, tmp_path):
    steps = []
    clip = sdk.generate("a small red circle moving right", steps=2, seed=3, image=False, on_step=steps.append)
    compare_saved(clip, known["clip.mp4"], tmp_path)
    assert clip.seed == 3 and clip.prompt == "a small red circle moving right" and steps[-1].step == steps[-1].steps
    assert repr(clip) == "<Result: a clip, 64x64, 9 frames at 8 fps, seed 3, 'a small red circle moving right'>"
    assert clip.frames.shape == (9, 64, 64, 3) and "video/mp4" in clip._repr_html_()
    assert clip.save(tmp_path / "clip.gif").read_bytes()[:3] == b"GIF"
    picture = sdk.generate("a large blue star", steps=2, seed=3, image=True)
    compare_saved(picture, known["picture.png"], tmp_path)
    assert repr(picture) == "<Result: an image, 64x64, seed 3, 'a large blue star'>"
    with pytest.raises(InvalidInput, match="output"):
        clip.save(tmp_path / "clip.webm")


def test_sources_are_paths_pictures_arrays_and_results(sdk, known, tmp_path):
    compare_saved(sdk.edit(known["clip.mp4"], "make it blue", steps=2, seed=4), known["edited.mp4"], tmp_path)
    picture = Image.open(known["picture.png"])
    by_path = sdk.edit(known["picture.png"], "make it red", steps=2, seed=4)
    for source in (picture, np.asarray(picture.convert("RGB")), by_path):
        edited = sdk.edit(source, "make it red", steps=2, seed=4)
        assert edited.suffix == "png"
        if source is not by_path:
            assert np.array_equal(edited.frames, by_path.frames)
    clip = sdk.edit(np.zeros((9, 64, 64, 3), np.uint8), "make it red", steps=2)
    assert len(clip.frames) == 9
    with pytest.raises(InvalidInput, match="source: it is an array of float64"):
        sdk.edit(np.zeros((64, 64, 3)), "make it red")
    with pytest.raises(InvalidInput, match="source: it is a int"):
        sdk.edit(3, "make it red")
    with pytest.raises(InvalidInput, match="source: "):
        sdk.edit(tmp_path / "none.png", "make it red")


def test_several_results_have_consecutive_seeds(sdk):
    results = sdk.generate_many("a red ball", 3, steps=1, seed=5, image=False)
    assert [result.seed for result in results] == [5, 6, 7]
    assert len({result.data for result in results}) == 3
    with pytest.raises(InvalidInput, match="n: 0 results"):
        sdk.generate_many("a red ball", 0)
    assert len(sdk.edit_many(results[0], "make it blue", 2, steps=1)) == 2


@pytest.fixture(scope="module")
def known_answer(known, weights, tmp_path_factory):
    """Return what a Studio answers."""
    studio = Studio(weights=weights, device="cpu", home=tmp_path_factory.mktemp("home"))
    return studio.understand(known["picture.png"], "what is shown?", temperature=0.0)


def test_questions_are_answered_alike(sdk, known, known_answer):
    pieces = []
    answer = sdk.understand(known["picture.png"], "what is shown?", on_text=pieces.append, temperature=0.0)
    assert answer == "".join(pieces).strip() == known_answer and "blue star" in answer
    with pytest.raises(InvalidInput, match="temperature: "):
        sdk.understand(known["picture.png"], "what is shown?", temperature=3.0)
    assert sdk.route("a large blue star").kind == "image"
    assert sdk.route("what is shown?", known["picture.png"]).kind == "text"


def test_batches_have_the_same_files(sdk, tmp_path):
    prompts = [
        {"id": "clip", "prompt": "a red circle moving right", "steps": 2, "frames": 9},
        {"id": "picture", "prompt": "a large blue star", "steps": 2, "image": True},
        {"id": "decided", "prompt": "a large green square", "steps": 2},
    ]
    with pytest.raises(InvalidInput, match=r"^line 4, frames: "):
        list(sdk.batch([*prompts, {"id": "wrong", "prompt": "a ball", "frames": 10}], tmp_path / "wrong"))
    folder = tmp_path / "out"
    outcomes = {outcome.id: outcome for outcome in sdk.batch(prompts, folder)}
    assert [outcomes[name].file for name in ("clip", "picture", "decided")] == [
        "clip.mp4",
        "picture.png",
        "decided.png",
    ]
    assert {path.name for path in folder.glob("*.json")} >= {"clip.mp4.json", "picture.png.json", "decided.png.json"}
    repeated = list(sdk.batch(prompts, folder))
    assert all(outcome.file is None and outcome.error is None for outcome in repeated)


# ---------------------------------------------------------------- threads


def test_threads_are_alike(sdk, known):
    thread = sdk.open_thread()
    events = list(thread.send("a large red circle", steps=2))
    assert isinstance(events[-1], TurnCompleted)
    (artifact,) = thread.get_artifacts()
    result = thread.fetch_artifact(artifact)
    assert result.prompt and result.frames.shape[1:] == (64, 64, 3)
    assert [kept.key for kept in thread.get_lineage()] == [artifact.key]
    branch = thread.fork(1)
    assert branch.id != thread.id and len(branch.get_turns()) == 1
    turn = list(branch.send("make it green", [Image.open(known["picture.png"])], steps=2))[-1].turn
    assert turn.attachments and turn.results[0].artifact.source == turn.attachments[0].key
    attached = branch.fetch_artifact(turn.attachments[0])
    assert "attached" in repr(attached)
    with pytest.raises(InvalidInput, match="manifest: "):
        _ = attached.manifest
    question = next(event for event in sdk.open_thread().send("make it blue") if isinstance(event, QuestionAsked))
    assert question.text
    with pytest.raises(InvalidInput, match="steps: "):
        list(thread.send("a large red circle", steps=0))
    with pytest.raises(InvalidInput, match="there is no thread 'nothing'"):
        sdk.open_thread("nothing")


# ---------------------------------------------------------------- cancellation


def wait_until_idle(wiring) -> None:
    """Wait until the service has no open job."""
    deadline = time.monotonic() + 10
    while any(state in ("queued", "running") for _, state, count in wiring.jobs.count_by_lane_and_state() if count):
        assert time.monotonic() < deadline, "the service is still at work"
        time.sleep(0.05)


def test_leaving_the_loop_cancels_the_turn(sdk, wiring):
    thread = sdk.open_thread()
    for event in thread.send("a small red circle moving right", steps=LONG_STEPS):
        if event.kind == "step":
            break
    wait_until_idle(wiring)
    assert thread.get_turns() == [] and thread.get_artifacts() == []
    events = list(thread.send("a large blue star", steps=1))  # the cancelled turn is not run first
    assert [turn.text for turn in thread.get_turns()] == ["a large blue star"]
    assert sum(isinstance(event, ArtifactReady) for event in events) >= 1


def test_leaving_the_loop_at_its_end_keeps_the_turn(sdk):
    thread = sdk.open_thread()
    for event in thread.send("a large blue star", steps=1):
        if isinstance(event, TurnCompleted):
            break
    assert len(thread.get_turns()) == 1


def test_cancelling_a_task_cancels_the_turn_and_the_clip(address, wiring):
    async def cancel_after(coroutine, seconds: float) -> None:
        task = asyncio.create_task(coroutine)
        await asyncio.sleep(seconds)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def follow(thread) -> None:
        async for _ in thread.send("a small red circle moving right", steps=LONG_STEPS):
            pass

    async def use_client() -> None:
        async with AsyncClient(address) as client:
            thread = await client.open_thread()
            await cancel_after(follow(thread), 0.5)
            await asyncio.to_thread(wait_until_idle, wiring)
            assert await thread.get_turns() == []
            options = {"image": False, "steps": LONG_STEPS}
            await cancel_after(client.generate("a red ball", **options), 0.5)
            await asyncio.to_thread(wait_until_idle, wiring)
            await cancel_after(client.generate("a red ball", **options), 0.0)  # before its id is known
            await cancel_after(client.generate_many("a red ball", 3, **options), 0.5)
            await asyncio.to_thread(wait_until_idle, wiring)

    asyncio.run(use_client())


def test_cancelling_a_task_cancels_a_studios_turn(weights, tmp_path):
    async def follow(thread) -> None:
        async for _ in thread.asend("a small red circle moving right", steps=LONG_STEPS):
            pass

    async def run() -> None:
        thread = Studio(weights=weights, device="cpu", home=tmp_path).open_thread()
        task = asyncio.create_task(follow(thread))
        await asyncio.sleep(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert thread.get_turns() == [] and not thread.has_unfinished_turn()

    asyncio.run(run())


def test_an_interrupt_cancels_the_clip_on_the_service(address, wiring):
    """Ctrl-C in a call of Client: Python raises KeyboardInterrupt in the main thread."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it
    with Client(address) as client:
        timer = threading.Timer(0.7, os.kill, [os.getpid(), signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            client.generate("a red ball", image=False, steps=LONG_STEPS)
        wait_until_idle(wiring)
    signal.signal(signal.SIGINT, previous)

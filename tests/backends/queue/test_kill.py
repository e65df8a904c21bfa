"""SIGKILL at random moments of conversations: every thread goes on and ends with the artifacts of an undisturbed run.

The planner, the checkpoints in SQLite, the store and the decoder are the real ones; what the untrained model would
say is scripted.  `OMNIVIDEO_KILLS=50 pytest tests/backends/queue/test_kill.py` for the long form.
"""

import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import torch
from langgraph.checkpoint.sqlite import SqliteSaver

from omnivideo.agent.graph import Planner
from omnivideo.agent.thread import Thread
from omnivideo.backends.decoder.renderer import Renderer
from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.queue.local import LocalQueue
from omnivideo.contracts import Artifact, MLLMRequest, Route
from omnivideo.media.artifacts import store_user_file
from omnivideo.presets import TINY
from omnivideo.storage.objects.local import LocalObjectStore
from tests.support.twins import ScriptedMLLM

KILLS = int(os.environ.get("OMNIVIDEO_KILLS", "6"))
SAID = ("a red ball; make it blue; how many balls are there?", "a picture of a star", "go back to the red one",
        "a shape like a coin")  # fmt: skip


class HalfScripted(LocalMLLM):
    """Real visual tokens; the words by rule."""

    script = ScriptedMLLM()

    def route(self, request: MLLMRequest) -> Route:
        return self.script.route(request)

    def stream_text(self, request: MLLMRequest, max_tokens: int | None = None):
        yield from self.script.stream_text(request)

    def score_agreement(self, request: MLLMRequest) -> float:
        return 0.4 if "red" in request.text else 0.9


def thread_in(home: Path, omni) -> Thread:
    home.mkdir(exist_ok=True)
    store = LocalObjectStore(home / "store")
    planner = Planner(HalfScripted(omni, store), LocalQueue(Renderer(omni, store, "random")), TINY)
    saver = SqliteSaver(sqlite3.connect(home / "threads.sqlite", check_same_thread=False))
    thread = Thread(planner.build_graph(saver), "talk", lambda path, made_by: store_user_file(store, path, made_by))
    return thread if thread.exists() else thread.initialize_state()


def talk_on(home: Path, omni) -> list[Artifact]:
    """Says what is left to say."""
    thread = thread_in(home, omni)
    list(thread.resume())
    for text in SAID[len(thread.get_turns()) :]:
        list(thread.send(text, steps=3, check=2))
    return thread.get_artifacts()


def killed_after(seconds: float, home: Path, omni) -> bool:
    """A child process that talks on and is killed; whether it was still at it."""
    child = os.fork()
    if child == 0:
        try:
            talk_on(home, omni)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_conversations_end_with_the_same_artifacts(omni, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child cannot use the parent's pool
    try:
        began = time.perf_counter()
        expected = [(one.key, one.source, one.created_by) for one in talk_on(tmp_path / "whole", omni)]
        whole = time.perf_counter() - began
        rng, kills, conversation = random.Random(0), 0, 0
        while kills < KILLS:
            home = tmp_path / str(conversation)
            conversation += 1
            while kills < KILLS and killed_after(rng.uniform(0, 0.6) * whole, home, omni):
                kills += 1
            assert [(one.key, one.source, one.created_by) for one in talk_on(home, omni)] == expected
    finally:
        torch.set_num_threads(threads)
    assert len(expected) == 4

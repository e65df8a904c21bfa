"""Conversations that are killed at random moments continue and end with the artifacts of an uninterrupted run.

The planner, the SQLite checkpoints, the store and the decoder are real; the text of the untrained model is scripted.
`OMNIVIDEO_KILLS=50 pytest tests/backends/queue/test_kill.py` runs the long version.
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
from omnivideo.backends.queue.local import LocalQueue
from omnivideo.contracts import Artifact
from omnivideo.media.artifacts import store_user_file
from omnivideo.presets import TINY
from omnivideo.storage.objects.local import LocalObjectStore
from tests.support.twins import MLLMWithScriptedText

KILLS = int(os.environ.get("OMNIVIDEO_KILLS", "6"))
TEXTS = ("a red ball; make it blue; how many balls are there?", "a picture of a star", "go back to the red one",
        "a shape like a coin")  # fmt: skip


def open_thread(home: Path, omni) -> Thread:
    home.mkdir(exist_ok=True)
    store = LocalObjectStore(home / "store")
    planner = Planner(MLLMWithScriptedText(omni, store), LocalQueue(Renderer(omni, store, "random")), TINY)
    checkpointer = SqliteSaver(sqlite3.connect(home / "threads.sqlite", check_same_thread=False))
    thread = Thread(
        planner.build_graph(checkpointer), "talk", lambda path, made_by: store_user_file(store, path, made_by)
    )
    return thread if thread.exists() else thread.initialize_state()


def continue_conversation(home: Path, omni) -> list[Artifact]:
    """Resume the open turn, run the remaining turns, and return the artifacts."""
    thread = open_thread(home, omni)
    list(thread.resume())
    for text in TEXTS[len(thread.get_turns()) :]:
        list(thread.send(text, steps=3, check=2))
    return thread.get_artifacts()


def kill_after(seconds: float, home: Path, omni) -> bool:
    """Continue the conversation in a child process, kill it, and return whether it was still running."""
    child = os.fork()
    if child == 0:
        try:
            continue_conversation(home, omni)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_conversations_end_with_the_same_artifacts(omni, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child cannot use the parent's pool
    try:
        started_at = time.perf_counter()
        expected = [
            (artifact.key, artifact.source, artifact.created_by)
            for artifact in continue_conversation(tmp_path / "uninterrupted", omni)
        ]
        total_seconds = time.perf_counter() - started_at
        rng, kills, conversation = random.Random(0), 0, 0
        while kills < KILLS:
            home = tmp_path / str(conversation)
            conversation += 1
            while kills < KILLS and kill_after(rng.uniform(0, 0.6) * total_seconds, home, omni):
                kills += 1
            assert [
                (artifact.key, artifact.source, artifact.created_by) for artifact in continue_conversation(home, omni)
            ] == expected
    finally:
        torch.set_num_threads(threads)
    assert len(expected) == 4

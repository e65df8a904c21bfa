"""Threads in a real PostgreSQL database."""

import pytest

from omnivideo.agent.graph import Planner
from omnivideo.agent.thread import Thread
from omnivideo.errors import InvalidInput
from omnivideo.presets import TINY
from omnivideo.settings import load_settings
from omnivideo.storage.checkpointer import open_checkpointer
from omnivideo.turns import TurnCompleted
from omnivideo.wiring import ServiceWiring
from tests.support.servers import free_port, postgres
from tests.support.twins import InstantQueue, ScriptedMLLM


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with postgres(tmp_path_factory.mktemp("postgres")) as running:
        ServiceWiring(load_settings(database=running)).migrate_database()
        yield running


@pytest.fixture
def open_thread(address):
    """Yield a function that opens a thread over a new connection."""
    checkpointers = []

    def open_in_new_connection(name: str) -> Thread:
        checkpointers.append(checkpointer := open_checkpointer(load_settings(database=address)))
        graph = Planner(ScriptedMLLM(), InstantQueue(), TINY).build_graph(checkpointer)
        thread = Thread(graph, name, lambda path, made_by: None)
        return thread if thread.exists() else thread.initialize_state()

    yield open_in_new_connection
    for checkpointer in checkpointers:
        checkpointer.conn.close()


def test_a_thread_continues_over_another_connection(open_thread):
    thread = open_thread("talk")
    assert isinstance(list(thread.send("a red ball; make it blue"))[-1], TurnCompleted)
    reopened = open_thread("talk")
    assert [turn.text for turn in reopened.get_turns()] == ["a red ball; make it blue"]
    artifact = list(reopened.fork(1, "branch").send("make it green"))[-1].turn.results[0].artifact
    assert artifact.source == reopened.get_artifacts()[-1].key


def test_an_interrupted_turn_is_resumed(open_thread):
    thread = open_thread("interrupted")
    running = thread.send("a red ball; now make it blue")
    for _ in range(5):
        next(running)
    del running
    reopened = open_thread("interrupted")
    assert isinstance(list(reopened.resume())[-1], TurnCompleted)
    assert [artifact.caption for artifact in reopened.get_artifacts()] == ["a red ball", "make it blue"]


def test_an_unreachable_server_is_reported():
    with pytest.raises(InvalidInput, match="OMNIVIDEO_DATABASE: the server cannot be reached"):
        open_checkpointer(load_settings(database=f"postgresql://test@127.0.0.1:{free_port()}/postgres"))

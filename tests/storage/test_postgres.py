"""Threads in a real PostgreSQL."""

import pytest

from omnivideo.agent.graph import Planner
from omnivideo.agent.thread import Thread
from omnivideo.errors import InvalidInput
from omnivideo.presets import TINY
from omnivideo.settings import load_settings
from omnivideo.storage.checkpointer import open_checkpointer
from omnivideo.turns import TurnCompleted
from tests.support.servers import free_port, postgres
from tests.support.twins import InstantQueue, ScriptedMLLM


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with postgres(tmp_path_factory.mktemp("postgres")) as running:
        yield running


@pytest.fixture
def thread_in(address):
    """Opens a thread over a connection of its own."""
    opened = []

    def opening(name: str) -> Thread:
        opened.append(saver := open_checkpointer(load_settings(database=address)))
        graph = Planner(ScriptedMLLM(), InstantQueue(), TINY).build_graph(saver)
        thread = Thread(graph, name, lambda path, made_by: None)
        return thread if thread.exists() else thread.initialize_state()

    yield opening
    for saver in opened:
        saver.conn.close()


def test_a_thread_lives_on_in_another_connection(thread_in):
    thread = thread_in("talk")
    assert isinstance(list(thread.send("a red ball; make it blue"))[-1], TurnCompleted)
    again = thread_in("talk")
    assert [turn.text for turn in again.get_turns()] == ["a red ball; make it blue"]
    made = list(again.fork(1, "branch").send("make it green"))[-1].turn.results[0].artifact
    assert made.source == again.get_artifacts()[-1].key


def test_a_cut_turn_goes_on(thread_in):
    thread = thread_in("cut")
    running = thread.send("a red ball; now make it blue")
    for _ in range(5):
        next(running)
    del running
    again = thread_in("cut")
    assert isinstance(list(again.resume())[-1], TurnCompleted)
    assert [one.caption for one in again.get_artifacts()] == ["a red ball", "make it blue"]


def test_a_server_that_is_not_there_is_said():
    with pytest.raises(InvalidInput, match="OMNIVIDEO_DATABASE: the server cannot be reached"):
        open_checkpointer(load_settings(database=f"postgresql://test@127.0.0.1:{free_port()}/postgres"))

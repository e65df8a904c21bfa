"""Threads of version 0.1 continue in 0.2, from SQLite and from PostgreSQL.

checkpoints_0_1/ has checkpoints written by version 0.1, and the script that created them.
"""

import gzip
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver

from omnivideo.agent.graph import Planner
from omnivideo.agent.thread import Thread
from omnivideo.presets import TINY
from omnivideo.settings import load_settings
from omnivideo.storage import checkpointer as checkpointers
from omnivideo.turns import ArtifactReady, QuestionAsked, Turn, TurnCompleted
from omnivideo.wiring import ServiceWiring
from tests.support.servers import postgres
from tests.support.twins import InstantQueue, ScriptedMLLM

STORED = Path(__file__).parent / "checkpoints_0_1" / "threads.sqlite.gz"
OLD_NAMES = {"about", "made_by", "act", "routed", "tries", "asked", "done", "pieces", "abouts", "failures", "over"}
OpenCheckpointer = Callable[[], BaseCheckpointSaver[str]]


def unpack_stored(home: Path) -> Path:
    home.mkdir(exist_ok=True)
    path = home / "threads.sqlite"
    path.write_bytes(gzip.decompress(STORED.read_bytes()))
    return path


def copy_checkpoints(source: BaseCheckpointSaver[str], target: BaseCheckpointSaver[str]) -> None:
    """Copy every checkpoint and every pending write of a store to another one unchanged."""
    for entry in sorted(source.list(None), key=lambda entry: entry.checkpoint["id"]):
        config = entry.parent_config or {"configurable": {**entry.config["configurable"], "checkpoint_id": None}}
        versions = entry.checkpoint["channel_versions"]
        stored_config = target.put(config, entry.checkpoint, entry.metadata, versions)
        writes_by_task: dict[str, list[tuple[str, Any]]] = {}
        for task_id, channel, value in entry.pending_writes or []:
            writes_by_task.setdefault(task_id, []).append((channel, value))
        for task_id, writes in writes_by_task.items():
            target.put_writes(stored_config, writes, task_id)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def open_upgraded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OpenCheckpointer]:
    """A function that opens the stored threads, which the first call converts."""
    folder = tmp_path_factory.mktemp("upgrade")
    stored = unpack_stored(folder)
    if request.param == "sqlite":
        yield lambda: checkpointers.open_checkpointer(load_settings(home=folder))
        return
    with postgres(folder / "postgres") as address:
        with PostgresSaver.from_conn_string(address) as target:  # as 0.1 wrote them: nothing is compact
            target.setup()
            copy_checkpoints(SqliteSaver(sqlite3.connect(stored, check_same_thread=False)), target)
        settings = load_settings(database=address)
        ServiceWiring(settings).migrate_database()
        yield lambda: checkpointers.open_checkpointer(settings)


@pytest.fixture
def open_thread(open_upgraded: OpenCheckpointer) -> Iterator[Callable[[str], Thread]]:
    checkpointer: Any = open_upgraded()
    graph = Planner(ScriptedMLLM(), InstantQueue(), TINY).build_graph(checkpointer)
    yield lambda name: Thread(graph, name, lambda path, created_by: pytest.fail("nothing is attached"))
    checkpointer.conn.close()


def send(thread: Thread, text: str, **options: object) -> Turn:
    last = list(thread.send(text, **options))[-1]
    assert isinstance(last, TurnCompleted)
    return last.turn


def find_names(value: object) -> set[str]:
    """Return the keys of all dicts within a value."""
    if isinstance(value, dict):
        return set(value).union(*map(find_names, value.values()))
    return set().union(*map(find_names, value)) if isinstance(value, list | tuple) else set()


def test_no_old_name_remains(open_upgraded: OpenCheckpointer) -> None:
    checkpointer: Any = open_upgraded()
    entries = list(checkpointer.list(None))
    assert len(entries) > 80
    for entry in entries:
        names = find_names(entry.checkpoint["channel_values"]) | set(entry.checkpoint["channel_versions"])
        names |= find_names(entry.checkpoint["versions_seen"])
        names |= {channel for _, channel, _ in entry.pending_writes}
        names |= find_names([value for _, _, value in entry.pending_writes])
        assert not names & OLD_NAMES
    checkpointer.conn.close()


def test_the_history_of_a_thread_is_kept(open_thread: Callable[[str], Thread]) -> None:
    first, second, third = open_thread("finished").get_turns()[:3]
    ball, blue_ball = (result.artifact for result in first.results)
    assert ball and blue_ball and blue_ball.source == ball.key and blue_ball.caption == "make it blue"
    (result,) = second.results
    assert result.trace and result.trace.rewrite == "plainly a picture of something round"
    assert [candidate.agreement for candidate in result.candidates] == [0.2, 0.9]
    assert third.attachments[0].created_by == "finished/attached" and third.results[0].answer == "it is photo.png"
    assert len(open_thread("finished").get_artifacts()) >= 4


def test_a_thread_continues_and_can_be_forked_at_any_turn(open_thread: Callable[[str], Thread]) -> None:
    thread = open_thread("finished")
    branch = thread.fork(1, "branch")
    edited = send(branch, "make it green").results[0].artifact
    assert edited and edited.source == thread.get_turns()[0].results[1].artifact.key  # type: ignore[union-attr]
    old_branch = open_thread("forked")
    assert len(old_branch.get_turns()) == 1
    assert send(old_branch, "make it green").number == 2
    assert send(thread, "make it green").results[0].artifact


def test_an_open_question_about_an_artifact_is_answered(open_thread: Callable[[str], Thread]) -> None:
    thread = open_thread("paused")
    question = thread.get_open_question()
    assert question and question.startswith("There is no fifth clip here. Which one do you mean? 1) ")
    turn = send(thread, "the first")
    assert turn.clarifications == ((question, "the first"),)
    artifact = turn.results[0].artifact
    assert artifact and artifact.source == thread.get_turns()[0].results[0].artifact.key  # type: ignore[union-attr]


def test_an_open_question_about_the_route_is_answered(open_thread: Callable[[str], Thread]) -> None:
    thread = open_thread("unsure")
    assert thread.get_open_question()
    artifact = send(thread, "a picture please").results[0].artifact
    assert artifact and artifact.caption == "something"


def test_an_interrupted_turn_is_completed(open_thread: Callable[[str], Thread]) -> None:
    thread = open_thread("killed")
    events = list(thread.resume())
    assert not any(isinstance(event, QuestionAsked) for event in events)
    assert len([event for event in events if isinstance(event, ArtifactReady)]) == 1
    edit, answer = thread.get_turns()[1].results
    assert edit.artifact and edit.artifact.source == "photo.png" and answer.answer == "it is make it blue"


def test_a_thread_with_a_failed_turn_takes_new_job_ids(open_thread: Callable[[str], Thread]) -> None:
    thread = open_thread("failed")
    artifact = send(thread, "make it blue").results[0].artifact
    assert artifact and artifact.created_by == "failed/2.1.1.1"  # .1: one turn has failed


def test_a_conversion_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omnivideo.storage import checkpoint_upgrade

    unpack_stored(tmp_path)
    calls: list[str] = []

    def fail_late(channel: str, value: object) -> object:
        calls.append(channel)
        if len(calls) > 500:
            raise RuntimeError("killed")
        return value

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(checkpoint_upgrade, "convert_value", fail_late)
        checkpointers.open_checkpointer(load_settings(home=tmp_path))
    checkpointer: Any = checkpointers.open_checkpointer(load_settings(home=tmp_path))
    graph = Planner(ScriptedMLLM(), InstantQueue(), TINY).build_graph(checkpointer)
    thread = Thread(graph, "finished", lambda path, created_by: pytest.fail("nothing is attached"))
    assert len(thread.get_turns()) == 3
    checkpointer.conn.close()

"""Conversations of many turns: the size of their checkpoints, forks, and states that older versions can read."""

import sqlite3
import time
import tracemalloc

import pytest
from langgraph.checkpoint.sqlite import SqliteSaver

from omnivideo.agent.thread import Thread, progress_from_state
from omnivideo.errors import ServiceStopping
from omnivideo.storage.compact_checkpoints import open_sqlite_saver
from omnivideo.turns import ThreadProgress
from tests.support.conversations import Conversation
from tests.support.servers import postgres

NUM_TURNS = 60
MAX_BYTES_PER_TURN = 30_000


@pytest.fixture(scope="module")
def postgres_address(tmp_path_factory):
    with postgres(tmp_path_factory.mktemp("postgres")) as address:
        yield address


@pytest.fixture(params=["sqlite", "postgresql"])
def saver(request, tmp_path):
    if request.param == "sqlite":
        connection = sqlite3.connect(tmp_path / "threads.sqlite", check_same_thread=False)
        yield open_sqlite_saver(connection)
        connection.close()
        return
    from omnivideo.storage.checkpointer import open_postgres_checkpointer

    saver = open_postgres_checkpointer(request.getfixturevalue("postgres_address"))
    saver.setup()
    yield saver
    saver.conn.close()


def count_bytes(saver) -> int:
    """Return the bytes of all values in the tables of checkpoints."""
    if isinstance(saver, SqliteSaver):
        columns = {"checkpoints": "length(checkpoint) + length(metadata)", "writes": "length(value)",
                   "checkpoint_items": "length(value)"}  # fmt: skip
    else:
        columns = {"checkpoints": "pg_column_size(checkpoint) + pg_column_size(metadata)",
                   "checkpoint_blobs": "coalesce(length(blob), 0)", "checkpoint_writes": "length(blob)",
                   "checkpoint_items": "length(value)"}  # fmt: skip
    return sum(
        int(saver.fetch_rows(f"SELECT coalesce(sum({size}), 0) FROM {table}")[0][0]) for table, size in columns.items()
    )


def count_checkpoints(saver, name: str) -> int:
    """Return the number of checkpoints, without the packed form that the newest one has beside it."""
    query = "SELECT count(*) FROM checkpoints WHERE thread_id = ? AND checkpoint_ns <> 'packed'"
    return int(saver.fetch_rows(query, (name,))[0][0])


def hold_conversation(saver, name: str, num_turns: int) -> Conversation:
    conversation = Conversation(saver, name)
    for number in range(num_turns):
        conversation.say("a picture of a red ball" if number % 2 else "make it blue" if number else "a star")
    return conversation


def test_checkpoints_grow_linearly_with_the_turns(saver):
    conversation, sizes = hold_conversation(saver, f"linear-{time.monotonic_ns()}", 0), []
    before = count_bytes(saver)
    for _ in range(3):
        for number in range(NUM_TURNS // 3):
            conversation.say("a picture of a red ball" if number % 2 else "a blue star")
        sizes.append(count_bytes(saver) - before)
    first, second, third = sizes[0], sizes[1] - sizes[0], sizes[2] - sizes[1]
    assert sizes[-1] / NUM_TURNS < MAX_BYTES_PER_TURN
    assert third < 1.5 * second < 3 * first
    assert count_checkpoints(saver, conversation.thread.id) == NUM_TURNS + 1
    assert [turn.number for turn in conversation.thread.get_turns()] == list(range(1, NUM_TURNS + 1))


def test_every_turn_can_be_forked_and_continued(saver):
    conversation = hold_conversation(saver, f"source-{time.monotonic_ns()}", 8)
    turns, artifacts = conversation.thread.get_turns(), conversation.thread.get_artifacts()
    for num_turns in (0, 1, 5, 8):
        name = f"fork-{num_turns}-{time.monotonic_ns()}"
        branch = conversation.thread.fork(num_turns, name)
        assert branch.get_turns() == turns[:num_turns]
        assert branch.get_artifacts() == artifacts[: len(branch.get_artifacts())]
        continued = Conversation(saver, name)
        assert continued.say("a green star").number == num_turns + 1
        assert continued.thread.get_turns()[:-1] == turns[:num_turns]
    assert conversation.thread.get_turns() == turns


def test_whether_a_conversation_exists_is_known_without_reading_it(saver, monkeypatch):
    """Its newest checkpoint has all turns: reading 2,000 takes 40 ms, and a turn opens its thread twice."""
    conversation = hold_conversation(saver, f"existing-{time.monotonic_ns()}", 2)
    monkeypatch.setattr(saver, "get_tuple", None)
    graph, attach = conversation.thread.graph, conversation.thread.attach_file
    assert conversation.thread.exists() and not Thread(graph, "absent", attach).exists()


def test_a_turn_reads_the_state_of_its_thread_once(saver, monkeypatch):
    conversation = hold_conversation(saver, f"once-{time.monotonic_ns()}", 3)
    num_reads, read = 0, saver.get_tuple

    def count_read(config):
        nonlocal num_reads
        num_reads += 1
        return read(config)

    monkeypatch.setattr(saver, "get_tuple", count_read)
    progress = conversation.thread.get_progress()
    assert progress == ThreadProgress(3, False, None) and num_reads == 0
    assert conversation.say("make it blue").number == 4 and num_reads == 1


def test_steps_are_written_without_the_turns_before(saver):
    """What a turn writes before it is complete must not depend on how many turns there were."""
    conversation, sizes = hold_conversation(saver, f"steps-{time.monotonic_ns()}", 1), []
    for num_turns in (1, 1, 30):
        for _ in range(num_turns):
            conversation.say("a picture of a red ball")
        before = count_bytes(saver)
        stop_in_a_step(conversation)
        sizes.append(count_bytes(saver) - before)
        assert list(conversation.thread.resume())[-1].turn.text == "a green ball"
    assert sizes[2] < 1.1 * sizes[1], sizes  # the first turn that is resumed adds to LangGraph's own notes


def stop_in_a_step(conversation: Conversation) -> None:
    """Stop the process while a clip is rendered."""
    conversation.queue.fails = ServiceStopping()
    with pytest.raises(ServiceStopping):
        conversation.say("a green ball")
    conversation.queue.fails = None


def test_another_process_continues_a_step(saver):
    conversation = hold_conversation(saver, f"stopped-{time.monotonic_ns()}", 3)
    turns, artifacts = conversation.thread.get_turns(), conversation.thread.get_artifacts()
    stop_in_a_step(conversation)
    other = Conversation(saver, conversation.thread.id)
    progress = other.thread.get_progress()
    assert progress.num_turns == 3 and progress.has_unfinished_turn
    assert other.thread.get_turns() == turns and other.thread.get_artifacts() == artifacts
    assert list(other.thread.resume())[-1].turn.number == 4 and len(other.queue.jobs) == 1
    assert other.thread.get_turns()[:3] == turns and len(other.thread.get_artifacts()) == len(artifacts) + 1
    assert other.say("make it blue").number == 5
    assert [len(other.thread.fork(count, f"f{count}-{time.monotonic_ns()}").get_turns()) for count in (3, 4)] == [3, 4]


def test_a_turn_is_rolled_back_from_a_step(saver):
    conversation = hold_conversation(saver, f"rolled-{time.monotonic_ns()}", 3)
    turns = conversation.thread.get_turns()
    stop_in_a_step(conversation)
    conversation.thread.roll_back(3)
    assert conversation.thread.get_turns() == turns and not conversation.thread.has_unfinished_turn()
    assert conversation.say("a red ball").number == 4


def test_progress_is_that_of_the_state(saver):
    conversation = hold_conversation(saver, f"progress-{time.monotonic_ns()}", 1)
    thread = conversation.thread

    def check(num_turns, has_unfinished_turn, question):
        progress = thread.get_progress()
        assert progress == ThreadProgress(num_turns, has_unfinished_turn, question, progress.question_id)
        assert progress == progress_from_state(thread.graph.get_state(thread.config))
        return progress.question_id

    assert check(1, False, None) is None
    question = conversation.say("go back to the purple one").text
    first_id = check(1, False, question)
    question = conversation.say("what?").text
    assert None is not check(1, False, question) != first_id
    conversation.say("number 1")
    check(2, False, None)
    stop_in_a_step(conversation)
    check(2, True, None)
    list(thread.resume())
    check(3, False, None)
    thread.remove_turns_after(1)
    check(1, False, None)
    assert conversation.say("a red ball").number == 2


def test_a_question_and_a_failed_turn_survive_compaction(saver):
    conversation = Conversation(saver, f"failing-{time.monotonic_ns()}")
    conversation.say("a red ball")
    conversation.queue.fails = RuntimeError("unexpected")
    with pytest.raises(RuntimeError):
        conversation.say("a blue ball")
    conversation.queue.fails = None
    question = conversation.say("go back to the purple one")
    assert "no purple one" in question.text
    again = Conversation(saver, conversation.thread.id)
    assert again.say("number 1").number == 2
    assert [turn.text for turn in again.thread.get_turns()] == ["a red ball", "go back to the purple one"]


def test_an_older_version_reads_the_newest_state(tmp_path):
    connection = sqlite3.connect(tmp_path / "threads.sqlite", check_same_thread=False)
    conversation = hold_conversation(open_sqlite_saver(connection), "talk", 5)
    older = Conversation(SqliteSaver(connection), "talk")
    assert older.thread.get_turns() == conversation.thread.get_turns()
    assert older.say("a green star").number == 6
    newer = Conversation(open_sqlite_saver(connection), "talk")
    assert newer.say("a red star").number == 7 and len(newer.thread.get_turns()) == 7
    assert len(newer.thread.fork(3, "fork").get_turns()) == 3
    connection.close()


def test_an_older_version_gets_the_reply_to_a_question(tmp_path):
    connection = sqlite3.connect(tmp_path / "threads.sqlite", check_same_thread=False)
    conversation = hold_conversation(open_sqlite_saver(connection), "talk", 3)
    question = conversation.say("go back to the purple one")
    older = Conversation(SqliteSaver(connection), "talk")
    assert older.thread.get_open_question() == question.text and len(older.thread.get_turns()) == 3
    assert older.say("number 1").number == 4
    newer = Conversation(open_sqlite_saver(connection), "talk")
    assert newer.say("a red star").number == 5 and len(newer.thread.get_artifacts()) == 4
    connection.close()


def test_an_older_version_repeats_a_turn_that_stopped_in_a_step(tmp_path):
    connection = sqlite3.connect(tmp_path / "threads.sqlite", check_same_thread=False)
    conversation = hold_conversation(open_sqlite_saver(connection), "talk", 3)
    stop_in_a_step(conversation)
    older = Conversation(SqliteSaver(connection), "talk")
    assert len(older.thread.get_turns()) == 3 and not older.thread.has_unfinished_turn()
    assert older.say("a green ball").number == 4
    assert older.queue.jobs[-1].id == conversation.queue.jobs[-1].id
    newer = Conversation(open_sqlite_saver(connection), "talk")
    assert not newer.thread.has_unfinished_turn() and newer.say("a red star").number == 5
    assert [turn.number for turn in newer.thread.get_turns()] == [1, 2, 3, 4, 5]
    connection.close()


def test_a_fork_of_the_first_turn_takes_little_memory_and_time(tmp_path):
    connection = sqlite3.connect(tmp_path / "threads.sqlite", check_same_thread=False)
    conversation = hold_conversation(open_sqlite_saver(connection), "talk", NUM_TURNS)
    tracemalloc.start()
    started_at = time.thread_time()
    conversation.thread.fork(1, "fork")
    assert time.thread_time() - started_at < 1.0 and tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()
    connection.close()


def test_a_deleted_conversation_leaves_nothing(saver, tmp_path):
    before = count_bytes(saver)
    deleted, kept = hold_conversation(saver, "deleted", 4), hold_conversation(saver, "kept", 3)
    kept_bytes = count_bytes(saver)
    saver.delete_thread("deleted")
    saver.erase_freed_space()
    assert before < count_bytes(saver) < kept_bytes and count_checkpoints(saver, "deleted") == 0
    assert saver.fetch_rows("SELECT count(*) FROM checkpoint_items WHERE thread_id = ?", ("deleted",)) == [(0,)]
    assert len(kept.thread.get_turns()) == 3 and not deleted.thread.exists()
    if isinstance(saver, SqliteSaver):
        files = [path.read_bytes() for path in tmp_path.glob("threads.sqlite*")]
        assert files and not any(b"deleted" in data for data in files)

"""Turns whose processes are lost, stop, or fail, and turns that wait for a free slot."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import psycopg
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from sqlalchemy import insert, update
from sqlalchemy.exc import IntegrityError

from omnivideo.agent.conversations import Conversations
from omnivideo.api import turn_runner
from omnivideo.api.errors import is_transient
from omnivideo.api.event_feed import EventFeed
from omnivideo.api.turn_runner import TurnRunner
from omnivideo.backends.queue.durable import DurableQueue
from omnivideo.contracts import Change, Job
from omnivideo.errors import ArtifactNotFound, ModelUnavailable, StoreError
from omnivideo.presets import TINY
from omnivideo.storage.compact_checkpoints import open_sqlite_saver
from omnivideo.storage.database.engine import create_memory_database
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.notifications import turn_topic
from omnivideo.storage.database.schema import turns as turns_table
from omnivideo.storage.database.turns import TurnRepository
from omnivideo.storage.objects.memory import MemoryObjectStore
from omnivideo.turns import Plan, PlanReady, TurnRecord
from tests.support.openai_service import wait_until
from tests.support.twins import InstantQueue, ScriptedMLLM

TIMEOUT_SECONDS = 0.6


class HookedQueue(InstantQueue):
    """A queue that calls `before_render` with each job first."""

    def __init__(self) -> None:
        super().__init__()
        self.before_render: Callable[[Job], None] = lambda job: None

    def run(self, job: Job) -> Iterator:
        self.before_render(job)
        yield from super().run(job)


class Service:
    """The stores and the runner of one service; `restart` replaces the runner, as a new process does."""

    def __init__(self, saver=None, slots: int = 16):
        engine = create_memory_database()
        self.turns, self.jobs = TurnRepository(engine), JobRepository(engine)
        self.mllm, self.queue, self.slots = ScriptedMLLM(), HookedQueue(), slots
        self.conversations = Conversations(
            mllm=self.mllm, queue_for=lambda *arguments: self.queue, store=MemoryObjectStore(),  # type: ignore[arg-type]
            checkpointer=saver or InMemorySaver(), attach_file=lambda path, created_by: None, preset=TINY,  # type: ignore[arg-type, return-value]
        )  # fmt: skip
        self.runner = self.create_runner()

    def create_runner(self) -> TurnRunner:
        return TurnRunner(self.turns, self.jobs, self.conversations, TIMEOUT_SECONDS, self.slots)

    def restart(self) -> None:
        self.runner.stop()
        self.runner = self.create_runner().start()

    def create_turn(self, thread_id: str, text: str, owner: str = "ann") -> str:
        if not self.turns.has_thread(thread_id, owner):
            self.turns.create_thread(thread_id, owner)
        turn_id = f"turn_{time.monotonic_ns()}"
        self.runner.start_turn(turn_id, owner, thread_id, text)
        return turn_id

    def get_turn(self, turn_id: str, owner: str = "ann") -> TurnRecord:
        turn = self.turns.get_turn(turn_id, owner)
        assert turn is not None
        return turn

    def wait_for(self, turn_id: str, owner: str = "ann", seconds: float = 30.0) -> TurnRecord:
        return wait_until(
            lambda: (turn := self.get_turn(turn_id, owner)).state not in ("queued", "running") and turn, seconds
        )

    def list_prompts(self, thread_id: str) -> list[str]:
        """Return the caption of each artifact of the thread: the prompt that it was rendered from."""
        return [artifact.caption for artifact in self.runner.get_thread("ann", thread_id).get_artifacts()]

    def lose_process(self, turn_id: str) -> None:
        """Leave the turn as a killed process leaves it: running, with an old heartbeat."""
        self.turns.fetch_all(
            update(turns_table)
            .where(turns_table.c.id == turn_id)
            .values(heartbeat_at=turns_table.c.heartbeat_at - 3600)
        )


@pytest.fixture
def service():
    service = Service()
    yield service
    service.runner.stop()


def count_losses(service: Service, turn_id: str) -> int:
    row = service.turns.fetch_one(turns_table.select().where(turns_table.c.id == turn_id))
    assert row is not None
    return row.process_losses


# ---------------------------------------------------------------- losses and stops


def test_a_turn_that_kills_its_process_ends_with_a_reason(service):
    turn_id = service.create_turn("thread", "a red ball")
    for attempt in (1, 2, 3):
        turn = service.turns.claim_next_turn(TIMEOUT_SECONDS)
        assert turn is not None and turn.attempt == attempt
        service.lose_process(turn_id)
    service.runner.start()
    turn = service.wait_for(turn_id)
    assert turn.state == "failed" and turn.error is not None and turn.error["code"] == "poison"
    assert "stopped 3 processes" in turn.error["message"] and turn.attempt == 3
    assert service.wait_for(service.create_turn("thread", "a blue ball")).state == "done"
    assert service.list_prompts("thread") == ["a blue ball"]


def test_a_turn_that_waits_for_a_clip_stops_at_once_and_continues_with_the_same_clip(service):
    """The clip is in the database, and nothing renders it while the first process runs."""
    queue = DurableQueue(service.jobs, MemoryObjectStore(), SimpleNamespace(notify_workers=lambda: None))
    service.queue.run = queue.run
    service.runner.start()
    turn_id = service.create_turn("thread", "a red ball")
    wait_until(service.jobs.count_queued)
    started_at = time.monotonic()
    service.runner.stop()
    assert time.monotonic() - started_at < 2 and not service.runner.running_turns
    assert not any(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())
    service.jobs.is_stopping.clear()  # a new process
    service.restart()
    wait_until(lambda: service.get_turn(turn_id).attempt == 2)
    assert service.jobs.count_queued() == 1
    service.jobs.cancel("thread/1.1.1")
    assert service.wait_for(turn_id).state == "cancelled" and count_losses(service, turn_id) == 0


def test_a_turn_that_was_lost_after_its_last_event_has_one_end(service):
    turn_id = service.create_turn("thread", "a red ball")
    turn = service.turns.claim_next_turn(TIMEOUT_SECONDS)
    for event in service.runner.iterate_events(turn, service.runner.get_thread("ann", "thread"), False):
        service.turns.append_event(turn, event.model_dump())
    service.lose_process(turn_id)
    service.runner.start()
    assert service.wait_for(turn_id).state == "done"
    assert [event["kind"] for _, event in service.turns.list_events(turn_id)].count("done") == 1


def test_a_stop_hands_a_turn_back_and_is_no_loss(service):
    started, proceed = threading.Event(), threading.Event()
    service.queue.before_render = lambda job: (started.set(), proceed.wait(20))
    service.runner.start()
    turn_id = service.create_turn("thread", "a red ball")
    turn_runner.STOP_TIMEOUT_SECONDS = 0.1
    for _ in range(4):
        assert started.wait(20)
        started.clear()
        service.restart()
    proceed.set()
    assert service.wait_for(turn_id).state == "done" and count_losses(service, turn_id) == 0


def test_turns_wait_for_a_free_slot_without_being_lost():
    """The heartbeat timeout is shorter than the time that most of the turns wait."""
    service = Service(slots=4)
    service.queue.before_render = lambda job: time.sleep(0.3)
    service.runner.start()
    turn_ids = [service.create_turn(f"thread{index}", "a red ball") for index in range(20)]
    ended = [service.wait_for(turn_id) for turn_id in turn_ids]
    service.runner.stop()
    assert {(turn.state, turn.attempt) for turn in ended} == {("done", 1)}
    assert len(service.queue.jobs) == 20


def test_a_late_heartbeat_of_an_earlier_attempt_does_not_stop_the_next_one(service, monkeypatch):
    """On a busy machine a process takes over its own turn; the new attempt was then ended as cancelled."""
    turn_id, heartbeat = service.create_turn("thread", "a red ball"), service.turns.heartbeat
    service.runner.running_turns[turn_id] = service.turns.claim_next_turn(60.0)

    def take_over_meanwhile(turn):
        service.turns.fetch_all(update(turns_table).values(heartbeat_at=0.0))
        service.runner.running_turns[turn_id] = service.turns.claim_next_turn(1.0)
        return heartbeat(turn)

    monkeypatch.setattr(service.turns, "heartbeat", take_over_meanwhile)
    service.runner.send_heartbeats()
    second = service.runner.running_turns[turn_id]
    assert second.attempt == 2
    service.runner.stop_if_interrupted(second)  # it raises if this attempt must stop


FIVE_BALLS = "; then ".join(["a red ball"] * 5)  # more than a turn renders without a question


@pytest.fixture(params=["memory", "compact"])
def questioned(request, tmp_path):
    """A service whose thread waits for a reply, before it is started again."""
    connection = sqlite3.connect(tmp_path / "threads.sqlite", check_same_thread=False)
    service = Service(open_sqlite_saver(connection) if request.param == "compact" else None)
    service.runner.start()
    assert service.wait_for(service.create_turn("thread", FIVE_BALLS)).state == "asks"
    service.runner.stop()
    service.runner = service.create_runner()
    yield service
    service.runner.stop()
    connection.close()


def test_a_reply_is_not_lost_with_a_process_that_had_shown_its_plan(questioned):
    reply = questioned.create_turn("thread", "yes")
    turn = questioned.turns.claim_next_turn(60.0)
    assert turn is not None
    questioned.turns.append_event(turn, PlanReady(plan=Plan(actions=())).model_dump())
    questioned.lose_process(reply)
    questioned.restart()
    assert questioned.wait_for(reply).state == "done"
    assert questioned.list_prompts("thread") == ["a red ball"] * 4


def test_a_reply_that_has_asked_is_not_given_to_its_own_question(questioned):
    reply = questioned.create_turn("thread", "a picture of a red blue circle")
    questioned.restart()
    assert questioned.wait_for(reply).state == "asks"
    questioned.runner.stop()
    questioned.turns.fetch_all(
        update(turns_table).where(turns_table.c.id == reply).values(state="running", heartbeat_at=0.0)
    )
    questioned.restart()
    assert questioned.wait_for(reply).state == "asks"
    assert questioned.wait_for(questioned.create_turn("thread", "blue")).state == "done"
    assert len(questioned.list_prompts("thread")) == 1


def test_one_owner_leaves_slots_to_others(service):
    release = threading.Event()
    service.queue.before_render = lambda job: release.wait(30) if job.id.startswith("bulk") else None
    service.runner.start()
    for index in range(40):
        service.create_turn(f"bulk{index}", "a red ball", owner="bulk")
    wait_until(lambda: len(service.runner.running_turns) == 14)
    assert service.wait_for(service.create_turn("thread", "a blue ball"), seconds=10).state == "done"
    release.set()


# ---------------------------------------------------------------- failures


def test_a_turn_that_fails_unexpectedly_leaves_nothing_to_the_next_one(service):
    def fail(job: Job) -> None:
        if "red" in job.prompt:
            raise RuntimeError("unexpected")

    service.queue.before_render = fail
    service.runner.start()
    turn = service.wait_for(service.create_turn("thread", "a red ball"))
    assert turn.state == "failed" and turn.error is not None and turn.error["code"] == "internal"
    assert service.wait_for(service.create_turn("thread", "a blue square")).state == "done"
    assert service.list_prompts("thread") == ["a blue square"]


def test_steps_that_another_turn_has_left_are_not_run(service):
    thread = service.conversations.open_thread("thread", create=True, owner="ann")
    events = thread.send("a red ball")
    next(events)
    events.close()  # as a process that dies after its turn was ended
    assert thread.has_unfinished_turn()
    service.runner.start()
    assert service.wait_for(service.create_turn("thread", "a blue square")).state == "done"
    assert service.list_prompts("thread") == ["a blue square"]
    assert [turn.text for turn in thread.get_turns()] == ["a blue square"]


def test_a_locked_database_of_threads_delays_a_turn(tmp_path):
    path = tmp_path / "threads.sqlite"
    service = Service(SqliteSaver(sqlite3.connect(path, check_same_thread=False, timeout=0.2)))
    service.conversations.checkpointer.setup()  # type: ignore[attr-defined]
    lock = sqlite3.connect(path, check_same_thread=False)
    service.queue.before_render = lambda job: lock.execute("BEGIN IMMEDIATE") if "red" in job.prompt else None
    service.runner.start()
    red = service.create_turn("thread", "a red ball")
    time.sleep(2.0)
    service.queue.before_render = lambda job: None
    lock.rollback()
    assert service.wait_for(red).state == "done"
    assert service.wait_for(service.create_turn("thread", "a blue square")).state == "done"
    assert service.list_prompts("thread") == ["a red ball", "a blue square"]
    service.runner.stop()
    lock.close()


def test_a_turn_is_cancelled_while_it_retries(service):
    def fail(job) -> None:
        raise ModelUnavailable("the server does not answer")

    service.queue.before_render = fail
    service.runner.start()
    turn_id = service.create_turn("thread", "a red ball")
    wait_until(lambda: any(event["kind"] == "waiting" for _, event in service.turns.list_events(turn_id)))
    service.runner.cancel_turn(service.get_turn(turn_id))
    assert service.wait_for(turn_id, seconds=10).state == "cancelled"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (sqlite3.OperationalError("database is locked"), True),
        (psycopg.OperationalError("the connection is closed"), True),
        (psycopg.errors.AdminShutdown("it shuts down"), True),
        (StoreError("store: it does not answer"), True),
        (psycopg.DataError("text fields cannot contain NUL"), False),
        (sqlite3.IntegrityError("a constraint"), False),
        (ArtifactNotFound("store: there is no such artifact"), False),
        (RuntimeError("unexpected"), False),
    ],
)
def test_only_what_a_retry_can_fix_is_retried(error, expected):
    assert is_transient(error) == expected


# ---------------------------------------------------------------- two stores


def test_a_thread_is_completed_whose_process_was_killed_between_its_row_and_its_checkpoint(service):
    service.runner.start()
    service.wait_for(service.create_turn("thread", "a red ball"))
    service.wait_for(service.create_turn("thread", "a blue square"))
    service.turns.create_thread("fork", "ann", "thread", 1)  # and no checkpoint
    assert service.list_prompts("fork") == ["a red ball"]
    assert service.list_prompts("fork") == ["a red ball"]
    assert service.wait_for(service.create_turn("fork", "a green star")).state == "done"
    assert service.list_prompts("fork") == ["a red ball", "a green star"]
    service.turns.create_thread("empty", "ann")
    assert service.list_prompts("empty") == []


def test_the_database_refuses_a_second_open_turn_of_a_thread(service):
    service.create_turn("thread", "a red ball")
    row = service.turns.fetch_one(turns_table.select())
    assert row is not None
    with pytest.raises(IntegrityError):
        service.turns.fetch_all(insert(turns_table).values(dict(row._mapping) | {"id": "second"}))


# ---------------------------------------------------------------- followers


@pytest.mark.parametrize("last_number", [0, 40])
def test_a_late_and_slow_follower_gets_every_event(service, last_number):
    """Some events were written before it came, and the others while it did not read."""
    service.create_turn("thread", "a red ball")
    turn = service.turns.claim_next_turn(60.0)
    assert turn is not None
    for number in range(50):
        service.turns.append_event(turn, {"kind": "text", "delta": str(number)})

    async def follow() -> list[int]:
        numbers = []
        async for number, _ in EventFeed(service.turns, MemoryObjectStore()).follow_turn(turn.id, last_number):
            numbers.append(number)
            if number == 50:
                for index in range(50, 95):
                    await asyncio.to_thread(service.turns.append_event, turn, {"kind": "text", "delta": str(index)})
                service.turns.notifier.publish(Change(topic=turn_topic(turn.id), number=95, body={"kind": "text"}))
                await asyncio.to_thread(service.turns.end_turn, turn, "done")
        return numbers

    assert asyncio.run(follow()) == list(range(last_number + 1, 96))

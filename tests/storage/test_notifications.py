"""Followers are notified of events and ends: in one process, across processes, and after a lost connection."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from omnivideo.api.event_feed import EventFeed, NumberedEvent
from omnivideo.contracts import Artifact, Job, StepProgress, resolve_sampling_params
from omnivideo.presets import TINY
from omnivideo.storage.database import notifications
from omnivideo.storage.database.engine import create_database_engine, upgrade_schema
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.turns import TurnRepository
from omnivideo.storage.objects.memory import MemoryObjectStore
from omnivideo.turns import TurnRecord
from tests.support.claims import MODEL
from tests.support.servers import Postgres
from tests.support.slow_polls import slow_polls

ARTIFACT = Artifact(key="a.mp4", medium="video", width=64, height=64, frames=9, fps=8, caption="x", created_by="one")
WORKER_SCRIPT = """
import sys, time
from omnivideo.contracts import Artifact, ModelIdentity, StepProgress
from omnivideo.storage.database.engine import create_database_engine
from omnivideo.storage.database.jobs import JobRepository
jobs = JobRepository(create_database_engine(sys.argv[1]))
model = ModelIdentity(preset="tiny", weights="random", precision="float32")
claim = jobs.claim_next_job("worker", model)
for step in range(1, 6):
    sys.stdin.readline()
    print(time.monotonic(), flush=True)
    jobs.heartbeat(claim, StepProgress(step=step, steps=5, eta_seconds=0.0))
sys.stdin.readline()
jobs.mark_done(claim, Artifact(**eval(sys.argv[2])))
"""


def start_turn(turns: TurnRepository, turn_id: str = "turn") -> TurnRecord:
    """Create a thread with a running turn."""
    turns.create_thread(f"thread-{turn_id}", "ann")
    turns.create_turn(turn_id, f"thread-{turn_id}", "ann", 1, {"text": "a red ball"})
    turn = turns.claim_next_turn(60.0)
    assert turn is not None
    return turn


def build_job(job_id: str) -> Job:
    params = resolve_sampling_params(TINY, "text-to-video", seed=1)
    return Job(id=job_id, prompt="a red ball", visual_tokens=None, source=None, params=params)


class Follower:
    """Follow a turn in a thread, as a request to the service does, and record when each event arrives."""

    def __init__(self, turns: TurnRepository, turn_id: str = "turn"):
        self.feed, self.turn_id = EventFeed(turns, MemoryObjectStore()), turn_id
        self.events: list[NumberedEvent] = []
        self.arrived_at: list[float] = []
        self.thread = threading.Thread(target=lambda: asyncio.run(self.follow()))
        self.thread.start()

    async def follow(self) -> None:
        async for event in self.feed.follow_turn(self.turn_id):
            self.events.append(event)
            self.arrived_at.append(time.monotonic())

    def wait_for(self, count: int, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while len(self.events) < count and time.monotonic() < deadline:
            time.sleep(0.005)
        assert len(self.events) >= count, self.events


@pytest.fixture(name="slow_polls")
def use_slow_polls() -> Iterator[None]:
    with slow_polls():
        yield


@pytest.mark.usefixtures("slow_polls")
def test_followers_receive_the_events_of_a_worker_in_the_same_process(empty_database: Engine) -> None:
    turns, jobs = TurnRepository(empty_database), JobRepository(empty_database)
    turn = start_turn(turns)
    followers = [Follower(turns), Follower(turns)]
    turns.append_event(turn, {"kind": "plan"})
    jobs.submit(build_job("thread-turn/1.1.1"), "ann")
    claim = jobs.claim_next_job("worker", MODEL)
    assert claim is not None
    jobs.heartbeat(claim, StepProgress(step=1, steps=2, eta_seconds=1.0), preview="p.png")
    followers[0].wait_for(3)
    turns.append_event(turn, {"kind": "text", "delta": "x" * 9000})  # too long for a notification
    turns.end_turn(turn, "done")
    for follower in followers:
        follower.thread.join(10)
        assert [number for number, _ in follower.events] == [1, 2, 3, 4]
        assert [event["kind"] for _, event in follower.events] == ["plan", "step", "preview", "text"]
        assert follower.events[2][1] == {"kind": "preview", "key": "p.png"}


@pytest.mark.usefixtures("slow_polls")
def test_the_end_of_a_job_wakes_its_watchers(empty_database: Engine) -> None:
    jobs = JobRepository(empty_database)
    for end in ("cancel", "done"):
        jobs.submit(build_job(end))
        with jobs.watch_job(end) as watch, jobs.watch_any_end() as any_end:
            timer = threading.Timer(0.2, lambda: jobs.cancel("cancel"))
            if end == "done":
                claim = jobs.claim_next_job("worker", MODEL)
                assert claim is not None
                timer = threading.Timer(0.2, jobs.mark_done, (claim, ARTIFACT))
            timer.start()
            started_at = time.monotonic()
            watch.wait(20)
            any_end.wait(20)
            assert time.monotonic() - started_at < 10
            timer.join()
        status = jobs.get_status(end)
        assert status is not None and status.state in ("cancelled", "done")


def test_only_the_process_that_runs_a_turn_appends_to_it(empty_database: Engine) -> None:
    turns, jobs = TurnRepository(empty_database), JobRepository(empty_database)
    turn = start_turn(turns)
    jobs.submit(build_job("thread-turn/1.1.1"), "ann")
    jobs.submit(build_job("thread-other/1.1.1"), "ann")
    status = jobs.get_status("thread-turn/1.1.1")
    assert status is not None and status.turn_id == "turn"
    assert not turns.append_event(turn.model_copy(update={"attempt": 7}), {"kind": "plan"})
    claim = jobs.claim_next_job("worker", MODEL)
    assert claim is not None and turns.end_turn(turn, "cancelled")
    jobs.heartbeat(claim, StepProgress(step=1, steps=2, eta_seconds=1.0))
    assert turns.list_events("turn") == [] and not turns.append_event(turn, {"kind": "plan"})


def test_events_of_many_threads_are_numbered_without_gaps(empty_database: Engine) -> None:
    turns = TurnRepository(empty_database)
    turn = start_turn(turns)
    follower = Follower(turns)
    writers = [
        threading.Thread(target=lambda: [turns.append_event(turn, {"kind": "text"}) for _ in range(10)])
        for _ in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    turns.end_turn(turn, "done")
    follower.thread.join(20)
    assert [number for number, _ in follower.events] == list(range(1, 41))


def run_worker_process(address: str, turns: TurnRepository, jobs: JobRepository) -> list[float]:
    """Let a worker in another process report five steps, and return the seconds until each reached the follower."""
    turn = start_turn(turns)
    jobs.submit(build_job("thread-turn/1.1.1"), "ann")
    follower = Follower(turns)
    command = [sys.executable, "-c", WORKER_SCRIPT, address, repr(ARTIFACT.model_dump())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        reported_at = []
        with jobs.watch_job("thread-turn/1.1.1") as watch:
            for step in range(1, 6):
                worker.stdin.write("\n")
                worker.stdin.flush()
                reported_at.append(float(worker.stdout.readline()))
                follower.wait_for(step)
            worker.stdin.write("\n")
            worker.stdin.flush()
            watch.wait(20)
    turns.end_turn(turn, "done")
    follower.thread.join(20)
    assert [event["step"] for _, event in follower.events] == [1, 2, 3, 4, 5]
    status = jobs.get_status("thread-turn/1.1.1")
    assert status is not None and status.state == "done"
    return [arrived - reported for arrived, reported in zip(follower.arrived_at, reported_at, strict=True)]


def test_sqlite_followers_see_another_process_within_the_poll_interval(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/service.db"
    engine = create_database_engine(address)
    upgrade_schema(engine)
    delays = run_worker_process(address, TurnRepository(engine), JobRepository(engine))
    assert min(delays) < 2 * notifications.SQLITE_POLL_SECONDS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    server = Postgres(tmp_path_factory.mktemp("postgres"))
    server.start()
    yield server
    server.stop()


@pytest.mark.usefixtures("slow_polls")
def test_postgresql_notifies_across_processes_and_a_lost_connection_loses_no_event(server: Postgres) -> None:
    engine = create_database_engine(server.address)
    upgrade_schema(engine)
    turns, jobs = TurnRepository(engine), JobRepository(engine)
    assert max(run_worker_process(server.address, turns, jobs)) < 10  # seconds; polls take 60 here

    turn = start_turn(turns, "second")
    follower = Follower(turns, "second")
    turns.append_event(turn, {"kind": "plan"})
    follower.wait_for(1)
    writer = create_database_engine(server.address)
    with writer.connect() as connection:  # end the connection of every listener
        connection.exec_driver_sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%%'")
        connection.exec_driver_sql(  # like another process, without a notification
            "INSERT INTO turn_events (turn_id, number, body, created_at) "
            """VALUES ('second', 2, '{"kind": "text"}', 0)"""
        )
    follower.wait_for(2)
    turns.append_event(turn, {"kind": "step"})
    turns.end_turn(turn, "done")
    follower.thread.join(20)
    assert [event["kind"] for _, event in follower.events] == ["plan", "text", "step"]
    writer.dispose()
    engine.dispose()

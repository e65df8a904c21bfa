"""PostgreSQL behind PgBouncer in transaction mode, where a session's statements run on any connection of the pool."""

import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omnivideo.agent.graph import Planner
from omnivideo.agent.thread import Thread
from omnivideo.contracts import Job, resolve_sampling_params
from omnivideo.presets import TINY
from omnivideo.settings import load_settings
from omnivideo.storage.checkpointer import open_checkpointer
from omnivideo.storage.database import notifications
from omnivideo.wiring import ServiceWiring
from tests.support.poolers import pgbouncer
from tests.support.servers import Postgres
from tests.support.twins import InstantQueue, ScriptedMLLM

NUM_ROUNDS, NUM_THREADS = 150, 6


@pytest.fixture(scope="module")
def wiring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceWiring]:
    folder = tmp_path_factory.mktemp("pgbouncer")
    server = Postgres(folder / "postgres")
    server.start()
    with pgbouncer(folder / "pooler", server) as address:
        wiring = ServiceWiring(load_settings(database=address))
        wiring.migrate_database()
        yield wiring
        wiring.close()
    server.stop()


def test_statements_of_many_sessions_do_not_collide(wiring: ServiceWiring) -> None:
    checkpointer: Any = open_checkpointer(wiring.settings)
    graph = Planner(ScriptedMLLM(), InstantQueue(), TINY).build_graph(checkpointer)
    params = resolve_sampling_params(TINY, "text-to-video", seed=5, steps=4)
    rounds, failures = iter(range(NUM_ROUNDS)), list[str]()

    def run_rounds() -> None:
        for number in rounds:
            try:
                job = Job(id=f"job{number}", prompt="a ball", visual_tokens=None, source=None, params=params)
                wiring.jobs.submit(job)
                assert wiring.jobs.get_status(job.id).state == "queued"
                wiring.jobs.cancel(job.id)
                thread = Thread(graph, f"thread{number}", lambda path, made_by: None).initialize_state()
                assert list(thread.send("a red ball"))
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run_rounds) for _ in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    checkpointer.conn.close()
    assert not failures, f"{len(failures)} of {NUM_ROUNDS}: {failures[0]}"


def test_followers_read_the_database_more_often(wiring: ServiceWiring) -> None:
    """No notification gets through a pooler in transaction mode."""
    notifier = wiring.jobs.notifier
    with notifier.watch(notifications.job_end_topic(uuid.uuid4().hex)) as watch:
        deadline = time.monotonic() + 60
        while notifier.poll_seconds == notifications.POSTGRESQL_POLL_SECONDS:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert watch.get_poll_seconds() == notifications.SQLITE_POLL_SECONDS


def test_notifications_arrive_without_a_pooler(tmp_path: Path) -> None:
    server = Postgres(tmp_path)
    server.start()
    wiring = ServiceWiring(load_settings(database=server.address))
    wiring.migrate_database()
    notifier = wiring.jobs.notifier
    with notifier.watch(notifications.job_end_topic("any")) as watch:
        assert watch.changed.wait(10)  # the listener has connected
        time.sleep(1)
        assert notifier.poll_seconds == notifications.POSTGRESQL_POLL_SECONDS
    wiring.close()
    server.stop()

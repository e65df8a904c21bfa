"""Two PostgreSQL servers with streaming replication: after a failover, processes write to the new primary."""

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from omnivideo.agent.graph import Planner
from omnivideo.agent.thread import Thread
from omnivideo.contracts import Job, resolve_sampling_params
from omnivideo.errors import OmniVideoError, StoreError
from omnivideo.presets import TINY
from omnivideo.settings import load_settings
from omnivideo.storage.checkpointer import open_checkpointer
from omnivideo.wiring import ServiceWiring
from tests.support.poolers import MovingAddress
from tests.support.servers import Postgres
from tests.support.twins import InstantQueue, ScriptedMLLM

NUM_SUBMITS, NUM_CHECKPOINTS = 39, 20


def count_failed_writes(wiring: ServiceWiring, checkpointer: Any) -> tuple[int, int]:
    """Submit jobs and write checkpoints. Return how many of each failed."""
    graph = Planner(ScriptedMLLM(), InstantQueue(), TINY).build_graph(checkpointer)
    params = resolve_sampling_params(TINY, "text-to-video", seed=5, steps=4)

    def submit() -> None:
        wiring.jobs.submit(Job(id=uuid.uuid4().hex, prompt="a ball", visual_tokens=None, source=None, params=params))

    def write_checkpoint() -> None:
        Thread(graph, uuid.uuid4().hex, lambda path, made_by: None).initialize_state()

    return count_failures(submit, NUM_SUBMITS), count_failures(write_checkpoint, NUM_CHECKPOINTS)


def count_failures(write: Callable[[], None], count: int) -> int:
    failures = 0
    for _ in range(count):
        try:
            write()
        except Exception as error:
            assert isinstance(error, OmniVideoError) or "psycopg" in type(error).__module__, error
            failures += 1
    return failures


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Postgres, Postgres]]:
    """Yield a primary and its standby."""
    primary = Postgres(tmp_path / "primary")
    primary.start()
    standby = Postgres(tmp_path / "standby", primary)
    standby.start()
    yield primary, standby
    for server in (primary, standby):
        server.stop()


def test_an_address_of_two_servers_leads_to_the_new_primary(servers: tuple[Postgres, Postgres]) -> None:
    first, second = servers
    settings = load_settings(database=f"postgresql://test@127.0.0.1:{first.port},127.0.0.1:{second.port}/postgres")
    wiring = ServiceWiring(settings)
    wiring.migrate_database()
    checkpointer: Any = open_checkpointer(wiring.settings)
    assert count_failed_writes(wiring, checkpointer) == (0, 0)
    first.stop()
    second.promote()
    first.copy_primary(second)  # the old primary returns as a standby, which answers reads
    first.start()
    assert count_failed_writes(wiring, checkpointer) == (0, 0)
    checkpointer.conn.close()
    wiring.close()


def test_connections_to_a_demoted_server_are_replaced(servers: tuple[Postgres, Postgres]) -> None:
    """The old primary stays up and answers reads, as after a failover of a managed database; then its name moves."""
    first, second = servers
    address = MovingAddress(first.port)
    wiring = ServiceWiring(load_settings(database=f"postgresql://test@127.0.0.1:{address.port}/postgres"))
    wiring.migrate_database()
    checkpointer: Any = open_checkpointer(wiring.settings)
    assert count_failed_writes(wiring, checkpointer) == (0, 0)
    second.promote()
    with wiring.engine.connect() as connection:
        connection.exec_driver_sql("ALTER SYSTEM SET default_transaction_read_only = on")
        connection.exec_driver_sql("SELECT pg_reload_conf()")
    time.sleep(0.5)
    with pytest.raises(StoreError, match="database: the server can only be read; name the one that accepts writes"):
        wiring.jobs.count_queued()  # what /ready asks
    address.target_port = second.port
    assert count_failed_writes(wiring, checkpointer) == (0, 0)
    checkpointer.conn.close()
    wiring.close()
    address.close()

"""Processes that start together on one PostgreSQL database: `migrate` creates the tables, and the others check them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import inspect, text

from omnivideo.errors import InvalidInput
from omnivideo.settings import load_settings
from omnivideo.storage.checkpointer import open_checkpointer
from omnivideo.storage.database.engine import create_database_engine, upgrade_schema
from omnivideo.wiring import ServiceWiring
from tests.support.servers import Postgres

ROOT = Path(__file__).parents[2]
CHECKPOINT_TABLES = {"checkpoints", "checkpoint_blobs", "checkpoint_writes", "checkpoint_items", "checkpoint_format"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    server = Postgres(tmp_path_factory.mktemp("postgres"))
    server.start()
    yield server
    server.stop()


def create_database(server: Postgres, name: str) -> str:
    """Return the address of a new, empty database."""
    engine = create_database_engine(server.address)
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.address.replace("/postgres", f"/{name}")


def list_tables(address: str) -> set[str]:
    engine = create_database_engine(address)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


def start_command(command: str, address: str, home: Path) -> subprocess.Popen[str]:
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT), "OMNIVIDEO_HOME": str(home),
        "OMNIVIDEO_DATABASE": address,
    }  # fmt: skip
    arguments = [sys.executable, "-m", "omnivideo.cli", *command.split()]
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=home
    )


def run_together(command: str, count: int, address: str, home: Path) -> list[tuple[int, str]]:
    """Start a command several times at once. Return the exit status and the stderr of each."""
    processes = [start_command(command, address, home) for _ in range(count)]
    return [(process.wait(120), process.communicate()[1]) for process in processes]


def test_three_migrations_at_once_create_all_tables(server: Postgres, tmp_path: Path) -> None:
    address = create_database(server, "together")
    assert run_together("migrate", 3, address, tmp_path) == [(0, "")] * 3
    assert {"jobs", "turns", *CHECKPOINT_TABLES} <= list_tables(address)


def test_many_first_starts_at_once(server: Postgres, tmp_path: Path) -> None:
    for start in range(3):
        address = create_database(server, f"start{start}")
        assert run_together("migrate", 2, address, tmp_path) == [(0, "")] * 2
        assert run_together("keys list", 2, address, tmp_path) == [(0, "")] * 2


def test_a_process_changes_nothing_before_migrate_has_run(server: Postgres) -> None:
    address = create_database(server, "empty")
    settings = load_settings(database=address)
    wiring = ServiceWiring(settings)
    with pytest.raises(InvalidInput, match=r"^OMNIVIDEO_DATABASE: the database has no tables yet; run `omnivideo mig"):
        wiring.engine  # noqa: B018
    with pytest.raises(InvalidInput, match=r"conversations are missing or .* an earlier version; run `omnivideo migra"):
        open_checkpointer(settings)
    assert list_tables(address) == set()
    engine = create_database_engine(address)
    upgrade_schema(engine, "0007")
    with pytest.raises(InvalidInput, match="its tables are those of an earlier version; run `omnivideo migrate` first"):
        wiring.engine  # noqa: B018
    engine.dispose()
    wiring.migrate_database()
    assert wiring.engine.dialect.name == "postgresql"
    open_checkpointer(settings).conn.close()  # type: ignore[attr-defined]
    wiring.close()

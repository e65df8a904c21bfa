"""TODO docstring of omnivideo/storage/checkpointer.py."""

import sqlite3
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite import SqliteSaver

from omnivideo.errors import InvalidInput, MissingDependency
from omnivideo.settings import ServiceSettings


def open_checkpointer(settings: ServiceSettings) -> BaseCheckpointSaver:
    if settings.database:
        return open_postgres_checkpointer(settings.database)
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(settings.home / "threads.sqlite", check_same_thread=False)
    except (OSError, sqlite3.Error):
        raise InvalidInput("home", "threads cannot be kept there; give a folder that can be written") from None
    checkpointer = SqliteSaver(connection)
    checkpointer.setup()
    # With the write-ahead log that is set up, a killed process loses nothing; a power cut may lose the last step.
    connection.execute("PRAGMA synchronous=NORMAL")
    return checkpointer


def open_postgres_checkpointer(database_url: str) -> BaseCheckpointSaver:
    try:
        from langgraph.checkpoint.postgres import PostgresSaver
        from psycopg.rows import dict_row
        from psycopg_pool import ConnectionPool, PoolTimeout
    except ImportError:
        raise MissingDependency("threads in PostgreSQL need: pip install 'omnivideo[serve]'") from None
    # A pool that looks at a connection before it lends it: a server that was restarted is found again.
    connection_options: dict[str, Any] = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    pool: ConnectionPool[Any] = ConnectionPool(
        database_url,
        min_size=1,
        max_size=8,
        timeout=10,
        kwargs=connection_options,
        check=ConnectionPool.check_connection,
        open=False,
    )
    try:
        pool.open(wait=True, timeout=5)
    except PoolTimeout:
        pool.close()
        raise InvalidInput("OMNIVIDEO_DATABASE", "the server cannot be reached or refuses the login") from None
    checkpointer = PostgresSaver(pool)
    checkpointer.setup()
    return checkpointer

"""Where the planner's checkpoints are stored: SQLite in the home folder, or the service's PostgreSQL."""

import sqlite3
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite import SqliteSaver

from omnivideo.errors import InvalidInput, MissingDependency
from omnivideo.settings import ServiceSettings
from omnivideo.storage.compact_checkpoints import open_sqlite_saver

FORMAT_VERSION = 1  # of the names inside a checkpoint: 0 is version 0.1's, 1 is version 0.2's
UPGRADE_LOCK_ID = 0x6F6D6E69  # of PostgreSQL's advisory lock


def open_checkpointer(settings: ServiceSettings) -> BaseCheckpointSaver[str]:
    """Open the checkpoints; those of version 0.1 are converted first.

    Raises InvalidInput if the folder or the server cannot be used.
    """
    if settings.database:
        return open_postgres_checkpointer(settings.database)
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(settings.home / "threads.sqlite", check_same_thread=False)
    except (OSError, sqlite3.Error):
        raise InvalidInput("home", "threads cannot be stored there; give a folder that can be written") from None
    checkpointer = open_sqlite_saver(connection)
    upgrade_sqlite(checkpointer)
    # With the write-ahead log that setup() turns on, a killed process loses nothing; a power cut may lose one step.
    connection.execute("PRAGMA synchronous=NORMAL")
    return checkpointer


def upgrade_sqlite(checkpointer: SqliteSaver) -> None:
    """Convert the checkpoints to FORMAT_VERSION in one transaction, unless that has been done.

    `PRAGMA user_version` of the file is the version of its format.
    """
    connection = checkpointer.conn
    if read_sqlite_format(connection) == FORMAT_VERSION:
        return
    connection.commit()
    connection.execute("BEGIN IMMEDIATE")
    try:
        if read_sqlite_format(connection) < FORMAT_VERSION:  # another process may have been first
            if connection.execute("SELECT 1 FROM checkpoints LIMIT 1").fetchone():
                from omnivideo.storage.checkpoint_upgrade import convert_sqlite

                convert_sqlite(connection, checkpointer.serde)
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        connection.commit()
    except BaseException:
        connection.rollback()
        raise


def read_sqlite_format(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def open_postgres_checkpointer(database_url: str) -> BaseCheckpointSaver[str]:
    try:
        from psycopg.rows import dict_row
        from psycopg_pool import ConnectionPool, PoolTimeout

        from omnivideo.storage.compact_postgres import CompactPostgresSaver
    except ImportError:
        raise MissingDependency("threads in PostgreSQL need: pip install 'omnivideo[serve]'") from None
    # The pool checks each connection before use, so it reconnects after the server is restarted.
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
    checkpointer = CompactPostgresSaver(pool)
    checkpointer.setup()
    upgrade_postgres(checkpointer)
    return checkpointer


def upgrade_postgres(checkpointer: Any) -> None:
    """Convert the checkpoints to FORMAT_VERSION in one transaction, unless that has been done.

    `checkpointer` is a PostgresSaver over a pool. The table checkpoint_format holds the version of the format.
    """
    with checkpointer.conn.connection() as connection, connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (UPGRADE_LOCK_ID,))
        connection.execute("CREATE TABLE IF NOT EXISTS checkpoint_format (version INTEGER PRIMARY KEY)")
        row = connection.execute("SELECT max(version) AS version FROM checkpoint_format").fetchone()
        if (row["version"] or 0) >= FORMAT_VERSION:
            return
        if connection.execute("SELECT 1 FROM checkpoints LIMIT 1").fetchone():
            from omnivideo.storage.checkpoint_upgrade import convert_postgres

            convert_postgres(connection, checkpointer.serde)
        connection.execute("INSERT INTO checkpoint_format VALUES (%s)", (FORMAT_VERSION,))

"""Where the planner's checkpoints are stored: SQLite in the home folder, or the service's PostgreSQL."""

import sqlite3
from typing import TYPE_CHECKING, Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite import SqliteSaver

from omnivideo.errors import InvalidInput, MissingDependency
from omnivideo.settings import ServiceSettings
from omnivideo.storage.compact_checkpoints import open_sqlite_saver
from omnivideo.storage.database.postgres import (
    DRIVER_OPTIONS,
    SETTING,
    check_writable,
    describe_failure,
    parse_database_url,
)

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from omnivideo.storage.compact_postgres import CompactPostgresSaver

FORMAT_VERSION = 1  # of the names inside a checkpoint: 0 is version 0.1's, 1 is version 0.2's


def open_checkpointer(settings: ServiceSettings) -> BaseCheckpointSaver[str]:
    """Open the checkpoints. In SQLite, those of version 0.1 are converted first.

    Raises InvalidInput if the folder or the server cannot be used, or if `omnivideo migrate` must run first.
    """
    if settings.database:
        postgres_checkpointer = open_postgres_checkpointer(settings.database)
        try:
            check_postgres_tables(postgres_checkpointer)
        except BaseException:
            postgres_checkpointer.conn.close()
            raise
        return postgres_checkpointer
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


def open_postgres_checkpointer(database_url: str) -> "CompactPostgresSaver":
    """Open the checkpoints in PostgreSQL, whose tables need not exist yet."""
    parameters = parse_database_url(database_url)
    try:
        import psycopg
        from psycopg.rows import dict_row
        from psycopg_pool import ConnectionPool, PoolTimeout

        from omnivideo.storage.compact_postgres import CompactPostgresSaver
    except ImportError:
        raise MissingDependency("threads in PostgreSQL need: pip install 'omnivideo[serve]'") from None
    options: dict[str, Any] = {**parameters, **DRIVER_OPTIONS, "row_factory": dict_row}
    try:
        psycopg.connect(**options).close()  # the pool would only say that no connection came
    except psycopg.OperationalError as error:
        raise InvalidInput(SETTING, describe_failure(error)) from None
    pool: ConnectionPool[Any] = ConnectionPool(
        kwargs=options, min_size=1, max_size=8, timeout=10, check=check_writable, open=False
    )
    try:
        pool.open(wait=True, timeout=5)
    except PoolTimeout:
        pool.close()
        raise InvalidInput(SETTING, "the server cannot be reached") from None
    return CompactPostgresSaver(pool)


def migrate_checkpoints(settings: ServiceSettings, engine: "Engine") -> None:
    """Create the tables of the checkpoints, or bring them up to date. One process does it while the others wait.

    `engine` is that of the service's database. Raises InvalidInput if the folder or the server cannot be used.
    """
    if not settings.database:
        open_checkpointer(settings).conn.close()  # type: ignore[attr-defined]
        return
    from omnivideo.storage.database.engine import hold_migration_lock

    checkpointer = open_postgres_checkpointer(settings.database)
    try:
        with hold_migration_lock(engine):
            checkpointer.setup()
            upgrade_postgres(checkpointer)
    finally:
        checkpointer.conn.close()


def check_postgres_tables(checkpointer: "CompactPostgresSaver") -> None:
    """Raise InvalidInput if the tables of the checkpoints are missing or of an earlier version."""
    tables = ("checkpoint_migrations", "checkpoint_format", "checkpoint_items")
    (found,) = checkpointer.fetch_rows(f"SELECT {', '.join(f'to_regclass({name!r})' for name in tables)}")
    versions: list[tuple[Any, ...]] = [(-1, 0)]
    if all(found):
        versions = checkpointer.fetch_rows(
            "SELECT (SELECT max(v) FROM checkpoint_migrations), (SELECT max(version) FROM checkpoint_format)"
        )
    ((tables_version, format_version),) = versions
    if (tables_version or 0) < len(checkpointer.MIGRATIONS) - 1 or (format_version or 0) < FORMAT_VERSION:
        problem = "the tables of the conversations are missing or those of an earlier version"
        raise InvalidInput(SETTING, f"{problem}; run `omnivideo migrate` first")


def upgrade_postgres(checkpointer: Any) -> None:
    """Convert the checkpoints to FORMAT_VERSION in one transaction, unless that has been done.

    `checkpointer` is a PostgresSaver over a pool. The table checkpoint_format holds the version of the format. The
    caller holds the migration lock.
    """
    with checkpointer.conn.connection() as connection, connection.transaction():
        connection.execute("CREATE TABLE IF NOT EXISTS checkpoint_format (version INTEGER PRIMARY KEY)")
        row = connection.execute("SELECT max(version) AS version FROM checkpoint_format").fetchone()
        if (row["version"] or 0) >= FORMAT_VERSION:
            return
        if connection.execute("SELECT 1 FROM checkpoints LIMIT 1").fetchone():
            from omnivideo.storage.checkpoint_upgrade import convert_postgres

            convert_postgres(connection, checkpointer.serde)
        connection.execute("INSERT INTO checkpoint_format VALUES (%s)", (FORMAT_VERSION,))

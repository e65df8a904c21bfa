"""Connect to the service's database, PostgreSQL or SQLite, and bring its schema up to date."""

import hashlib
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, QueuePool, create_engine, event, make_url, text
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DBAPIError, InvalidatePoolError, OperationalError

from omnivideo.errors import InvalidInput, StoreError
from omnivideo.presets import Preset
from omnivideo.storage.database.earlier_version import check_unused_by_version_0_1
from omnivideo.storage.database.postgres import (
    DRIVER_OPTIONS,
    SETTING,
    build_url,
    check_writable,
    describe_failure,
    parse_database_url,
)

log = logging.getLogger("omnivideo.storage")
MIGRATION_LOCK_ID = 0x6F6D6E69  # of PostgreSQL's advisory lock: any number, the same in every version
MIGRATION_POLL_SECONDS = 0.2
RUN_MIGRATE = "run `omnivideo migrate` first"


def create_database_engine(database_url: str) -> Engine:
    """Return an engine that runs every statement in its own transaction.

    `database_url` is `postgresql://...` or `sqlite:///FILE`. No connection is opened yet. Raises InvalidInput if it is
    another address.
    """
    if database_url.startswith("sqlite:"):
        engine = create_engine(
            make_url(database_url), isolation_level="AUTOCOMMIT", connect_args={"timeout": 30}, hide_parameters=True
        )
        event.listen(engine, "connect", configure_sqlite)
        return engine
    engine = create_engine(
        build_url(parse_database_url(database_url)),
        isolation_level="AUTOCOMMIT",
        hide_parameters=True,  # an error's text would quote what a user has said
        pool_size=10,
        pool_use_lifo=True,  # the connection that was used last needs no check
        max_overflow=20,
        connect_args=DRIVER_OPTIONS,
    )
    event.listen(engine, "checkout", check_connection)
    return engine


def check_connection(connection: Any, connection_record: object, connection_proxy: object) -> None:
    """Check that a connection of the pool can be written to; otherwise the pool replaces all that are as old."""
    try:
        check_writable(connection)
    except Exception as error:  # whatever it is, a new connection is tried once
        raise InvalidatePoolError from error


def create_memory_database() -> Engine:
    """Return an empty database in this process's memory, at the newest schema.

    `JobRepository(create_memory_database())` and `TurnRepository(create_memory_database())` are the in-memory twins of
    the ports JobStore and TurnStore. Threads take turns at the only connection, because another connection would open
    another database. The unique name keeps the notifications of several databases apart.
    """
    engine = create_engine(
        f"sqlite:///file:{uuid.uuid4().hex}?mode=memory&uri=true",
        isolation_level="AUTOCOMMIT",
        poolclass=QueuePool,
        pool_size=1,
        max_overflow=0,
        connect_args={"check_same_thread": False},
    )
    upgrade_schema(engine)
    return engine


def configure_sqlite(connection: sqlite3.Connection, connection_record: object) -> None:
    """Let readers work beside the writer, do not flush the disk at every heartbeat, and overwrite deleted rows."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA secure_delete=ON")


@contextmanager
def hold_migration_lock(engine: Engine) -> Iterator[None]:
    """Let one process at a time change the tables of a PostgreSQL database, while the others wait.

    The lock lasts as long as a transaction on a connection of its own, so that a pooler cannot lose it. It is held
    before the migrations' transaction begins, which therefore sees what the process before has done. A process waits by
    asking again: CREATE INDEX CONCURRENTLY, which LangGraph uses, waits for each statement that is running, so a
    statement that waited for the lock would never end. SQLite needs no such lock: its migrations lock the file.
    """
    if engine.dialect.name != "postgresql":
        yield
        return
    ask = text(f"SELECT pg_try_advisory_xact_lock({MIGRATION_LOCK_ID})")
    with engine.connect().execution_options(isolation_level="READ COMMITTED") as connection:
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        while not connection.scalar(ask):
            time.sleep(MIGRATION_POLL_SECONDS)
        yield


def build_alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(resources.files("omnivideo.storage.database") / "migrations"))
    return config


def upgrade_schema(engine: Engine, revision: str = "head", preset: Preset | None = None) -> None:
    """Upgrade the schema to `revision`. One process does it while the others wait.

    Jobs of version 0.1 get the settings that they do not specify from `preset`. A schema of a later version is left
    as it is: migrations only add to it, so this version can run beside a later one.

    Raises StoreError if the database cannot be reached or changed, or if processes of version 0.1 use it.
    """
    config = build_alembic_config()
    # Under the lock, PostgreSQL's default is enough; SERIALIZABLE would conflict with processes that are running.
    isolation_level: IsolationLevel = "SERIALIZABLE" if engine.dialect.name == "sqlite" else "READ COMMITTED"
    try:
        check_unused_by_version_0_1(engine)
        with (
            hold_migration_lock(engine),
            engine.connect().execution_options(isolation_level=isolation_level) as connection,
        ):
            config.attributes["connection"] = connection
            config.attributes["preset"] = preset
            command.upgrade(config, revision)
    except DBAPIError as error:
        raise build_start_error(engine, error) from error


def identify_database(engine: Engine) -> str:
    """Return a short name of a database, the same for every process on it, by whatever address.

    It is that of the PostgreSQL installation, which its standbys share, and of the database in it. Raises StoreError if
    the database cannot be reached.
    """
    if engine.dialect.name == "sqlite":
        name = os.path.realpath(engine.url.database or "")
    else:
        query = "SELECT system_identifier, oid FROM pg_control_system(), pg_database WHERE datname = current_database()"
        try:
            with engine.connect() as connection:
                name = "/".join(map(str, connection.execute(text(query)).one()))
        except DBAPIError as error:
            raise build_start_error(engine, error) from error
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def build_start_error(engine: Engine, error: DBAPIError) -> StoreError:
    """Return why the database could not be used when a process started."""
    if engine.dialect.name == "postgresql" and isinstance(error, OperationalError):
        return StoreError(f"{SETTING}: {describe_failure(error)}")
    return StoreError("database: it cannot be changed; see OMNIVIDEO_DATABASE")


def check_schema(engine: Engine) -> None:
    """Check that the database has this version's tables, or those of a later one, beside which it can run.

    Raises InvalidInput if `omnivideo migrate` must run first, and StoreError if the database cannot be reached.
    """
    try:
        with engine.connect() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
    except DBAPIError as error:
        raise build_start_error(engine, error) from error
    if current is None:
        raise InvalidInput("OMNIVIDEO_DATABASE", f"the database has no tables yet; {RUN_MIGRATE}")
    scripts = ScriptDirectory.from_config(build_alembic_config())
    if current == scripts.get_current_head():
        return
    if current in {script.revision for script in scripts.walk_revisions()}:
        raise InvalidInput("OMNIVIDEO_DATABASE", f"its tables are those of an earlier version; {RUN_MIGRATE}")
    log.warning("the database has the schema %s of a later version", current)

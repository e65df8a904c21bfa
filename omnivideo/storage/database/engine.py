"""Connect to the service's database, PostgreSQL or SQLite, and bring its schema up to date."""

import sqlite3
import uuid
from importlib import resources

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, QueuePool, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError

from omnivideo.errors import StoreError
from omnivideo.presets import Preset
from omnivideo.storage.database.earlier_version import check_unused_by_version_0_1


def create_database_engine(database_url: str) -> Engine:
    """Return an engine that runs every statement in its own transaction.

    `database_url` is `postgresql://...` or `sqlite:///FILE`. No connection is opened yet.
    """
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, isolation_level="AUTOCOMMIT", connect_args={"timeout": 30})
        event.listen(engine, "connect", configure_sqlite)
        return engine
    return create_engine(
        url.set(drivername="postgresql+psycopg"),
        isolation_level="AUTOCOMMIT",
        pool_pre_ping=True,
        pool_size=10,
        max_overflow=20,
        connect_args={"connect_timeout": 5, "application_name": "omnivideo"},
    )


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
    """Let readers work beside the writer, and do not flush the disk at every heartbeat."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def upgrade_schema(engine: Engine, revision: str = "head", preset: Preset | None = None) -> None:
    """Upgrade the schema to `revision`. One process does it while the others wait.

    Jobs of version 0.1 get the settings that they do not specify from `preset`. A schema of a later version is left
    as it is: migrations only add to it, so this version can run beside a later one.

    Raises StoreError if the database cannot be reached or changed, or if processes of version 0.1 use it.
    """
    alembic_config = Config()
    alembic_config.set_main_option("script_location", str(resources.files("omnivideo.storage.database") / "migrations"))
    try:
        check_unused_by_version_0_1(engine)
        with engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
            alembic_config.attributes["connection"] = connection
            alembic_config.attributes["preset"] = preset
            command.upgrade(alembic_config, revision)
    except DBAPIError as error:
        raise StoreError("database: it cannot be reached or changed; see OMNIVIDEO_DATABASE") from error

"""Databases at the newest schema: in memory, in a file and on a PostgreSQL server."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine

from omnivideo.storage.database.engine import create_database_engine, create_memory_database, upgrade_schema
from tests.support.servers import postgres


@contextmanager
def open_database(kind: str, folder: Path) -> Iterator[Engine]:
    """Open an empty database of a kind, "memory", "sqlite" or "postgresql", whose files are in `folder`."""
    if kind == "postgresql":
        with postgres(folder) as address:
            engine = create_database_engine(address)
            upgrade_schema(engine)
            yield engine
            engine.dispose()
        return
    if kind == "memory":
        engine = create_memory_database()
    else:
        engine = create_database_engine(f"sqlite:///{folder}/service.db")
        upgrade_schema(engine)
    yield engine
    engine.dispose()

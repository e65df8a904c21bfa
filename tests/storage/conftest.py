"""A real database at the newest schema, on SQLite and on PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from omnivideo.storage.database.engine import create_database_engine, upgrade_schema
from omnivideo.storage.database.schema import metadata
from tests.support.servers import postgres


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "sqlite":
        engine = create_database_engine(f"sqlite:///{folder}/service.db")
        upgrade_schema(engine)
        yield engine
        return
    with postgres(folder) as address:
        engine = create_database_engine(address)
        upgrade_schema(engine)
        yield engine
        engine.dispose()


@pytest.fixture
def empty_database(engine: Engine) -> Engine:
    """The database, with all rows deleted."""
    with engine.connect() as connection:
        for table in metadata.sorted_tables:
            connection.execute(table.delete())
    return engine

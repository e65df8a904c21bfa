"""Real servers for the storage tests: SQLite and PostgreSQL with the latest schema, and an S3 server."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine

from omnivideo.storage.database.engine import create_database_engine, upgrade_schema
from omnivideo.storage.database.schema import metadata
from tests.support.s3_server import S3Server, s3_server
from tests.support.servers import postgres

if TYPE_CHECKING:
    from omnivideo.storage.objects.s3 import S3ObjectStore


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
    """Return the database with all rows deleted."""
    with engine.connect() as connection:
        for table in metadata.sorted_tables:
            connection.execute(table.delete())
    return engine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(server: S3Server) -> "S3ObjectStore":
    """Return a store in a bucket that does not exist yet."""
    from tests.support.object_stores import store_on

    return store_on(server.address)

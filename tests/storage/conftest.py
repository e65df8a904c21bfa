"""Databases for the tests of storage, in memory, in a file and on a PostgreSQL server; and an S3 server."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine

from omnivideo.storage.database.schema import metadata
from tests.support.databases import open_database
from tests.support.s3_server import S3Server, s3_server

if TYPE_CHECKING:
    from omnivideo.storage.objects.s3 import S3ObjectStore


@pytest.fixture(scope="module", params=["memory", "sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with open_database(request.param, tmp_path_factory.mktemp(request.param)) as engine:
        yield engine


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

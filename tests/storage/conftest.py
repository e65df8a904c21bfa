"""A real database of the newest schema: SQLite and PostgreSQL."""

import pytest

from omnivideo.storage.database.schema import create_database_engine, upgrade_schema
from tests.support.servers import postgres


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def engine(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
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

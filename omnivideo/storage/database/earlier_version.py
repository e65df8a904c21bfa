"""Refuse to convert a database of version 0.1 while its processes use it: afterwards they would fail in mid-work."""

import sqlite3
import time
from contextlib import closing

from alembic.migration import MigrationContext
from sqlalchemy import Engine, text

from omnivideo.errors import StoreError

REVISIONS = ("0001", "0002")  # of version 0.1
WAIT_SECONDS = 3.0  # for a process of this version that is converting the database
IN_USE = (
    "database: processes of version 0.1 use it, and cannot work beside this version; stop them, then run"
    " `omnivideo migrate`"
)
# Version 0.1 gives its connections no name. Those of psql and pg_dump have one, and ours too.
OTHER_CONNECTIONS = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND usename = current_user"
    " AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND application_name = ''"
)


def check_unused_by_version_0_1(engine: Engine) -> None:
    """Raise StoreError if the database has the schema of version 0.1 and its processes are connected."""
    deadline = time.monotonic() + WAIT_SECONDS
    while has_old_schema(engine) and is_in_use(engine):
        if time.monotonic() > deadline:
            raise StoreError(IN_USE)
        time.sleep(0.2)


def has_old_schema(engine: Engine) -> bool:
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision() in REVISIONS


def is_in_use(engine: Engine) -> bool:
    """Return whether another process is connected, even if it is idle."""
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            return bool(connection.execute(OTHER_CONNECTIONS).scalar())
    file = engine.url.database
    if not file or "mode=memory" in file:
        return False
    engine.dispose()  # this process's own idle connections
    with closing(sqlite3.connect(file, timeout=0.1)) as connection:
        try:  # SQLite leaves this mode only if nobody else has the file open; the next connection enters it again
            return bool(connection.execute("PRAGMA journal_mode=DELETE").fetchone()[0] != "delete")
        except sqlite3.OperationalError:
            return True

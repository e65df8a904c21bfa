"""Run statements, append turn events, read pages of rows, and convert rows to records, for all repositories."""

import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Float,
    FromClause,
    Row,
    Select,
    String,
    Table,
    and_,
    func,
    literal,
    or_,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement

from omnivideo.contracts import Change, FrozenModel
from omnivideo.errors import ArtifactNotFound, InvalidInput, StoreError, describe_database_failure
from omnivideo.storage.database.notifications import get_notifier, turn_topic
from omnivideo.storage.database.postgres import describe_failure
from omnivideo.storage.database.schema import stored_objects, turn_events

Record = TypeVar("Record", bound=FrozenModel)
Answer = TypeVar("Answer")
RETRY_TIMEOUT_SECONDS = 120.0  # how long to wait for an unavailable database or object store
OBJECT_KEY = re.compile(r"[0-9a-f]{64}\.[a-z0-9]{1,16}")  # of the object store
MAX_NUMBER_CONFLICTS = 20  # attempts to give an event the next number while others append to the same turn


class unix_now(FunctionElement[float]):
    """Seconds since 1970 by the database's clock, so that the clocks of the machines need not agree."""

    type = Float()
    inherit_cache = True


@compiles(unix_now, "sqlite")
def compile_unix_now_sqlite(element: unix_now, compiler: SQLCompiler, **kw: object) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(unix_now, "postgresql")
def compile_unix_now_postgresql(element: unix_now, compiler: SQLCompiler, **kw: object) -> str:
    return "extract(epoch from clock_timestamp())::float8"


class Repository:
    """Run statements on the database. Every method raises StoreError if the database does not answer."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.notifier = get_notifier(engine)

    def fetch_all(self, statement: Executable) -> Sequence[Row[Any]]:
        """Run a statement in its own transaction and return its rows. Does not catch IntegrityError and DataError."""
        with self.connect() as connection:
            result = connection.execute(statement)
            return result.all() if result.returns_rows else []

    def fetch_and_follow(
        self, statement: Executable, build_next: Callable[[Sequence[Row[Any]]], Executable | None]
    ) -> Sequence[Row[Any]]:
        """Run a statement, and in the same transaction the one that `build_next` builds from its rows. Return the rows.

        The first statement must write, so that SQLite waits for other writers before it reads.
        """
        with self.begin() as connection:
            rows = connection.execute(statement).all()
            if rows and (next_statement := build_next(rows)) is not None:
                connection.execute(next_statement)
        return rows

    def fetch_in_turn(self, name: str, statement: Executable) -> Sequence[Row[Any]]:
        """Run a statement while no other process runs one under the same name, so that what it counts is exact.

        In SQLite, all statements that write take turns.
        """
        if self.engine.dialect.name == "sqlite":
            return self.fetch_all(statement)
        with self.begin() as connection:
            connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
            return connection.execute(statement).all()

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """Yield a connection of the pool, whose statements each have their own transaction. Raises StoreError."""
        try:
            with self.engine.connect() as connection:
                yield connection
        except (IntegrityError, DataError):  # a retry cannot change either
            raise
        except PoolTimeout as error:
            raise StoreError("database: too many requests at once; try again later") from error
        except DBAPIError as error:
            raise StoreError(f"database: {describe_unavailability(error)}; try again later") from error

    def fetch_one(self, statement: Executable) -> Row[Any] | None:
        rows = self.fetch_all(statement)
        return rows[0] if rows else None

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Run several statements in one transaction. Raises StoreError, as `connect` does."""
        level: IsolationLevel = "SERIALIZABLE" if self.engine.dialect.name == "sqlite" else "READ COMMITTED"
        with self.connect() as connection:
            in_transaction = connection.execution_options(isolation_level=level)
            with in_transaction.begin():
                yield in_transaction

    def announce_object(self, key: str) -> None:
        """Record that the service is about to write an object, so that the sweep knows it for one of the service's."""
        insertion = self.insert_into(stored_objects).values(key=key, written_at=unix_now())
        self.fetch_all(insertion.on_conflict_do_update(index_elements=["key"], set_={"written_at": unix_now()}))

    def append_turn_event(
        self, turn_id: ColumnElement[str], source: FromClause, condition: ColumnElement[bool], event: dict[str, Any]
    ) -> bool:
        """Append an event to a turn, under the turn's next number, and notify the turn's followers.

        The event is appended only if `condition` holds for a row of `source`, which also has the turn's id. Return
        whether it was appended.
        """
        last_number = select(func.max(turn_events.c.number)).where(turn_events.c.turn_id == turn_id)
        number = func.coalesce(last_number.correlate_except(turn_events).scalar_subquery(), 0) + 1
        row = select(turn_id, number, literal(event, JSON), unix_now()).select_from(source).where(condition)
        insertion = self.insert_into(turn_events).from_select(["turn_id", "number", "body", "created_at"], row)
        notification = self.notifier.build_notification(
            literal("turn ", String) + turn_events.c.turn_id, turn_events.c.number, event
        )
        for _ in range(MAX_NUMBER_CONFLICTS):
            try:
                appended = self.fetch_one(
                    insertion.returning(turn_events.c.turn_id, turn_events.c.number, notification)
                )
            except IntegrityError:
                continue  # another event took the number
            if appended is not None:
                self.notifier.publish(Change(topic=turn_topic(appended.turn_id), number=appended.number, body=event))
            return appended is not None
        raise StoreError("database: too many events are written to the same turn; try again later")

    def insert_into(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """Return an insert that supports `on_conflict_do_nothing` and `on_conflict_do_update`."""
        return sqlite.insert(table) if self.engine.dialect.name == "sqlite" else postgresql.insert(table)

    def insert_if_absent(self, table: Table, values: dict[str, Any]) -> Row[Any]:
        """Insert a row unless its id exists, and return the row with that id."""
        self.fetch_all(self.insert_into(table).values(values).on_conflict_do_nothing())
        row = self.fetch_one(select(table).where(table.c.id == values["id"]))
        assert row is not None
        return row

    def fetch_page(
        self,
        table: Table,
        condition: ColumnElement[bool],
        after: str | None,
        limit: int,
        newest_first: bool,
        cursor_query: Executable,
    ) -> tuple[list[Row[Any]], bool]:
        """Return the rows that follow the row with the id `after`, ordered by age, and whether more follow.

        `cursor_query` selects the time and the id of the row that `after` names, also if the row was deleted since.
        Raises InvalidInput if there has never been such a row.
        """
        query = select(table).where(condition)
        created_at, row_id = table.c.created_at, table.c.id
        if after is not None:
            last = self.fetch_one(cursor_query)
            if last is None:
                raise InvalidInput("after", "this list has no item with that id")
            is_later = created_at < last.created_at if newest_first else created_at > last.created_at
            is_next_of_same_time = row_id < last.id if newest_first else row_id > last.id
            query = query.where(or_(is_later, and_(created_at == last.created_at, is_next_of_same_time)))
        order = [column.desc() if newest_first else column.asc() for column in (created_at, row_id)]
        rows = self.fetch_all(query.order_by(*order).limit(limit + 1))
        return list(rows[:limit]), len(rows) > limit


def find_object_keys(document: Any) -> set[str]:
    """Return the keys of the object store that stand anywhere in a JSON document."""
    return set(OBJECT_KEY.findall(json.dumps(document, default=str)))


def describe_unavailability(error: DBAPIError) -> str:
    """Return why a statement could not be run, as far as an operator can change it."""
    if error.orig is None or not isinstance(error, OperationalError):
        return "it does not answer"
    failure = describe_database_failure(error.orig) or "it does not answer"
    is_connecting = error.statement is None and not isinstance(error.orig, sqlite3.Error)  # SQLite has no server
    return describe_failure(error.orig) if is_connecting and failure == "it does not answer" else failure


def select_values(table: Table, values: dict[str, Any]) -> Select[Any]:
    """Return the values as a SELECT, for an insert that depends on a condition."""
    typed_values: list[ColumnElement[Any]] = [
        value if isinstance(value, ColumnElement) else literal(value, table.c[name].type)
        for name, value in values.items()
    ]
    return select(*typed_values)


def record_from_row(record_type: type[Record], row: Row[Any]) -> Record:
    """Return the columns of a row that the record type names, as a record."""
    return record_type.parse_stored({name: getattr(row, name) for name in record_type.model_fields})


def retry_while_unavailable(operation: Callable[[], Answer]) -> Answer:
    """Retry an operation while the database or the object store is unavailable.

    Raises StoreError after RETRY_TIMEOUT_SECONDS, and ArtifactNotFound at once.
    """
    pause_seconds, deadline = 0.05, time.monotonic() + RETRY_TIMEOUT_SECONDS
    while True:
        try:
            return operation()
        except StoreError as error:
            if isinstance(error, ArtifactNotFound) or time.monotonic() > deadline:
                raise
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, 2.0)

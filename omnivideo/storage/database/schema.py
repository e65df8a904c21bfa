"""The service's database: its tables, an engine for PostgreSQL or SQLite, and the way to the newest schema.

What is true about a job, a key, a file or a batch stands here; the broker only says that there is work.
"""

from collections.abc import Sequence
from importlib import resources
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    Row,
    Select,
    String,
    Table,
    create_engine,
    event,
    literal,
    make_url,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import ClauseElement, FunctionElement

from omnivideo.errors import StoreError

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("owner", String(64), nullable=False),  # the API key's id, or "local"
    Column("lane", Integer, nullable=False),  # 0 interactive, 1 batch
    Column("turn", Integer, nullable=False),  # its place in the lane's fair order
    Column("state", String(10), nullable=False),  # queued, running, done, failed, cancelled
    Column("attempt", Integer, nullable=False, default=0),  # the fencing number: each claim has a higher one
    Column("losses", Integer, nullable=False, default=0),  # workers that fell silent over it
    Column("cancel", Boolean, nullable=False, default=False),
    Column("body", JSON, nullable=False),  # contracts.Job
    Column("kind", String(10), nullable=False),  # what asked for it: video, image, turn
    Column("meta", JSON, nullable=False),  # what that kind keeps beside the job
    Column("deleted", Boolean, nullable=False, default=False),
    Column("announced", Boolean, nullable=False, default=False),  # its end, to its owner's webhooks
    Column("step", Integer, nullable=False, default=0),
    Column("steps", Integer, nullable=False, default=0),
    Column("left", Float, nullable=False, default=0.0),
    Column("preview", String(100)),  # the key of a PNG
    Column("point", String(100)),  # the key of the tensors to go on from
    Column("pack", JSON(none_as_null=True)),  # the jobs that are drawn in one pass with it, in their order
    Column("result", JSON),  # contracts.Artifact
    Column("code", String(40)),  # why it failed
    Column("error", String(1000)),
    Column("worker", String(100)),
    Column("made", Float, nullable=False),
    Column("told", Float, nullable=False),  # when the broker was last told of it
    Column("started", Float),
    Column("beat", Float),
    Column("ended", Float),
    Index("jobs_next", "state", "lane", "turn", "made"),
    Index("jobs_owner", "owner", "lane", "state", "turn"),
    Index("jobs_listed", "owner", "kind", "made"),
    Index("jobs_announced", "announced", "kind", "state"),
)

api_keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),  # sha256 of the key; the key itself is kept nowhere
    Column("name", String(100), nullable=False),
    Column("made", Float, nullable=False),
    Column("revoked", Boolean, nullable=False, default=False),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("name", String(255), nullable=False),
    Column("purpose", String(40), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("key", String(100), nullable=False),  # in the object store
    Column("artifact", JSON),  # contracts.Artifact, where it is an image or a clip
    Column("made", Float, nullable=False),
    Column("deleted", Boolean, nullable=False, default=False),
    Index("files_listed", "owner", "made"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("state", String(12), nullable=False),  # the wire's: validating ... cancelled
    Column("endpoint", String(40), nullable=False),
    Column("input", String(64), nullable=False),  # of files
    Column("output", String(64)),
    Column("errors", String(64)),
    Column("counts", JSON, nullable=False),  # total, completed, failed
    Column("meta", JSON, nullable=False),
    Column("trouble", JSON),  # why it could not begin
    Column("times", JSON, nullable=False),  # of each state, in seconds since 1970
    Column("runner", String(100)),
    Column("beat", Float, nullable=False),
    Column("made", Float, nullable=False),
    Index("batches_listed", "owner", "made"),
    Index("batches_open", "state", "beat"),
)

batch_lines = Table(  # what became of the lines of a batch that is not finished
    "lines",
    metadata,
    Column("batch", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),  # in the input file, from 1
    Column("ok", Boolean, nullable=False),
    Column("answer", JSON, nullable=False),  # the line of the output or error file
)

threads = Table(
    "threads",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("made", Float, nullable=False),
    Column("deleted", Boolean, nullable=False, default=False),
    Index("threads_listed", "owner", "made"),
)

turns = Table(
    "turns",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("thread", String(64), nullable=False),
    Column("owner", String(64), nullable=False),
    Column("state", String(10), nullable=False),  # queued, running, done, asks, failed, cancelled
    Column("number", Integer, nullable=False),  # of the thread's turns, from 1
    Column("cancel", Boolean, nullable=False, default=False),
    Column("body", JSON, nullable=False),  # the text, the attachments and the options
    Column("error", JSON),  # the wire's, where it failed
    Column("attempt", Integer, nullable=False, default=0),
    Column("beat", Float, nullable=False),
    Column("made", Float, nullable=False),
    Index("turns_open", "state", "beat"),
    Index("turns_thread", "thread", "made"),
)

turn_events = Table(
    "events",
    metadata,
    Column("turn", String(64), primary_key=True),  # of turns
    Column("number", Integer, primary_key=True),  # from 1
    Column("body", JSON, nullable=False),  # contracts.Event
    Column("made", Float, nullable=False),
    Index("events_made", "made"),
)

chat_threads = Table(  # which thread a chat client's messages belong to
    "chats",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("digest", String(64), primary_key=True),  # of all messages so far
    Column("thread", String(64), nullable=False),
    Column("turns", Integer, nullable=False),  # that the thread had then
    Column("made", Float, nullable=False),
)

webhooks = Table(
    "hooks",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("url", String(2000), nullable=False),
    Column("secret", String(100), nullable=False),
    Column("name", String(100), nullable=False),
    Column("events", JSON, nullable=False),  # the types that it is told of
    Column("made", Float, nullable=False),
    Index("hooks_owner", "owner"),
)

webhook_deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("hook", String(64), nullable=False),
    Column("body", JSON, nullable=False),
    Column("tries", Integer, nullable=False, default=0),
    Column("due", Float, nullable=False),
    Column("done", Boolean, nullable=False, default=False),
    Index("deliveries_due", "done", "due"),
)


class unix_now(FunctionElement[float]):
    """Seconds since 1970 by the database's clock, so that machines need not agree on theirs."""

    type = Float()
    inherit_cache = True


@compiles(unix_now, "sqlite")
def compile_unix_now_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(unix_now, "postgresql")
def compile_unix_now_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return "extract(epoch from clock_timestamp())::float8"


def create_database_engine(database_url: str) -> Engine:
    """An engine in which every statement is a transaction of its own.

    `address` is postgresql://... or sqlite:///FILE.  Raises StoreError where the server cannot be reached.
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
        connect_args={"connect_timeout": 5},
    )


def configure_sqlite(connection: Any, record: Any) -> None:
    """Readers beside one writer, and no flush of the disk for every heartbeat."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def upgrade_schema(engine: Engine) -> None:
    """Brings the schema to the newest version; one process at a time does it, the others wait.

    Raises StoreError where the database cannot be reached.
    """
    alembic_config = Config()
    alembic_config.set_main_option("script_location", str(resources.files("omnivideo.storage") / "migrations"))
    try:
        with engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
            alembic_config.attributes["connection"] = connection
            command.upgrade(alembic_config, "head")
    except DBAPIError as error:
        raise StoreError("database: it cannot be reached or changed; see OMNIVIDEO_DATABASE") from error


class Repository:
    """What all that is kept in the database has in common.  Raises StoreError where the database does not answer."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def fetch_all(self, statement: Any) -> Sequence[Row[Any]]:
        """The rows of a statement, which is a transaction of its own; IntegrityError is for the caller."""
        try:
            with self.engine.connect() as connection:
                result = connection.execute(statement)
                return result.all() if result.returns_rows else []
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise StoreError("database: it does not answer; try again later") from error

    def fetch_one(self, statement: Any) -> Row[Any] | None:
        rows = self.fetch_all(statement)
        return rows[0] if rows else None

    def insert_into(self, table: Table) -> Any:
        """An insert that can say what to do on a conflict."""
        return {"sqlite": sqlite, "postgresql": postgresql}[self.engine.dialect.name].insert(table)


def select_values(table: Table, values: dict[str, Any]) -> Select[Any]:
    """Values as a select, for an insert that depends on a condition."""
    typed: list[Any] = [
        value if isinstance(value, ClauseElement) else literal(value, table.c[name].type)
        for name, value in values.items()
    ]
    return select(*typed)

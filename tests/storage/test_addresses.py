"""The address of a PostgreSQL server is read once, by libpq's grammar, and a refusal says what is wrong."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from omnivideo.errors import InvalidInput, OmniVideoError
from omnivideo.settings import load_settings
from omnivideo.storage.checkpointer import open_checkpointer
from omnivideo.storage.database.engine import create_database_engine, identify_database
from omnivideo.storage.database.postgres import DEFAULT_PARAMETERS, parse_database_url, read_parameters
from omnivideo.wiring import ServiceWiring
from tests.support.servers import Postgres, free_port

SECRET = "s3cret@x"


@pytest.mark.parametrize(
    ("address", "parameters"),
    [
        ("postgresql://u@a:5432,b:5433/db", {"user": "u", "host": "a,b", "port": "5432,5433", "dbname": "db"}),
        ("postgresql://u@a,b/db", {"user": "u", "host": "a,b", "port": ",", "dbname": "db"}),
        ("postgres://u:s3cret%40x@a/db", {"user": "u", "password": SECRET, "host": "a", "dbname": "db"}),
        ("postgresql://u@[::1]:6432/db", {"user": "u", "host": "::1", "port": "6432", "dbname": "db"}),
        ("postgresql:///db?host=/run/x&port=6432", {"host": "/run/x", "port": "6432", "dbname": "db"}),
        ("postgresql://a/db?user=u&sslmode=require", {"user": "u", "host": "a", "dbname": "db", "sslmode": "require"}),
        ("postgresql://a:1,b:2/db?target_session_attrs=primary&connect_timeout=2", {
            "host": "a,b", "port": "1,2", "dbname": "db", "target_session_attrs": "primary", "connect_timeout": "2",
        }),
    ],
)  # fmt: skip
def test_an_address_means_the_same_to_every_library(address: str, parameters: dict[str, str]) -> None:
    expected = DEFAULT_PARAMETERS | parameters
    assert parse_database_url(address) == expected
    engine = create_database_engine(address)
    assert read_parameters(engine.url) == expected  # the listener's
    _, given = engine.dialect.create_connect_args(engine.url)
    given.pop("context", None)
    assert {name: str(value) for name, value in given.items()} == expected


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("postgresql://u:%zz@a/db", "it is not an address; allowed: postgresql://user:password@host:port/database"),
        ("postgresql://u:s3cret@a:x/db", "each port is a number from 1 to 65535"),
        ("postgresql://u:s3cret@a:1,b:2,c/db?port=1,2", "each port is a number from 1 to 65535"),
        ("postgresql://u:s3cret@a/db?pool=3", "libpq has no parameter pool"),
        ("postgresql://u:s3cret@a/db?target_session_attrs=any", "target_session_attrs; allowed: read-write or primary"),
    ],
)
def test_a_wrong_address_is_refused_in_one_line(address: str, problem: str) -> None:
    for use in (create_database_engine, lambda address: open_checkpointer(load_settings(database=address))):
        with pytest.raises(InvalidInput) as raised:
            use(address)  # type: ignore[operator]
        message = str(raised.value)
        assert message.startswith(f"OMNIVIDEO_DATABASE: {problem}"), message
        assert "\n" not in message and "s3cret" not in message and "zz" not in message


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Yield a server that asks the user `guarded` for a password and lets `outside` in nowhere."""
    server = Postgres(tmp_path_factory.mktemp("postgres"))
    rules = server.folder / "data" / "pg_hba.conf"
    guards = "host all guarded 127.0.0.1/32 scram-sha-256\nhost all outside 127.0.0.1/32 reject\n"
    rules.write_text(guards + rules.read_text())
    server.start()
    with psycopg.connect(server.address, autocommit=True) as connection:
        connection.execute(f"CREATE USER guarded PASSWORD '{SECRET}'")
        connection.execute("CREATE USER outside")
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("login", "problem"),
    [
        ("guarded:wrong@127.0.0.1:{port}/postgres", "the server refuses the user or the password"),
        ("guarded@127.0.0.1:{port}/postgres", "the server refuses the user or the password"),
        ("nobody@127.0.0.1:{port}/postgres", "the server refuses the user or the password"),
        ("outside@127.0.0.1:{port}/postgres", "the server does not let this user in"),
        ("test@127.0.0.1:{port}/none", "the server has no database of that name; create it"),
        ("test@127.0.0.1:{port}/postgres?sslmode=require", "the server and this process do not agree on TLS"),
        ("test@127.0.0.1:{other}/postgres", "the server cannot be reached"),
    ],
)
def test_a_refusal_is_not_a_server_that_is_down(server: Postgres, login: str, problem: str) -> None:
    settings = load_settings(database="postgresql://" + login.format(port=server.port, other=free_port()))
    uses: list[Any] = [lambda: ServiceWiring(settings).engine, lambda: open_checkpointer(settings)]
    for use in uses:
        with pytest.raises(OmniVideoError) as raised:
            use()
        message = str(raised.value)
        assert message.startswith(f"OMNIVIDEO_DATABASE: {problem}"), message
        assert "\n" not in message and "wrong" not in message and "nobody" not in message


def test_a_database_has_one_name_by_every_address(server: Postgres) -> None:
    """The broker's queue is named after it, also where a process logs in as an ordinary user."""
    hosts = f"localhost:{free_port()},127.0.0.1:{server.port}"
    logins = [
        "test@127.0.0.1:{port}/postgres",
        f"guarded:s3cret%40x@{hosts}/postgres",
        "test@127.0.0.1:{port}/template1",
    ]
    engines = [create_database_engine("postgresql://" + login.format(port=server.port)) for login in logins]
    first, second, other = map(identify_database, engines)
    assert first == second != other
    for engine in engines:
        engine.dispose()

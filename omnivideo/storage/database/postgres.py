"""Connect to PostgreSQL: the address, the check before a connection is used, and what a failure means.

Every connection of this package goes by the parameters that `parse_database_url` returns, so that an address means
the same to SQLAlchemy, to the checkpoints' pool and to the listener.
"""

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from omnivideo.errors import InvalidInput, MissingDependency
from omnivideo.network import find_authorities_file

if TYPE_CHECKING:
    from sqlalchemy import URL

CHECK_INTERVAL_SECONDS = 0.25
last_checks: WeakKeyDictionary[Any, float] = WeakKeyDictionary()  # when each connection has last passed
SETTING = "OMNIVIDEO_DATABASE"
ADDRESS_FORM = "postgresql://user:password@host:port/database, or several host:port separated by commas"
WRITABLE_SESSIONS = ("read-write", "primary")
# A statement to a machine that has vanished fails after 20 s instead of after the system's default of 15 minutes.
DEFAULT_PARAMETERS = {
    "connect_timeout": "5", "target_session_attrs": "read-write", "tcp_user_timeout": "20000", "keepalives_idle": "10",
    "keepalives_interval": "5", "keepalives_count": "2",
}  # fmt: skip
# A pooler in transaction mode runs each transaction on any of its connections, where a prepared statement of ours may
# be missing, and another process's may have the same name.
DRIVER_OPTIONS: dict[str, Any] = {"autocommit": True, "prepare_threshold": None, "application_name": "omnivideo"}
# What libpq and the server say about a connection that they refuse, and how it is said here. The server's own words
# have names of users, hosts and databases, so they are not passed on.
REFUSALS = (
    (r"password authentication failed|no password supplied|role .* does not exist", "refuses the user or the password"),
    (r"pg_hba.conf|not permitted to log in|permission denied for database", "does not let this user in"),
    (r"database .* does not exist", "has no database of that name; create it"),
    (r"too many (clients|connections)|remaining connection slots|no more connections", "has no connection left"),
    (r"starting up|shutting down|not yet accepting|in recovery mode", "is starting or stopping"),
    (r"read-only|hot standby|cannot be written", "can only be read; name the one that accepts writes"),
    (r"certificate verify failed|certificate .* does not match|root certificate|self.signed",
     "has no trusted certificate; trust its authority with SSL_CERT_FILE or sslrootcert"),
    (r"does not support SSL|SSL error|SSL off|no encryption", "and this process do not agree on TLS; see sslmode"),
)  # fmt: skip


def parse_database_url(database_url: str) -> dict[str, str]:
    """Return the connection parameters of an address, by libpq's grammar, with our defaults.

    Raises InvalidInput if it is not an address, or asks for servers that cannot be written to.
    """
    try:
        import psycopg
        from psycopg.conninfo import conninfo_to_dict
    except ImportError:
        raise MissingDependency("PostgreSQL needs: pip install 'omnivideo[serve]'") from None
    try:
        given = {name: str(value) for name, value in conninfo_to_dict(database_url).items()}
    except psycopg.ProgrammingError as error:  # its text may have the password
        parameter = re.match(r'invalid URI query parameter: "(\w+)"', str(error))
        problem = f"libpq has no parameter {parameter[1]}" if parameter else "it is not an address"
        hint = "in a user or a password, characters such as @ : / # are written as %40 %3A %2F %23"
        raise InvalidInput(SETTING, f"{problem}; allowed: {ADDRESS_FORM}; {hint}") from None
    num_hosts, ports = len(given.get("host", "").split(",")), given.get("port", "").split(",")
    if len(ports) not in (1, num_hosts) or not all(re.fullmatch(r"\d{0,5}", port) for port in ports):
        raise InvalidInput(SETTING, f"each port is a number from 1 to 65535; allowed: {ADDRESS_FORM}")
    if given.get("target_session_attrs", "read-write") not in WRITABLE_SESSIONS:
        raise InvalidInput(SETTING, f"target_session_attrs; allowed: {' or '.join(WRITABLE_SESSIONS)}")
    return DEFAULT_PARAMETERS | find_authorities(given) | given


def find_authorities(given: dict[str, str]) -> dict[str, str]:
    """Return the authorities for a server whose certificate is checked, unless the address or libpq's file has them."""
    checks = given.get("sslmode", os.environ.get("PGSSLMODE", "")).startswith("verify")
    has_file = "PGSSLROOTCERT" in os.environ or (Path.home() / ".postgresql" / "root.crt").exists()
    file = find_authorities_file() if checks and not has_file else None
    return {"sslrootcert": file} if file else {}


def build_url(parameters: dict[str, str]) -> "URL":
    """Return the parameters as an address of SQLAlchemy's, from which `read_parameters` returns them."""
    from sqlalchemy import URL  # the Studio has conversations, but not always SQLAlchemy

    others = {name: value for name, value in parameters.items() if name not in ("user", "password", "dbname")}
    user, password, database = (parameters.get(name) for name in ("user", "password", "dbname"))
    return URL.create("postgresql+psycopg", user, password, database=database, query=others)


def read_parameters(url: "URL") -> dict[str, Any]:
    """Return the connection parameters of an address that `build_url` has made."""
    named = {"user": url.username, "password": url.password, "dbname": url.database}
    return {name: value for name, value in named.items() if value is not None} | dict(url.query)


def check_writable(connection: Any) -> None:
    """Raise psycopg's OperationalError if a connection is lost; or if its server can only be read, and close it.

    A server that was demoted in a failover still answers, and a pool keeps connections that are not closed. A
    connection that has passed within CHECK_INTERVAL_SECONDS is not asked again: the question would double the time of
    most requests.
    """
    import psycopg
    from psycopg.rows import tuple_row

    now = time.monotonic()
    if not connection.closed and now - last_checks.get(connection, -CHECK_INTERVAL_SECONDS) < CHECK_INTERVAL_SECONDS:
        return
    with connection.cursor(row_factory=tuple_row) as cursor:
        (is_read_only,) = cursor.execute("SHOW transaction_read_only").fetchone()
    if is_read_only == "on":
        connection.close()
        raise psycopg.OperationalError("the server cannot be written to")
    last_checks[connection] = now


def describe_failure(error: BaseException) -> str:
    """Return what a failed connection means, as a sentence about the server without names or secrets."""
    text = str(error)
    for pattern, meaning in REFUSALS:
        if re.search(pattern, text):
            return f"the server {meaning}"
    return "the server cannot be reached"

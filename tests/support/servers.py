"""Real servers for tests, each in a separate folder and on a free port; they are stopped afterwards."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def apt_install(package: str) -> bool:
    """Install a Debian package, which requires root; return whether it succeeded."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return False
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", package]):
        if subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False).returncode:
            return False
    return True


def program(name: str, package: str, untested: str) -> str:
    """Return the path of a server's program; install it, or skip the test, if it is missing."""
    if not (shutil.which(name) or Path("/usr/sbin", name).exists()) and not apt_install(package):
        pytest.skip(f"{name} is not installed and could not be installed: {untested}")
    return shutil.which(name) or f"/usr/sbin/{name}"


def accepts_connections(address: int | Path) -> bool:
    """Return whether a server listens on a port of this machine, or on a Unix socket.

    A refused connection of httpx would stay open.
    """
    is_path = isinstance(address, Path)
    with suppress(OSError), socket.socket(socket.AF_UNIX if is_path else socket.AF_INET) as connection:
        connection.settimeout(1)
        connection.connect(str(address) if is_path else ("127.0.0.1", address))
        return True
    return False


def wait_for(port: int, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Wait until a process listens on the port."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if accepts_connections(port):
            return
        time.sleep(0.05)
    raise AssertionError(f"the server on port {port} did not start")


class Redis:
    """A Redis server that can be killed and started again on the same port; it stores nothing on disk.

    With `certificate`, the path of one for `localhost` beside its key, it speaks TLS.
    """

    def __init__(self, folder: Path, port: int | None = None, certificate: Path | None = None):
        self.program = program("redis-server", "redis-server", "jobs over Redis were not tested")
        self.folder, self.port, self.certificate = folder, port or free_port(), certificate
        self.address = f"rediss://localhost:{self.port}/0" if certificate else f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        place = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        if self.certificate:
            place[:2] = ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            place += [
                "--tls-cert-file",
                str(self.certificate),
                "--tls-key-file",
                str(self.certificate.with_suffix(".key")),
            ]
            place += ["--tls-ca-cert-file", str(self.certificate)]
        command = [self.program, *place, "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self.port, self.process)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def redis(folder: Path, port: int | None = None) -> Iterator[str]:
    """Yield the address of an empty Redis server."""
    server = Redis(folder, port)
    server.start()
    try:
        yield server.address
    finally:
        server.kill()


class RabbitMQ:
    """A RabbitMQ server with a separate Erlang name service; after a kill, it has its durable queues again.

    With `certificate`, the path of one for `localhost` beside its key, it speaks TLS. It closes the channel of a
    message that is not acknowledged within `consumer_timeout_ms`, by default 30 minutes.
    """

    def __init__(self, folder: Path, certificate: Path | None = None, consumer_timeout_ms: int = 1_800_000):
        self.program = program("rabbitmq-server", "rabbitmq-server", "jobs over RabbitMQ were not tested")
        self.port, distribution, self.names = free_port(), free_port(), free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8",
            "RABBITMQ_NODENAME": f"test{self.port}@localhost", "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(distribution), "ERL_EPMD_PORT": str(self.names),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"), "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"), "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1", "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
        }  # fmt: skip
        self.address = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        ticks = f"{{consumer_timeout, {consumer_timeout_ms}}}, {{channel_tick_interval, {consumer_timeout_ms // 30}}}"
        (folder / "advanced.config").write_text(f"[{{rabbit, [{ticks}]}}].\n")
        self.environment["RABBITMQ_ADVANCED_CONFIG_FILE"] = str(folder / "advanced.config")
        if certificate:
            self.address = f"amqps://guest:guest@localhost:{self.port}//"
            (folder / "rabbitmq.conf").write_text(
                f"listeners.tcp = none\nlisteners.ssl.default = 127.0.0.1:{self.port}\n"
                f"ssl_options.certfile = {certificate}\nssl_options.keyfile = {certificate.with_suffix('.key')}\n"
                f"ssl_options.cacertfile = {certificate}\n"
            )
            del self.environment["RABBITMQ_NODE_PORT"]  # it is for the listener without TLS
            self.environment["RABBITMQ_CONFIG_FILE"] = str(folder / "rabbitmq.conf")

    def start(self) -> None:
        # Debian's wrapper switches to its own user; the program behind it respects the environment.
        real = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
        self.process = subprocess.Popen(
            [real if real.exists() else self.program],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        wait_for(self.port, self.process, 180)

    def kill(self) -> None:
        """Send SIGKILL to the server and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        subprocess.run(["epmd", "-port", str(self.names), "-kill"], capture_output=True, check=False)


@contextmanager
def rabbitmq(folder: Path, certificate: Path | None = None, consumer_timeout_ms: int = 1_800_000) -> Iterator[str]:
    """Yield the address of an empty RabbitMQ server."""
    server = RabbitMQ(folder, certificate, consumer_timeout_ms)
    try:
        server.start()
        yield server.address
    finally:
        server.kill()


def postgres_programs() -> Path:
    """Return the folder of the newest PostgreSQL's programs; install it, or skip the test, if it is missing."""

    def find_programs() -> list[Path]:
        return sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))

    if not find_programs() and not apt_install("postgresql"):
        pytest.skip("PostgreSQL is not installed and could not be installed: threads in it were not tested")
    return find_programs()[-1].parent


class Postgres:
    """A PostgreSQL server with its data in a folder; after a kill, it recovers at the next start.

    With a primary, it is that server's standby, by streaming replication.
    """

    def __init__(self, folder: Path, primary: "Postgres | None" = None):
        self.programs, self.port, self.folder = postgres_programs(), free_port(), folder
        self.address = f"postgresql://test@127.0.0.1:{self.port}/postgres"
        # The server refuses to run as root, so as root the tests run it as the user postgres.
        root = os.geteuid() == 0
        self.user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if root else []
        folder.mkdir(parents=True, exist_ok=True)
        if root:
            shutil.chown(folder, "postgres", "postgres")
            for parent in folder.parents:
                if parent.stat().st_uid == 0 and not parent.stat().st_mode & 1:
                    parent.chmod(parent.stat().st_mode | 0o011)
        if primary:
            self.copy_primary(primary)
        else:
            self.run("initdb", "-U", "test", "--auth=trust", "--no-sync")

    def copy_primary(self, primary: "Postgres") -> None:
        """Replace the data by a copy of another server's, which this one follows from its next start."""
        shutil.rmtree(self.folder / "data", ignore_errors=True)
        source = f"host=127.0.0.1 port={primary.port} user=test"
        self.run("pg_basebackup", "-d", source, "--write-recovery-conf", "--checkpoint=fast", "--no-sync")

    def promote(self) -> None:
        """Make a standby a primary."""
        self.run("pg_ctl", "-w", "promote")

    def run(self, name: str, *options: object) -> None:
        command = [*self.user, self.programs / name, "-D", self.folder / "data", *options]
        subprocess.run(command, check=True, capture_output=True, cwd="/")

    def start(self, fsync: bool = False) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        options += "" if fsync else " -c fsync=off"
        self.run("pg_ctl", "-l", self.folder / "log", "-w", "-o", options, "start")

    def kill(self) -> None:
        """Send SIGKILL to the server and its children."""
        leader = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
        for process in (leader, *map(int, children)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        # If no parent reaps the dead process, its pid remains, and the next server would believe that it is alive.
        (self.folder / "data" / "postmaster.pid").unlink(missing_ok=True)
        for socket_lock in self.folder.glob(".s.PGSQL.*"):
            socket_lock.unlink()
        time.sleep(0.2)

    def stop(self) -> None:
        try:
            self.run("pg_ctl", "-t", "240", "-m", "immediate", "stop")  # a busy machine may be slow
        except subprocess.CalledProcessError:
            with suppress(FileNotFoundError):  # it has stopped meanwhile
                self.kill()


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Yield the address of an empty database."""
    server = Postgres(folder)
    server.start()
    try:
        yield server.address
    finally:
        server.stop()

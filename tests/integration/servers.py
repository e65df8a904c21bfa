"""Real servers for tests, each in a folder of its own on a free port, stopped afterwards."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def apt_install(package: str) -> bool:
    """Whether Debian's package could be had (as root only)."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return False
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", package]):
        if subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False).returncode:
            return False
    return True


def postgres_programs() -> Path:
    """The newest server's folder; skips the test, saying so, where there is none and none can be had."""

    def found() -> list[Path]:
        return sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))

    if not found() and not apt_install("postgresql"):
        pytest.skip("PostgreSQL is not here and could not be installed: threads in it were not tested")
    return found()[-1].parent


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The address of an empty database."""
    programs, port, data = postgres_programs(), free_port(), folder / "data"
    # The server refuses to run as root, so it gets a user of its own there.
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    folder.mkdir(parents=True, exist_ok=True)
    if user:
        shutil.chown(folder, "postgres", "postgres")
        for parent in folder.parents:
            if parent.stat().st_uid == 0 and not parent.stat().st_mode & 1:
                parent.chmod(parent.stat().st_mode | 0o011)
    run = lambda *command: subprocess.run([*user, *command], check=True, capture_output=True, cwd="/")  # noqa: E731
    run(programs / "initdb", "-D", data, "-U", "test", "--auth=trust", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    run(programs / "pg_ctl", "-D", data, "-l", folder / "log", "-w", "-o", options, "start")
    try:
        yield f"postgresql://test@127.0.0.1:{port}/postgres"
    finally:
        run(programs / "pg_ctl", "-D", data, "-m", "immediate", "stop")

"""What stands between a process and PostgreSQL: PgBouncer, and an address that moves from one server to another."""

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.servers import Postgres, free_port, program, wait_for

PGBOUNCER_INI = """[databases]
* = host=127.0.0.1 port={server_port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 300
logfile = {folder}/log
pidfile = {folder}/pid
"""


@contextmanager
def pgbouncer(folder: Path, server: Postgres, pool_size: int = 3) -> Iterator[str]:
    """Yield the address of a PgBouncer in transaction mode, which has `pool_size` connections to the server."""
    bouncer = program("pgbouncer", "pgbouncer", "PostgreSQL behind a pooler was not tested")
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "users").write_text('"test" ""\n')
    text = PGBOUNCER_INI.format(server_port=server.port, port=port, folder=folder, pool_size=pool_size)
    (folder / "pgbouncer.ini").write_text(text)
    if os.geteuid() == 0:  # it refuses to run as root
        for path in (folder, *folder.iterdir()):
            shutil.chown(path, "postgres", "postgres")
    process = subprocess.Popen(
        [*server.user, bouncer, folder / "pgbouncer.ini"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(port, process)
        yield f"postgresql://test@127.0.0.1:{port}/postgres"
    finally:
        process.kill()
        process.wait()


class MovingAddress:
    """An address whose new connections go to the server that was named last, as a name in DNS or a virtual address."""

    def __init__(self, target_port: int):
        self.target_port = target_port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):  # the listener has been closed
            while True:
                client, _ = self.listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self.target_port))
                except OSError:
                    client.close()
                    continue
                threading.Thread(target=self.join_sockets, args=(client, server), daemon=True).start()

    def join_sockets(self, client: socket.socket, server: socket.socket) -> None:
        answers = threading.Thread(target=self.copy_bytes, args=(server, client), daemon=True)
        with client, server:
            answers.start()
            self.copy_bytes(client, server)
            answers.join()

    @staticmethod
    def copy_bytes(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()

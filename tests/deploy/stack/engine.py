"""A Docker engine of the tests' own, and its HTTP API over a Unix socket. No compose program is needed."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.servers import apt_install

API_VERSION = "v1.41"  # of Docker 20.10, the oldest engine that the deployment supports
START_TIMEOUT_SECONDS = 60


class EngineMissing(Exception):
    """No container engine can run on this machine; the text says why."""


class Engine:
    """The HTTP API of a Docker engine."""

    def __init__(self, socket: Path):
        self.socket = socket
        transport = httpx.HTTPTransport(uds=str(socket))
        self.http = httpx.Client(transport=transport, base_url=f"http://engine/{API_VERSION}", timeout=900)

    def __call__(self, method: str, path: str, body: object = None, *, missing_ok: bool = False) -> Any:
        """Return the answer's JSON, or its bytes if it is none. Raises AssertionError with the engine's own words."""
        response = self.http.request(method, path, json=body)
        if not (response.is_success or response.status_code == 304 or (missing_ok and response.status_code == 404)):
            raise AssertionError(f"{method} {path}: {response.status_code} {response.text[:600]}")
        try:
            return response.json()
        except ValueError:
            return response.content

    def run_docker(self, *arguments: str, timeout: float = 1800, **environment: str) -> str:
        """Run Docker's command-line program, and return what it prints."""
        command = ["/usr/bin/docker", *arguments]
        environment = os.environ | {"DOCKER_HOST": f"unix://{self.socket}", "DOCKER_BUILDKIT": "1"} | environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, f"{' '.join(command[:4])}: {done.stderr[-4000:]}"
        return done.stdout

    def list_containers(self, project: str) -> list[dict[str, Any]]:
        filters = json.dumps({"label": [f"com.docker.compose.project={project}"]})
        containers: list[dict[str, Any]] = self("GET", f"/containers/json?all=1&filters={filters}")
        return containers

    def inspect(self, container: str) -> dict[str, Any]:
        details: dict[str, Any] = self("GET", f"/containers/{container}/json")
        return details

    def execute(self, container: str, *command: str) -> str:
        """Run a command in a container and return its output. Raises AssertionError if it fails."""
        return self.run_docker("exec", container, *command, timeout=300)

    def read_log(self, container: str, *options: str) -> str:
        """Return what the container has written to stderr and stdout."""
        command = ["/usr/bin/docker", "logs", *options, container]
        environment = os.environ | {"DOCKER_HOST": f"unix://{self.socket}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        return done.stderr + done.stdout


def require_programs() -> None:
    """Install the engine and what builds the base image, if they are missing. Raises EngineMissing."""
    if os.geteuid() != 0:
        raise EngineMissing("no container engine: starting one needs root")
    programs = {"/usr/sbin/dockerd": "docker.io", "/usr/sbin/iptables": "iptables", "/usr/bin/mmdebstrap": "mmdebstrap"}
    for program, package in programs.items():
        if not Path(program).exists() and not apt_install(package):
            raise EngineMissing(f"no container engine: Debian's package {package} cannot be installed")


@contextmanager
def run_engine(folder: Path) -> Iterator[Engine]:
    """Run an engine whose files are in the folder; images stay there for the next run. Raises EngineMissing."""
    require_programs()
    folder.mkdir(parents=True, exist_ok=True)
    socket, pid_file, log = folder / "engine.sock", folder / "engine.pid", folder / "engine.log"
    command = ["/usr/sbin/dockerd", "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")]
    command += ["--pidfile", str(pid_file), "--host", f"unix://{socket}"]
    pid_file.unlink(missing_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    engine, deadline = Engine(socket), time.monotonic() + START_TIMEOUT_SECONDS
    try:
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise EngineMissing(f"no container engine: dockerd does not start: {log.read_text()[-500:]}")
            try:
                engine("GET", "/info")
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield engine
    finally:
        engine.http.close()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

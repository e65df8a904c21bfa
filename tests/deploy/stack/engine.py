"""A Docker engine of the tests' own, its HTTP API over a Unix socket, and Docker Compose."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.servers import accepts_connections, apt_install

API_VERSION = "v1.41"  # of Docker 20.10, the oldest engine that the deployment supports
START_TIMEOUT_SECONDS = 60
PLUGIN_FOLDERS = ("/usr/libexec/docker/cli-plugins", "/usr/local/lib/docker/cli-plugins")
DEBIAN_MIRROR = "http://deb.debian.org/debian"
DEBIAN_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"


class EngineMissing(Exception):
    """No container engine can run on this machine; the text says why."""


class Engine:
    """The HTTP API of a Docker engine."""

    def __init__(self, socket: Path, programs: Path):
        self.socket = socket
        # What an operator's shell has, so that `docker` is Debian's program and finds Compose.
        self.environment = {
            "DOCKER_HOST": f"unix://{socket}", "DOCKER_CONFIG": str(programs), "DOCKER_BUILDKIT": "1",
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
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

    def run_docker(self, *arguments: str, timeout: float = 1800) -> str:
        """Run Docker's command-line program, and return what it prints."""
        command, environment = ["/usr/bin/docker", *arguments], os.environ | self.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, f"{' '.join(command[:4])}: {done.stderr[-4000:]}"
        return done.stdout

    def inspect(self, container: str) -> dict[str, Any]:
        details: dict[str, Any] = self("GET", f"/containers/{container}/json")
        return details

    def execute(self, container: str, *command: str) -> str:
        """Run a command in a container and return its output. Raises AssertionError if it fails."""
        return self.run_docker("exec", container, *command, timeout=300)

    def read_log(self, container: str, *options: str) -> str:
        """Return what the container has written to stderr and stdout."""
        command = ["/usr/bin/docker", "logs", *options, container]
        environment = os.environ | self.environment
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


def install_compose(programs: Path) -> None:
    """Put `docker` and, unless this machine has it, Compose 2 of Debian's next release into a folder.

    Raises EngineMissing if it cannot be downloaded.
    """
    plugin, scratch = programs / "cli-plugins" / "docker-compose", programs / "apt"
    plugin.parent.mkdir(parents=True, exist_ok=True)
    (programs / "docker").unlink(missing_ok=True)
    (programs / "docker").symlink_to("/usr/bin/docker")
    if plugin.exists() or any((Path(folder) / "docker-compose").exists() for folder in PLUGIN_FOLDERS):
        return
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True, exist_ok=True)
    (scratch / "sources.list").write_text(f"deb [signed-by={DEBIAN_KEYS}] {DEBIAN_MIRROR} trixie main\n")
    options = [f"Dir::Etc::sourcelist={scratch}/sources.list", "Dir::Etc::sourceparts=/dev/null"]
    options += [f"Dir::State::Lists={scratch}/lists", f"Dir::Cache={scratch}/cache", "APT::Sandbox::User=root"]
    apt = ["apt-get", *(word for option in options for word in ("-o", option))]
    for command in ([*apt, "update"], [*apt, "download", "docker-compose"]):
        if subprocess.run(command, cwd=scratch, capture_output=True, timeout=300, check=False).returncode:
            raise EngineMissing("no Docker Compose 2: Debian's package docker-compose of trixie cannot be downloaded")
    (package,) = scratch.glob("docker-compose_*.deb")
    subprocess.run(["dpkg-deb", "-x", package, scratch / "files"], check=True)
    shutil.copy(scratch / "files/usr/libexec/docker/cli-plugins/docker-compose", plugin)
    shutil.rmtree(scratch)


@contextmanager
def run_engine(folder: Path) -> Iterator[Engine]:
    """Run an engine whose files are in the folder; images stay there for the next run. Raises EngineMissing."""
    require_programs()
    install_compose(folder / "programs")
    folder.mkdir(parents=True, exist_ok=True)
    address, pid_file, log = folder / "engine.sock", folder / "engine.pid", folder / "engine.log"
    command = ["/usr/sbin/dockerd", "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")]
    command += ["--pidfile", str(pid_file), "--host", f"unix://{address}"]
    pid_file.unlink(missing_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    engine, deadline = Engine(address, folder / "programs"), time.monotonic() + START_TIMEOUT_SECONDS
    try:
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise EngineMissing(f"no container engine: dockerd does not start: {log.read_text()[-500:]}")
            if accepts_connections(address):
                engine("GET", "/info")
                break
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

"""The stack of deploy/compose.yaml as it stands, run by Docker Compose in a checkout of its own."""

import json
import os
import re
import shutil
import subprocess
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.deploy.stack.engine import Engine
from tests.support.compose_files import ROOT

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
DOCUMENTED_ADDRESS = "http://127.0.0.1:8000"
COMPOSE = ("docker", "compose", "-f", "deploy/compose.yaml")


def parse_seconds(text: str) -> float:
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)(ms|h|m|s)", text))


def copy_checkout(folder: Path) -> None:
    """Copy the tree's tracked files, as they are now, into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


class Stack:
    """The containers of a compose file; `checkout` has the file, and `.env` beside it."""

    def __init__(self, engine: Engine, checkout: Path):
        self.engine, self.checkout = engine, checkout

    @cached_property
    def services(self) -> dict[str, dict[str, Any]]:
        """Each service as Compose reads it, with the values of .env."""
        services: dict[str, dict[str, Any]] = json.loads(self.compose("config", "--format", "json"))["services"]
        return services

    def name(self, service: str, number: int = 1) -> str:
        return f"omnivideo-{service}-{number}"

    def set_variables(self, values: dict[str, str]) -> None:
        """Set variables in .env, in place of the lines that have them or their defaults."""
        path = self.checkout / "deploy/.env"
        text = path.read_text()
        for name, value in values.items():
            text, count = re.subn(rf"^#?{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
            assert count == 1, name
        path.write_text(text)

    def run(self, commands: str, timeout: float = 1800) -> str:
        """Run commands in the checkout, as an operator's shell does; return what they print to stdout.

        The address of the API in documented commands is replaced by that of this stack.
        """
        if DOCUMENTED_ADDRESS in commands:
            commands = commands.replace(DOCUMENTED_ADDRESS, self.address("api", 8000))
        home = {"HOME": str(self.checkout.parent / "home")}  # an empty one
        environment = os.environ | self.engine.environment | home
        command = ["bash", "-euo", "pipefail", "-c", commands]
        done = subprocess.run(
            command, cwd=self.checkout, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, f"{commands}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def compose(self, *arguments: str, timeout: float = 1800) -> str:
        return self.run(" ".join((*COMPOSE, *arguments)), timeout)

    # ------------------------------------------------------------ starting

    def up(self, *options: str) -> dict[str, float]:
        """Start the services; return the seconds until each was healthy."""
        began_at = time.monotonic()
        self.compose("up", "--detach", *options)
        return {
            service: self.wait(self.name(service), "service_healthy", began_at=began_at)
            for service, description in self.services.items()
            if "healthcheck" in description
        }

    def scale(self, **counts: int) -> None:
        """Run so many containers of the services, and wait until all are healthy."""
        scales = [f"--scale {service}={count}" for service, count in counts.items()]
        self.compose("up", "--detach", "--wait", *scales)

    def wait(
        self, container: str, condition: str, timeout_seconds: float = 600, began_at: float | None = None
    ) -> float:
        """Wait for a condition of `depends_on`; return the seconds since `began_at`, which is now without it."""
        deadline = time.monotonic() + timeout_seconds
        began_at = began_at or time.monotonic()
        while True:
            state = self.engine.inspect(container)["State"]
            if condition == "service_healthy" and state.get("Health", {}).get("Status") == "healthy":
                return time.monotonic() - began_at
            assert time.monotonic() < deadline, f"{container} is not {condition}: {state}\n{self.log(container)}"
            time.sleep(0.2)

    # ------------------------------------------------------------ while it runs

    def log(self, container: str) -> str:
        return self.engine.read_log(container, "--tail", "60")

    def address(self, service: str, inner_port: int, number: int = 1) -> str:
        """Return the address at which this machine reaches a published port."""
        ports = self.engine.inspect(self.name(service, number))["NetworkSettings"]["Ports"]
        binding = ports[f"{inner_port}/tcp"][0]
        return f"http://{binding['HostIp']}:{binding['HostPort']}"

    def stop(self, service: str, number: int = 1, seconds: int | None = None) -> tuple[float, int]:
        """Stop a container as `docker stop` does. Return the seconds that it took and the exit code."""
        container, began_at = self.name(service, number), time.monotonic()
        grace = "" if seconds is None else f"?t={seconds}"
        self.engine("POST", f"/containers/{container}/stop{grace}")
        elapsed = time.monotonic() - began_at
        return elapsed, int(self.engine.inspect(container)["State"]["ExitCode"])

    def start(self, service: str, number: int = 1) -> None:
        self.engine("POST", f"/containers/{self.name(service, number)}/start")

    def kill(self, service: str, number: int = 1) -> None:
        self.engine("POST", f"/containers/{self.name(service, number)}/kill")

    def down(self) -> None:
        """Remove the containers, the networks and the volumes."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "10")

"""Run deploy/compose.yaml as it stands on an engine's API: the same options that Compose would send."""

import re
import shlex
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.stack.engine import Engine
from tests.support.compose_files import DEPLOY, interpolate

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
SIZES = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def parse_seconds(text: str) -> float:
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)(ms|h|m|s)", text))


def parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([kmgb]?)", str(text).lower())
    assert match, text
    return int(match[1]) * SIZES[match[2]]


class Stack:
    """The containers of a compose file, with the values of an environment file."""

    def __init__(self, engine: Engine, given: dict[str, str], *files: str):
        self.engine, self.given = engine, given
        self.model: dict[str, Any] = yaml.safe_load(interpolate((DEPLOY / "compose.yaml").read_text(), given))
        self.project: str = self.model["name"]
        self.services: dict[str, dict[str, Any]] = self.model["services"]

    def name(self, service: str, number: int = 1) -> str:
        return f"{self.project}-{service}-{number}"

    # ------------------------------------------------------------ starting

    def create_networks(self) -> None:
        existing = {network["Name"] for network in self.engine("GET", "/networks")}
        for name, options in self.model["networks"].items():
            full_name, internal = f"{self.project}_{name}", bool((options or {}).get("internal"))
            if full_name not in existing:
                body = {"Name": full_name, "Driver": "bridge", "Internal": internal, "CheckDuplicate": True}
                self.engine("POST", "/networks/create", body)

    def describe_host(self, service: dict[str, Any]) -> dict[str, Any]:
        """Return the engine's HostConfig of a service."""
        limits, (restart, _, retries) = service["deploy"]["resources"]["limits"], service["restart"].partition(":")
        configs = [(Path(DEPLOY, self.model["configs"][config["source"]]["file"]).resolve(), config["target"])
                   for config in service.get("configs", [])]  # fmt: skip
        host = {
            "Init": service.get("init"),
            "ReadonlyRootfs": service.get("read_only", False),
            "CapDrop": service.get("cap_drop"),
            "SecurityOpt": service.get("security_opt"),
            "NetworkMode": f"{self.project}_{service['networks'][0]}",
            "Memory": parse_bytes(limits["memory"]),
            "MemorySwap": parse_bytes(limits["memory"]),
            "NanoCpus": int(float(limits["cpus"]) * 1e9),
            "PidsLimit": int(limits["pids"]),
            "Tmpfs": {mount.partition(":")[0]: mount.partition(":")[2] for mount in service.get("tmpfs", [])},
            "Binds": [f"{self.project}_{volume}" for volume in service.get("volumes", [])]
            + [f"{source}:{target}:ro" for source, target in configs],
            "LogConfig": {"Type": service["logging"]["driver"], "Config": service["logging"]["options"]},
            "RestartPolicy": {"Name": restart, "MaximumRetryCount": int(retries or 0)},
            "PortBindings": {},
        }
        if "shm_size" in service:
            host["ShmSize"] = parse_bytes(service["shm_size"])
        for port in service.get("ports", []):
            address, outer, inner = port.split(":")
            # A range of ports: each container of a scaled service gets one that is free.
            host["PortBindings"][f"{inner}/tcp"] = [{"HostIp": address, "HostPort": outer}]
        return host

    def describe_container(self, service_name: str) -> dict[str, Any]:
        """Return the engine's description of a service's container."""
        service = self.services[service_name]
        host = self.describe_host(service)
        environment = {name: self.given.get(name) if value is None else value
                       for name, value in service.get("environment", {}).items()}  # fmt: skip
        command = service.get("command")
        labels = {"com.docker.compose.project": self.project, "com.docker.compose.service": service_name}
        body = {
            "Image": service["image"],
            "Env": [f"{name}={value}" for name, value in environment.items() if value is not None],
            "User": str(service.get("user", "")),
            "HostConfig": host,
            "ExposedPorts": {port: {} for port in host["PortBindings"]},
            "Labels": labels,
            "NetworkingConfig": {"EndpointsConfig": {host["NetworkMode"]: {"Aliases": [service_name]}}},
        }
        if command:
            body["Cmd"] = shlex.split(command) if isinstance(command, str) else command
        if "stop_signal" in service:
            body["StopSignal"] = service["stop_signal"]
        if "stop_grace_period" in service:
            body["StopTimeout"] = round(parse_seconds(service["stop_grace_period"]))
        if check := service.get("healthcheck"):
            assert "start_interval" not in check, "engines before 25 refuse it"
            names = {"Interval": "interval", "Timeout": "timeout", "StartPeriod": "start_period"}
            times = {ours: int(1e9 * parse_seconds(check[theirs])) for ours, theirs in names.items() if theirs in check}
            body["Healthcheck"] = {"Test": check["test"], "Retries": check.get("retries", 3), **times}
        return body

    def create(self, service: str, number: int = 1) -> str:
        """Create and start a container of a service, in place of an earlier one, and return its name."""
        container = self.name(service, number)
        self.engine("DELETE", f"/containers/{container}?force=1", missing_ok=True)
        self.engine("POST", f"/containers/create?name={container}", self.describe_container(service))
        for network in self.services[service]["networks"][1:]:
            endpoint = {"Container": container, "EndpointConfig": {"Aliases": [service]}}
            self.engine("POST", f"/networks/{self.project}_{network}/connect", endpoint)
        self.engine("POST", f"/containers/{container}/start")
        return container

    def up(self, scale: dict[str, int] | None = None, services: Iterable[str] = ()) -> dict[str, float]:
        """Start the services in the order of `depends_on`; return the seconds until each was healthy."""
        self.create_networks()
        began_at, started = time.monotonic(), dict[str, list[str]]()

        def start(service: str) -> None:
            if service in started:
                return
            for other, dependency in self.services[service].get("depends_on", {}).items():
                start(other)
                for container in started[other]:
                    self.wait(container, dependency["condition"])
            count = (scale or {}).get(service, 1)
            started[service] = [self.create(service, number) for number in range(1, count + 1)]

        for service in services or self.services:
            start(service)
        seconds = {}
        for service, containers in started.items():
            if "healthcheck" in self.services[service]:
                for container in containers:
                    self.wait(container, "service_healthy")
                seconds[service] = time.monotonic() - began_at
        return seconds

    def wait(self, container: str, condition: str, timeout_seconds: float = 600) -> float:
        """Wait for a condition of `depends_on`; return the seconds that it took."""
        began_at = time.monotonic()
        while time.monotonic() - began_at < timeout_seconds:
            state = self.engine.inspect(container)["State"]
            health = state.get("Health", {}).get("Status")
            if condition == "service_healthy" and health == "healthy":
                break
            if state["Status"] == "exited" and condition == "service_completed_successfully":
                assert state["ExitCode"] == 0, f"{container} ended with {state['ExitCode']}: {self.log(container)}"
                break
            time.sleep(0.2)
        else:
            raise AssertionError(f"{container} is not {condition}: {state}\n{self.log(container)}")
        return time.monotonic() - began_at

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
        for container in self.engine.list_containers(self.project):
            self.engine("DELETE", f"/containers/{container['Id']}?force=1&v=1", missing_ok=True)
        for name in self.model["networks"]:
            self.engine("DELETE", f"/networks/{self.project}_{name}", missing_ok=True)
        for name in self.model["volumes"]:
            self.engine("DELETE", f"/volumes/{self.project}_{name}?force=1", missing_ok=True)

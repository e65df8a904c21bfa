"""Attack a service while ten ordinary users work with it, and print what the users notice.

python -m benchmarks.hostile [--services embedded,deployed] [--only ATTACK,...] [--seconds 20] [--json FILE]

The embedded service is `omnivideo serve` without settings. The deployed one has PostgreSQL, Redis, an S3 server
(rclone), a server of the language model and a worker, all on this machine. Both may open 1,024 files. Before and after
each attack the users work alone; the figures of an attack are divided by those of both quiet phases, so that a busy
machine slows both. How late timers of the users' process fire, and the load of the machine, stand beside them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sqlalchemy import func, select

from benchmarks.attackers import ATTACKS
from benchmarks.cluster import KEY, OmnivideoProcess, ServiceCluster
from benchmarks.ordinary_users import UsersReport
from omnivideo.contracts import OPEN_STATES
from omnivideo.media.artifacts import encode_clip
from omnivideo.settings import load_settings
from omnivideo.storage.database.keys import APIKeyRepository
from omnivideo.storage.database.schema import turns
from omnivideo.wiring import ServiceWiring
from tests.support.servers import free_port

NUM_USERS, MAX_FILES = 10, 1024
SETTLE_SECONDS = 60.0  # after an attack, until no clip is queued and no turn open
HEALTH_GOAL_SECONDS, ORDINARY_GOAL_RATIO, DEPLOYED_GOAL_MB, EMBEDDED_GOAL_MB = 0.1, 3.0, 500.0, 300.0
DECODED_SHAPE = (100, 720, 1280, 3)  # of the clip that is slow to decode: frames, height, width, channels


@dataclass
class AttackedService:
    """A running service. `faults` start and end the failure of a part; None for parts that it does not have."""

    name: str
    address: str
    api: OmnivideoProcess
    wiring: ServiceWiring
    user_keys: list[str]
    attacker_key: str
    faults: Mapping[str, Callable[[], AbstractContextManager[None]] | None]


@dataclass
class Phase:
    """What the users noticed. Memory in MB: of the process that answers requests, and with those that it has started.

    An embedded service's models are in one of those, so its goal is for all of them.
    """

    report: UsersReport
    api_mb: float
    total_mb: float
    load: float

    def quantile(self, kind: str, share: float) -> float:
        return compute_quantile(self.report.latencies.get(kind, []), share)


def compute_quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


# ---------------------------------------------------------------- services


@contextmanager
def run_embedded(folder: Path) -> Iterator[AttackedService]:
    """Run `omnivideo serve` with SQLite, a folder and its own worker."""
    port = free_port()
    environment = os.environ | {
        "OMNIVIDEO_HOME": str(folder), "OMNIVIDEO_ADMIN_KEY": KEY, "OMNIVIDEO_WEBHOOK_HOSTS": "127.0.0.1",
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
    }  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    command = ["serve", "--port", str(port), "--device", "cpu"]
    api = OmnivideoProcess(command, environment, folder / "api.log", f"{address}/ready", MAX_FILES)
    wiring = ServiceWiring(load_settings(home=folder, admin_key=KEY))
    user_keys, attacker_key = create_keys(wiring)
    api.start()
    try:
        faults = {"a hanging S3 server": None, "a broker that is down": None}
        yield AttackedService("embedded", address, api, wiring, user_keys, attacker_key, faults)
    finally:
        api.kill()
        wiring.close()


@contextmanager
def run_deployed(folder: Path) -> Iterator[AttackedService]:
    """Run every part of the service as a process of its own."""
    with ExitStack() as stack:
        settings = {"WEBHOOK_HOSTS": "127.0.0.1", "HEARTBEAT_TIMEOUT": "15"}
        cluster = ServiceCluster(
            folder, "", stack, workers=1, frequent_saves=False, max_files=MAX_FILES,
            extra_settings=settings,
        )  # fmt: skip
        user_keys, attacker_key = create_keys(cluster.wiring)

        @contextmanager
        def hang_store() -> Iterator[None]:
            assert cluster.s3.process
            cluster.s3.process.send_signal(signal.SIGSTOP)
            try:
                yield
            finally:
                cluster.s3.process.send_signal(signal.SIGCONT)

        @contextmanager
        def stop_broker() -> Iterator[None]:
            cluster.broker.kill()
            try:
                yield
            finally:
                cluster.broker.start()

        faults = {"a hanging S3 server": hang_store, "a broker that is down": stop_broker}
        yield AttackedService("deployed", cluster.address, cluster.api, cluster.wiring, user_keys, attacker_key, faults)


def create_keys(wiring: ServiceWiring) -> tuple[list[str], str]:
    """Return a key for each user, and one for the attacker."""
    keys = APIKeyRepository(wiring.engine)
    return [keys.create_key(f"user {number}")[1] for number in range(NUM_USERS)], keys.create_key("attacker")[1]


# ---------------------------------------------------------------- phases


def run_phase(service: AttackedService, seconds: float, attack: str | None, media: Path) -> Phase:
    """Let the users work, alone or during an attack, and measure the API's memory meanwhile."""
    command = [sys.executable, "-m", "benchmarks.ordinary_users", service.address, str(seconds), *service.user_keys]
    users = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert users.stdin and users.stdout
    if users.stdout.readline() != "ready\n":
        raise RuntimeError(f"the users could not begin; see {service.api.log}")
    with run_attack(service, attack, media) as attackers:
        users.stdin.write("\n")
        users.stdin.flush()
        api_mb = total_mb = 0.0
        reader = create_output_reader(users)
        while (output := reader()) is None:
            own, children = read_memory_mb(service.api.process.pid)
            api_mb, total_mb = max(api_mb, own), max(total_mb, own + children)
            time.sleep(0.25)
        load = os.getloadavg()[0]
        has_failed = attackers is not None and attackers.poll() is not None
    report = UsersReport(**json.loads(output))
    if has_failed:
        report.errors.append("the attackers' process has ended")
    return Phase(report, api_mb, total_mb, load)


def create_output_reader(process: subprocess.Popen[str]) -> Callable[[], str | None]:
    """Return a function that returns the output of a process once it has ended, and None before."""

    def read() -> str | None:
        with suppress(subprocess.TimeoutExpired):
            output, _ = process.communicate(timeout=0.01)
            if process.returncode:
                raise RuntimeError("the users' process failed")
            return output
        return None

    return read


@contextmanager
def run_attack(service: AttackedService, attack: str | None, media: Path) -> Iterator[subprocess.Popen[str] | None]:
    if attack is None:
        yield None
        return
    command = [sys.executable, "-m", "benchmarks.attackers", attack, service.address, service.attacker_key, str(media)]
    attackers = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert attackers.stdout
    if attack == "a hanging S3 server":
        attackers.stdout.readline()  # a file is stored that will be downloaded
    fault = service.faults.get(attack) or nullcontext
    try:
        with fault():
            time.sleep(2.0)
            yield attackers
    finally:
        attackers.kill()
        attackers.wait()


def read_memory_mb(pid: int) -> tuple[float, float]:
    """Return the resident memory of a process, and that of its children and theirs."""
    own, children = 0.0, 0.0
    with suppress(OSError):
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                children += sum(read_memory_mb(int(child)))
    return own, children


def settle(service: AttackedService) -> None:
    """Wait until no clip is queued and no turn is open."""
    deadline = time.monotonic() + SETTLE_SECONDS
    open_turns = select(func.count()).select_from(turns).where(turns.c.state.in_(OPEN_STATES))
    while time.monotonic() < deadline:
        if not service.wiring.jobs.count_queued() and not service.wiring.jobs.fetch_all(open_turns)[0][0]:
            return
        time.sleep(0.5)


# ---------------------------------------------------------------- the table


def find_missed_goals(service: AttackedService, phase: Phase, quiet: list[Phase]) -> list[str]:
    missed = []
    if phase.quantile("health", 0.99) > HEALTH_GOAL_SECONDS:
        missed.append("/health")
    if compute_ratio(phase, quiet, "ordinary", 0.99) > ORDINARY_GOAL_RATIO:
        missed.append("ordinary")
    embedded_limit = max(before.total_mb for before in quiet) + EMBEDDED_GOAL_MB
    if phase.api_mb > DEPLOYED_GOAL_MB if service.name == "deployed" else phase.total_mb > embedded_limit:
        missed.append("memory")
    if phase.report.errors:
        missed.append("errors")
    return missed


def compute_ratio(phase: Phase, quiet: list[Phase], kind: str, share: float) -> float:
    """Return how many times as long as in the quiet phases a kind of request takes."""
    values = [value for before in quiet for value in before.report.latencies.get(kind, [])]
    return phase.quantile(kind, share) / compute_quantile(values, share)


def describe_phase(phase: Phase, quiet: list[Phase]) -> list[str]:
    cells = []
    for kind, share in (("health", 0.99), ("ordinary", 0.99), ("store", 0.99), ("turn", 0.5)):
        ratio = f" ({compute_ratio(phase, quiet, kind, share):.1f})" if quiet else ""
        cells.append(f"{1000 * phase.quantile(kind, share):.0f}{ratio}")
    refused = ", ".join(f"{count} {kind}" for kind, count in phase.report.refused.items() if kind != "prepare")
    timers = 1000 * compute_quantile(phase.report.timer_delays, 0.99)
    return [*cells, refused or "0", str(len(phase.report.errors)), f"{phase.api_mb:.0f}", f"{phase.total_mb:.0f}",
            f"{timers:.0f}", f"{phase.load:.1f}"]  # fmt: skip


def attack_service(
    service: AttackedService, attacks: list[str], seconds: float, media: Path, console: Console
) -> list[list[str]]:
    """Run each attack between two quiet phases; return the rows of the table."""
    run_phase(service, 5.0, None, media)  # the first requests load modules and open connections
    settle(service)
    before, rows = run_phase(service, seconds, None, media), []
    rows.append([service.name, "none", *describe_phase(before, []), ""])
    for attack in attacks:
        if attack in service.faults and service.faults[attack] is None:
            rows.append([service.name, attack, "it has none", *[""] * 10])
            continue
        phase = run_phase(service, seconds, attack, media)
        if attack == "a bulk owner":  # its clips remain queued
            after = before
        else:
            settle(service)
            after = run_phase(service, seconds, None, media)
        quiet = [before, after]
        missed = find_missed_goals(service, phase, quiet)
        rows.append([service.name, attack, *describe_phase(phase, quiet), ", ".join(missed)])
        console.print(*rows[-1], *phase.report.errors[:3], sep=" | ", highlight=False, markup=False)
        before = after
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", default="embedded,deployed")
    parser.add_argument("--only", default=",".join(name.replace(",", "") for name in ATTACKS))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    attacks = [name for name in ATTACKS if name.replace(",", "") in wanted]
    console, rows = Console(width=170), []
    with tempfile.TemporaryDirectory() as folder:
        media = Path(folder) / "slow.mp4"
        media.write_bytes(encode_clip(np.zeros(DECODED_SHAPE, dtype=np.uint8), 24)[0])
        for name in arguments.services.split(","):
            home = Path(folder) / name
            home.mkdir()
            with {"embedded": run_embedded, "deployed": run_deployed}[name](home) as service:
                rows += attack_service(service, attacks, arguments.seconds, media, console)
    table = Table(title=f"{NUM_USERS} ordinary users, {os.cpu_count()} cores, ms (times the quiet phases)")
    for column in (
        "service", "attack", "/health p99", "ordinary p99", "store p99", "turn median", "refused with Retry-After",
        "errors", "API MB", "with decoders", "timers p99", "load", "goals missed",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("service", "attack", "goals missed") else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

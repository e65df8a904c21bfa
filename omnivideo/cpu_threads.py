"""Set how many CPU threads torch uses and how idle threads wait; every entry point does this before it loads torch.

By default, GNU's OpenMP starts one thread for each core of the machine, and idle threads spin. Beside other busy
processes, or under a container's CPU quota, spinning threads take CPU time from working ones: a clip of the tiny
preset then takes 40 to 155 s instead of 3 s. Values that the user has set in the environment are kept.

This module does not import torch. libgomp reads the environment once, when torch loads it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

WAIT_VARIABLES = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
COUNT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
CGROUP_ROOT, CGROUP_MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

COMPUTING_NICENESS = 5  # a third of the CPU time of a process that competes with it

own_values: dict[str, str] = {}  # the values that this module has set; all others are the user's


def configure_cpu_threads(workers: int = 1) -> None:
    """Let idle OpenMP threads sleep, and use an equal share of the CPUs where `workers` processes run side by side.

    If torch is already loaded, only its number of threads can still be changed, and this function only lowers it.
    """
    if not any(is_set_by_user(name) for name in WAIT_VARIABLES):
        set_variables(WAIT_VARIABLES)
    if any(is_set_by_user(name) for name in COUNT_VARIABLES):
        return
    threads = max(1, count_available_cpus() // workers)
    set_variables({"OMP_NUM_THREADS": str(threads)})  # for this process's children, too
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_num_threads(min(threads, torch.get_num_threads()))


def build_child_environment(processes: int) -> dict[str, str]:
    """Return the environment for each of `processes` children that share this process's CPUs."""
    threads = str(max(1, count_available_cpus() // processes))
    counts = {} if any(is_set_by_user(name) for name in COUNT_VARIABLES) else {"OMP_NUM_THREADS": threads}
    return dict(os.environ) | counts


def lower_cpu_priority() -> None:
    """Let the other processes of this machine come first: those that answer people, beside one that only computes.

    On Linux a priority belongs to a thread; threads that are started later have that of the one that starts them.
    """
    threads = Path("/proc/self/task")
    for thread in threads.iterdir() if threads.is_dir() else ():
        with suppress(ProcessLookupError):  # it has ended meanwhile
            niceness = max(COMPUTING_NICENESS, os.getpriority(os.PRIO_PROCESS, int(thread.name)))
            os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)


def is_set_by_user(name: str) -> bool:
    return name in os.environ and os.environ[name] != own_values.get(name)


def set_variables(values: dict[str, str]) -> None:
    os.environ.update(values)
    own_values.update(values)


def count_available_cpus() -> int:
    """Return the number of CPUs that this process may use: those in its cpuset, limited by its cgroups' quotas."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cpus, *read_cpu_quotas(CGROUP_ROOT, CGROUP_MEMBERSHIP)])))


def read_cpu_quotas(root: Path, membership: Path) -> Iterator[float]:
    """Yield the CPU quotas of the cgroups (version 1 or 2) of this process and of their parents."""
    for folder in iterate_cgroups(root, membership, "cpu"):
        quota = read_quota(folder)
        if quota is not None:
            yield quota


def iterate_cgroups(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroups (version 1 or 2) for a controller such as "cpu", and their parents.

    In a container, /proc/self/cgroup may hold the host's path, which is not mounted; the limits are then at `root`.
    """
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / controllers
        for folder in (mount / path.lstrip("/"), *(mount / path.lstrip("/")).parents):
            yield folder
            if folder == mount:
                break


def read_quota(folder: Path) -> float | None:
    """Return a cgroup's quota in CPUs, or None if it has no limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return int(quota) / int(period) if quota.isdigit() and int(period) else None

"""Start a command as several processes on this machine."""

import ctypes
import signal
import socket
import subprocess
import sys
import time

from omnivideo.cpu_threads import build_child_environment
from omnivideo.training.engine.distributed.processes import check_process_counts

POLL_INTERVAL_SECONDS = 0.1


def relaunch_command(processes: int, sequence_parallel_size: int) -> int:
    """Run this process's own command line as several processes and return the exit code."""
    check_process_counts(processes, sequence_parallel_size)
    return launch_processes(processes, [sys.executable, "-m", "omnivideo.cli", *sys.argv[1:]])


def launch_processes(processes: int, command: list[str]) -> int:
    """Run a command as several processes and return the exit code; if one fails, kill the others."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port()), "WORLD_SIZE": str(processes)}
    environment = build_child_environment(processes) | shared | {"LOCAL_WORLD_SIZE": str(processes)}
    children = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, preexec_fn=terminate_with_parent
        )
        for rank in range(processes)
    ]
    try:
        return wait_for_processes(children)
    finally:
        for child in children:
            child.kill()
            child.wait()


def wait_for_processes(children: list[subprocess.Popen[bytes]]) -> int:
    """Wait until all processes have ended or one has failed.

    Return 0, or the exit code of the one that failed: 128 + n if signal n killed it.
    """
    while True:
        codes = [child.poll() for child in children]
        failures = [code for code in codes if code]
        if failures or None not in codes:
            code = failures[0] if failures else 0
            return 128 - code if code < 0 else code
        time.sleep(POLL_INTERVAL_SECONDS)


def terminate_with_parent() -> None:
    """Make Linux kill this child process when its parent ends for any reason."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

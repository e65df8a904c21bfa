"""Runs the turns of a service in a process of their own.

What a turn does beside waiting is Python code, on texts of any kind. In the process that answers requests it would
compete with them for the interpreter; here the operating system prefers the requests, and a turn that stops its process
stops no request.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from omnivideo.api.turn_runner import STOP_TIMEOUT_SECONDS, TurnRunner
from omnivideo.cpu_threads import lower_cpu_priority
from omnivideo.errors import StoreError

log = logging.getLogger("omnivideo.api")
RESTART_SECONDS = (0.5, 30.0)  # the first and the longest pause before the process is started again
STABLE_SECONDS = 20.0  # after which a process has started, and the next pause is the first one again
MAX_FAILED_STARTS = 3  # in a row, until the service is not ready


class TurnProcess:
    """Starts a process that runs the turns, and starts it again when it ends. `command` is its command line."""

    def __init__(self, command: Sequence[str]):
        self.command = list(command)
        self.stop_event = threading.Event()
        self.lock = threading.Lock()  # of `process`
        self.process: subprocess.Popen[bytes] | None = None
        self.failed_starts = 0  # in a row: the process has ended by itself soon after it was started
        self.supervisor = threading.Thread(target=self.supervise, daemon=True, name="turn-process")

    def start(self) -> None:
        self.supervisor.start()

    def stop(self) -> None:
        """Let the process give its turns back and end."""
        self.stop_event.set()
        with self.lock:
            process = self.process
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()  # for which the process waits
        try:
            process.wait(2 * STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # its turns count as lost, and another process continues them
            process.wait()

    def check_running(self) -> None:
        """Raise StoreError if the process does not start, so that no turns are run."""
        if self.failed_starts >= MAX_FAILED_STARTS:
            raise StoreError("turns: the process that runs them does not start; the log says why")

    def supervise(self) -> None:
        pause_seconds = RESTART_SECONDS[0]
        while not self.stop_event.is_set():
            with self.lock:
                if self.stop_event.is_set():
                    return
                self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE)
            try:
                status, is_stable = self.process.wait(STABLE_SECONDS), False
            except subprocess.TimeoutExpired:
                self.failed_starts = 0  # it has started, so the service is ready again
                status, is_stable = self.process.wait(), True
            if self.process.stdin is not None:
                self.process.stdin.close()
            if self.stop_event.is_set():
                return
            # One that was killed did start: a turn may have taken all memory, for example.
            self.failed_starts = 0 if is_stable or status < 0 else self.failed_starts + 1
            pause_seconds = RESTART_SECONDS[0] if is_stable else pause_seconds
            log.error("turns: their process has ended with status %d; it is started again", status)
            self.stop_event.wait(pause_seconds)
            pause_seconds = min(2 * pause_seconds, RESTART_SECONDS[1])


def run_turns(runner: TurnRunner) -> None:
    """Run turns until the process that has started this one ends, or this one gets SIGTERM or SIGINT."""
    lower_cpu_priority()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    runner.start()
    try:
        while os.read(sys.stdin.fileno(), 1024):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        runner.stop()

"""Runs the turns of a service in a process of their own, with the models if no other server has them.

What a turn does beside waiting is Python code, on texts of any kind. In the process that answers requests it would
compete with them for the interpreter, and so would a model; here the operating system prefers the requests, and a turn
that stops its process stops no request.

The two processes are connected by a socket, which is the standard input of the one that runs the turns. The service
writes BEGIN and a key once the database has its tables, and the other process answers READY once it runs turns. Each
then writes the changes in the database, which SQLite does not deliver to other processes. The end of the input ends the
process.
"""

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Protocol

from omnivideo.contracts import Change
from omnivideo.errors import StoreError

log = logging.getLogger("omnivideo.api")
BEGIN, READY = b"begin", b"ready"
STOP_SECONDS = 10.0  # twice as long as the turns may take to reach a point where they can stop
RESTART_SECONDS = (0.5, 30.0)  # the first and the longest pause before the process is started again
STABLE_SECONDS = 20.0  # after which the next pause is the first one again
MAX_FAILED_STARTS = 3  # in a row, until the service is not ready
MAX_WAITING_CHANGES = 10_000  # that the other process has not read


class Notifier(Protocol):
    """Delivers changes in the database to their followers in this process."""

    def deliver(self, change: Change) -> None: ...

    def forward_to(self, send: Callable[[Change], None]) -> AbstractContextManager[None]:
        """Call `send` for the changes of this process that the database does not deliver to others."""
        ...


def exchange_changes(connection: socket.socket, notifier: Notifier) -> None:
    """Pass changes to the other process, and deliver those that it passes, until it closes the connection.

    Nobody waits for a process that reads slowly: the changes are dropped, and their followers read the database at
    intervals.
    """
    waiting: queue.Queue[Change | None] = queue.Queue(MAX_WAITING_CHANGES)

    def send(change: Change) -> None:
        with suppress(queue.Full):
            waiting.put_nowait(change)

    def write_changes() -> None:
        with suppress(OSError):
            while (change := waiting.get()) is not None:
                connection.sendall(change.model_dump_json().encode() + b"\n")

    threading.Thread(target=write_changes, daemon=True, name="changes").start()
    with notifier.forward_to(send), suppress(OSError), connection.makefile("rb") as lines:
        for line in lines:
            notifier.deliver(Change.model_validate_json(line))
    with suppress(queue.Full):
        waiting.put_nowait(None)


def read_line(connection: socket.socket) -> bytes:
    """Return a line of the connection, and nothing of what follows it; b"" if the other process has closed it."""
    line = b""
    with suppress(OSError):
        while not line.endswith(b"\n") and (byte := connection.recv(1)):
            line += byte
    return line.removesuffix(b"\n") if line.endswith(b"\n") else b""


class TurnProcess:
    """Starts a process that runs the turns, and starts it again when it ends.

    `command` is its command line, `files` are those that it inherits, and `key` is what clients of its MLLM send. With
    `must_start`, one that ends before it has ever run turns is not started again. A stop waits for `stop_seconds`
    until it kills the process.
    """

    def __init__(
        self,
        command: Sequence[str],
        files: Sequence[int] = (),
        key: str = "",
        must_start: bool = False,
        stop_seconds: float = STOP_SECONDS,
    ):
        self.command = list(command)
        self.files = list(files)
        self.key = key
        self.must_start = must_start
        self.stop_seconds = stop_seconds
        self.notifier: Notifier | None = None
        self.may_begin, self.has_started, self.stop_event = threading.Event(), threading.Event(), threading.Event()
        self.lock = threading.Lock()  # of `process` and `connection`
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: socket.socket | None = None
        self.failed_starts = 0  # in a row: the process has ended by itself before it ran turns
        self.supervisor = threading.Thread(target=self.supervise, daemon=True, name="turn-process")

    def start(self) -> "TurnProcess":
        """Start the process, which loads its modules; it runs turns after `begin`."""
        self.supervisor.start()
        return self

    def begin(self, notifier: Notifier) -> None:
        """Let the process run turns; the database has its tables now."""
        self.notifier = notifier
        self.may_begin.set()

    def wait_until_started(self) -> int:
        """Wait until the process runs turns; return 0, or its exit status if it has ended before and has said why."""
        while not self.has_started.wait(0.02):
            if not self.supervisor.is_alive():
                return (self.process.returncode if self.process else 0) or 1
        return 0

    def stop(self) -> None:
        """Let the process give its turns back and end."""
        self.stop_event.set()
        self.may_begin.set()
        with self.lock:
            process, connection = self.process, self.connection
        if process is None or connection is None:
            return
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)  # for which the process waits
        try:
            process.wait(self.stop_seconds if self.has_started.is_set() else 0)  # before, it has nothing to give back
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
            has_started = threading.Event()
            own_end, other_end = socket.socketpair()
            with own_end:
                with self.lock, other_end:
                    if self.stop_event.is_set():
                        return
                    self.process = subprocess.Popen(self.command, stdin=other_end.fileno(), pass_fds=self.files)
                    self.connection = own_end
                reader = threading.Thread(target=self.follow_process, args=(own_end, has_started), daemon=True)
                reader.start()
                try:
                    status, is_stable = self.process.wait(STABLE_SECONDS), False
                except subprocess.TimeoutExpired:
                    status, is_stable = self.process.wait(), True
                with suppress(OSError):
                    own_end.shutdown(socket.SHUT_RDWR)
            if self.stop_event.is_set() or (self.must_start and not self.has_started.is_set()):
                return
            # One that was killed did start: a turn may have taken all memory, for example.
            self.failed_starts = 0 if has_started.is_set() or status < 0 else self.failed_starts + 1
            pause_seconds = RESTART_SECONDS[0] if is_stable else pause_seconds
            log.error("turns: their process has ended with status %d; it is started again", status)
            self.stop_event.wait(pause_seconds)
            pause_seconds = min(2 * pause_seconds, RESTART_SECONDS[1])

    def follow_process(self, connection: socket.socket, has_started: threading.Event) -> None:
        """Tell a process to begin, note that it has, and exchange changes with it until it ends."""
        self.may_begin.wait()
        notifier = self.notifier
        if notifier is None:  # this process stops before the other one could begin
            return
        with suppress(OSError):
            connection.sendall(b"%b %b\n" % (BEGIN, self.key.encode()))
        if read_line(connection) != READY:
            return
        self.failed_starts = 0
        has_started.set()
        self.has_started.set()
        exchange_changes(connection, notifier)


class Parent:
    """The process that has started this one, at the other end of this one's standard input."""

    def __init__(self) -> None:
        # A signal to all processes of a terminal is the other process's to answer: it closes the connection.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        self.connection = socket.socket(fileno=os.dup(sys.stdin.fileno()))

    def wait_to_begin(self) -> str | None:
        """Wait until the database has its tables, and return the MLLM's key; None if the other process stops before."""
        word, _, key = read_line(self.connection).partition(b" ")
        return key.decode() if word == BEGIN else None

    def exchange_changes(self, notifier: Notifier) -> None:
        """Say that turns are run, and exchange changes until the other process stops or has ended."""
        with suppress(OSError):
            self.connection.sendall(READY + b"\n")
        exchange_changes(self.connection, notifier)

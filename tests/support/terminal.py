"""A program in a real terminal of a chosen size, by tmux: keys go in, and what a person would see comes out."""

import os
import shlex
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from tests.support.servers import program


class Terminal:
    """A tmux session of its own server, which runs one command; use it as a context manager."""

    def __init__(self, command: list[str], folder: Path, width: int = 80, height: int = 50, **environment: str):
        self.tmux = program("tmux", "tmux", "the terminal was not tested")
        self.command, self.folder = command, folder
        self.width, self.height = width, height
        self.environment: Mapping[str, str] = environment
        self.name = f"omnivideo-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> "Terminal":
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        words = ["env", "-u", "TMUX", "-u", "COLUMNS", "-u", "LINES", *variables, *self.command]
        size = ["-x", str(self.width), "-y", str(self.height)]
        self.run("-f", "/dev/null", "new-session", "-d", *size, "-c", str(self.folder), shlex.join(words))
        self.run("set-option", "-g", "remain-on-exit", "on")
        self.run("set-option", "-g", "history-limit", "5000")
        return self

    def __exit__(self, *error: object) -> None:
        self.run("kill-server", check=False)

    def run(self, *arguments: str, check: bool = True) -> str:
        completed = subprocess.run(
            [self.tmux, "-L", self.name, *arguments], capture_output=True, text=True, check=check, timeout=30,
            env=os.environ | {"LC_ALL": "C.UTF-8", "TERM": "xterm-256color"},
        )  # fmt: skip
        return completed.stdout

    def press(self, *keys: str) -> None:
        """Press keys by tmux's names: Enter, Up, C-c."""
        self.run("send-keys", *keys)

    def type(self, text: str) -> None:
        self.run("send-keys", "-l", "--", text)

    def enter(self, text: str) -> None:
        self.type(text)
        self.press("Enter")

    def paste(self, text: str) -> None:
        """Paste a text as a terminal does: in brackets, where the program has asked for them."""
        self.run("set-buffer", "--", text)
        self.run("paste-buffer", "-p", "-r")

    def resize(self, width: int) -> None:
        self.width = width
        self.run("resize-window", "-x", str(width), "-y", str(self.height))

    def read_screen(self) -> str:
        """Return the visible lines; lines that the terminal has wrapped are joined."""
        return self.run("capture-pane", "-p", "-J")

    def read_all(self) -> str:
        """Return the lines with those that have scrolled away."""
        return self.run("capture-pane", "-p", "-J", "-S", "-")

    def wait_for(self, text: str, count: int = 1, seconds: float = 120) -> str:
        """Wait until a text was printed `count` times in all, and return all lines."""
        until = time.monotonic() + seconds
        while (lines := self.read_all()).count(text) < count:
            assert time.monotonic() < until, f"{text!r} did not appear {count} times in:\n{lines}"
            time.sleep(0.1)
        return lines

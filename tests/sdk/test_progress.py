"""The progress bar: shown in a terminal by default, and nowhere else."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from omnivideo.contracts import StepProgress
from omnivideo.sdk.progress import follow_steps
progress = {"default": None, "on": True, "off": False}[sys.argv[1]]
follow = (lambda step: print("followed", step.step)) if sys.argv[2:] else None
with follow_steps("a [red] ball", progress, follow) as report, follow_steps("another", progress, follow) as second:
    report(StepProgress(step=3, steps=7, eta_seconds=1.0))
    second(StepProgress(step=4, steps=7, eta_seconds=1.0))
    time.sleep(0.5)  # bars are drawn ten times a second
"""


def run_in_terminal(*arguments: str) -> str:
    """Return what the program writes to its terminal."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, *arguments]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stdout=follower, stderr=follower, stdin=follower) as process:
        os.close(follower)
        output = b""
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:  # the program has closed the terminal
                break
            if not part:
                break
            output += part
        os.close(leader)
    assert process.returncode == 0, output
    return output.decode()


@pytest.mark.parametrize(
    ("arguments", "is_shown"),
    [(["default"], True), (["off"], False), (["default", "follow"], False), (["on", "follow"], True)],
)
def test_a_terminal_shows_a_bar_for_each_call(arguments, is_shown):
    output = run_in_terminal(*arguments)
    assert ("a [red] ball" in output and "3/7" in output and "4/7" in output) == is_shown
    assert ("followed 3" in output) == ("follow" in arguments)


def test_a_file_has_no_bar():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, "default"]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert completed.stdout == completed.stderr == ""

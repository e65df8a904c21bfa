"""Measure the planner's own time in a turn: instant twins of the models, and real SQLite checkpoints.

python -m benchmarks.planner [--threads 20] [--turns 10]
"""

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver

from omnivideo.agent.graph import Planner
from omnivideo.agent.thread import Thread
from omnivideo.contracts import Artifact
from omnivideo.presets import TINY
from omnivideo.settings import load_settings
from omnivideo.storage.checkpointer import open_checkpointer
from tests.support.twins import InstantQueue, ScriptedMLLM


def refuse_attachment(path: str | Path, created_by: str) -> Artifact:
    raise AssertionError("the conversation has no attachments")


def time_turns(saver: BaseCheckpointSaver[Any], name: str, turns: int) -> list[float]:
    """Run a conversation and return the milliseconds of each turn."""
    graph = Planner(ScriptedMLLM(), InstantQueue(), TINY).build_graph(saver)
    thread = Thread(graph, name, refuse_attachment).initialize_state()
    milliseconds = []
    for turn in range(turns):
        start = time.perf_counter()
        list(thread.send("a red ball moving right" if turn % 3 == 0 else "make it blue" if turn % 3 == 1 else "how?"))
        milliseconds.append(1000 * (time.perf_counter() - start))
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--threads", type=int, default=20)
    arguments = parser.parse_args()
    machine = platform.processor() or platform.machine()
    print(f"{machine}; {arguments.threads} threads of {arguments.turns} turns, ms per turn")
    with tempfile.TemporaryDirectory() as folder:
        for label, saver in (("SQLite", open_checkpointer(load_settings(home=folder))), ("memory", InMemorySaver())):
            names = [f"{label}-{index}" for index in range(arguments.threads)]
            times = sorted(value for name in names for value in time_turns(saver, name, arguments.turns))
            print(
                f"{label}: median {statistics.median(times):.1f}, 95th percentile {times[int(0.95 * len(times))]:.1f}"
            )


if __name__ == "__main__":
    main()

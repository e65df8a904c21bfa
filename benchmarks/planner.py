"""What the planner costs a turn, the models' time left out: instant twins behind its ports, real SQLite checkpoints.

python -m benchmarks.planner [--threads 20] [--turns 10]
"""

import argparse
import platform
import statistics
import tempfile
import time

from langgraph.checkpoint.memory import InMemorySaver

from omnivideo.agent.graph import Planner
from omnivideo.agent.thread import Thread
from omnivideo.presets import TINY
from omnivideo.settings import load_settings
from omnivideo.storage.checkpointer import open_checkpointer
from tests.support.twins import InstantQueue, ScriptedMLLM


def milliseconds(saver, name: str, turns: int) -> list[float]:
    graph = Planner(ScriptedMLLM(), InstantQueue(), TINY).build_graph(saver)
    thread = Thread(graph, name, lambda path, created_by: None).initialize_state()
    spent = []
    for turn in range(turns):
        began = time.perf_counter()
        list(thread.send("a red ball moving right" if turn % 3 == 0 else "make it blue" if turn % 3 == 1 else "how?"))
        spent.append(1000 * (time.perf_counter() - began))
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--threads", type=int, default=20)
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}; {given.threads} threads of {given.turns} turns, ms a turn")
    with tempfile.TemporaryDirectory() as folder:
        for label, saver in (("SQLite", open_checkpointer(load_settings(home=folder))), ("memory", InMemorySaver())):
            spent = [one for at in range(given.threads) for one in milliseconds(saver, f"{label}-{at}", given.turns)]
            spent.sort()
            print(f"{label}: median {statistics.median(spent):.1f}, 95th {spent[int(0.95 * len(spent))]:.1f}")


if __name__ == "__main__":
    main()

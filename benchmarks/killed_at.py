"""Run a command of omnivideo whose turns kill their process in nodes of the planner's graph.

python -m benchmarks.killed_at FOLDER serve --port 8000

The process that runs the turns is killed when a node has done its work and nothing of it is stored yet, if the folder
has a file with the node's name. The file is removed first, so that the process that is started again goes on. If the
file says "raise", the node raises an exception instead.
"""

import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

METHODS = {"search": "search_reference", "refer": "resolve_reference"}  # other nodes have the name of their method


def kill_once_after(method: Callable[..., Any], file: Path) -> Callable[..., Any]:
    @wraps(method)
    def run_node(*arguments: Any) -> Any:
        updates = method(*arguments)
        if file.exists():
            fault = file.read_text()
            file.unlink()
            if fault == "raise":
                raise RuntimeError("this fault was asked for")
            os.kill(os.getpid(), signal.SIGKILL)
        return updates

    return run_node


def main() -> None:
    folder, *command = sys.argv[1:]
    from omnivideo.agent.graph import NODES, Planner
    from omnivideo.agent.transitions import REFERENCE_NODE, SEARCH_NODE
    from omnivideo.cli import serve
    from omnivideo.cli.main import main as run_command

    for node in (*NODES, SEARCH_NODE, REFERENCE_NODE):
        name = METHODS.get(node, node)
        setattr(Planner, name, kill_once_after(getattr(Planner, name), Path(folder) / node))
    serve.PROGRAM = [sys.executable, "-m", "benchmarks.killed_at", folder]
    sys.argv[1:] = command
    run_command()


if __name__ == "__main__":
    main()

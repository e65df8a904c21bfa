"""Run a command of omnivideo that kills itself once in a node of the planner's graph.

python -m benchmarks.killed_at NODE FILE serve --port 8000

The process is killed when the node has done its work and nothing of it is stored yet. The file, which exists from then
on, keeps the process that is started again alive.
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
        if not file.exists():
            file.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return updates

    return run_node


def main() -> None:
    node, file, *command = sys.argv[1:]
    from omnivideo.agent.graph import Planner
    from omnivideo.cli.main import main as run_command

    name = METHODS.get(node, node)
    setattr(Planner, name, kill_once_after(getattr(Planner, name), Path(file)))
    sys.argv[1:] = command
    run_command()


if __name__ == "__main__":
    main()

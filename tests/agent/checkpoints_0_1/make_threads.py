"""Make threads.sqlite.gz: the checkpoints of a few threads, written by the code of version 0.1.

git worktree add /tmp/omnivideo-0.1 806a3b5
cd /tmp/omnivideo-0.1
PYTHONPATH=. python $OLDPWD/tests/agent/checkpoints_0_1/make_threads.py threads.sqlite
gzip -9 -n threads.sqlite
"""

import sqlite3
import sys
from pathlib import Path
from typing import Any

from langgraph.checkpoint.sqlite import SqliteSaver
from tests.twins import InstantQueue, ScriptedMLLM

from omnivideo.agent.graph import Planner, prompts_for
from omnivideo.agent.thread import Thread
from omnivideo.contracts import Artifact
from omnivideo.errors import JobCancelled


def attach(path: Any, made_by: str) -> Any:
    return Artifact(
        key=str(path), medium="image", width=64, height=64, frames=1, fps=1.0, about=str(path), made_by=made_by
    )


def main(path: Path) -> None:
    path.unlink(missing_ok=True)
    saver = SqliteSaver(sqlite3.connect(path, check_same_thread=False))
    mllm, queue = ScriptedMLLM(), InstantQueue()
    graph = Planner(mllm, queue, prompts_for("tiny")).graph(saver)

    def begin(name: str) -> Any:
        return Thread(graph, name, attach).begin()

    def send(thread: Any, text: str, *attachments: Any, **options: Any) -> None:
        for _ in thread.send(text, attachments, **options):
            pass

    finished = begin("finished")
    send(finished, "a red ball; make it blue", seed=7)
    mllm.agreements = [0.2, 0.9]
    send(finished, "a picture of something round", check=2, think="on")
    send(finished, "how many balls are there?", attach("photo.png", "finished/attached"))
    finished.fork(1, "forked")

    # The planner has asked which artifact is meant, in the node `refer`.
    paused = begin("paused")
    send(paused, "a red ball")
    send(paused, "make the fifth clip green")
    assert paused.question()

    # The planner has asked what kind of answer is wanted, in the node `route`.
    unsure = begin("unsure")
    mllm.doubt = {"something"}
    send(unsure, "something", think="off")
    assert unsure.question()

    # The process was killed while the second clip was rendered.
    killed = begin("killed")
    send(killed, "a red ball")
    queue.fails = KeyboardInterrupt()
    try:
        send(killed, "make it blue; how many balls are there?", attach("photo.png", "killed/attached"))
    except KeyboardInterrupt:
        queue.fails = None

    # A turn has failed.
    failed = begin("failed")
    send(failed, "a red ball")
    queue.fails = JobCancelled("the clip was cancelled")
    try:
        send(failed, "make it blue")
    except JobCancelled:
        queue.fails = None
    saver.conn.execute("PRAGMA journal_mode=DELETE")
    saver.conn.execute("VACUUM")
    saver.conn.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

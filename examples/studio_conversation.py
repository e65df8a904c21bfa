"""Hold a conversation in this process: generate a clip, change it, ask about it, and fork the thread.

python examples/studio_conversation.py out/conversation
"""

import sys
from pathlib import Path

from omnivideo import Studio


def main(folder: Path) -> None:
    studio = Studio(home=folder)
    thread = studio.open_thread()
    for text in ("a small red circle moving right", "make it blue", "how does the circle move?"):
        print(f"> {text}")
        for event in thread.send(text):
            if event.kind == "text":
                print(event.delta, end="")
            elif event.kind == "done":
                print()
            elif event.kind == "artifact":
                print(studio.artifact_path(event.artifact))
    branch = thread.fork(1)  # continues after the first turn, with the red circle
    for event in branch.send("make it green"):
        if event.kind == "artifact":
            print("fork:", studio.artifact_path(event.artifact))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/conversation"))

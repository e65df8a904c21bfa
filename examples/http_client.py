"""Generate a clip with a service and hold a conversation with it. Start the service first: make serve.

python examples/http_client.py http://127.0.0.1:8000 out
"""

import sys
from pathlib import Path

from omnivideo import Client


def main(address: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with Client(address) as client:
        clip = client.generate("a small red circle moving right", seed=1)
        clip.save(folder / "clip.mp4")
        thread = client.open_thread()
        for event in thread.send("a large yellow star"):
            print(event.kind)


if __name__ == "__main__":
    address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    main(address, Path(sys.argv[2] if len(sys.argv) > 2 else "out"))

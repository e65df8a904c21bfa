"""Generate many clips into a folder. A second run skips what results.jsonl already lists.

python examples/batch.py out/batch
"""

import sys
from pathlib import Path

from omnivideo import Studio

PROMPTS = [
    "a small red circle moving right",
    {"id": "star", "prompt": "a large yellow star on a black background", "image": True, "seed": 7},
]


def main(folder: Path) -> None:
    for outcome in Studio().batch(PROMPTS, folder):
        print(outcome.id, outcome.file or outcome.error)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/batch"))

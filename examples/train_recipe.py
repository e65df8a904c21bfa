"""Train the adapter for a few steps (stage 2a) from the shipped weights, and print the losses.

python examples/train_recipe.py out/train
"""

import json
import sys
from pathlib import Path

import torch

from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.shipped import find_shipped_weights
from omnivideo.training.engine.trainer import Trainer
from omnivideo.training.tiny.alignment_stages import build_stage2a_recipe


def main(folder: Path, steps: int = 4) -> None:
    omni = checkpoint.load(find_shipped_weights("tiny"), torch.device("cpu"))
    Trainer(build_stage2a_recipe(omni, steps=steps, batch_size=2), folder).run()  # a second run resumes
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        print(entry["step"], round(entry["loss"], 4))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/train"))

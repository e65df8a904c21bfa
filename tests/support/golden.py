"""Read the outputs of the authors' code that the golden tests compare with."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

DEFAULT_FOLDER = Path(__file__).parents[1] / "golden"


def golden_folder() -> Path:
    """Return the folder of OMNIVIDEO_GOLDEN, or tests/golden: any set in the same form must pass."""
    return Path(os.environ.get("OMNIVIDEO_GOLDEN") or DEFAULT_FOLDER)


def load_golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a golden file, and what its JSON says about them."""
    folder = golden_folder()
    tensors = load_file(folder / f"{name}.safetensors") if (folder / f"{name}.safetensors").exists() else {}
    return tensors, json.loads((folder / f"{name}.json").read_text())

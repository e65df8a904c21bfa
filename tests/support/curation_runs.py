"""Helpers for the curation tests: bounds, the command line, and reading the results."""

import json
import sys
from pathlib import Path
from typing import Any

from omnivideo.training.curation.bounds import CurationBounds

# The footage is small, so that it is rendered and read quickly.
BOUNDS = CurationBounds(min_short_side=200, min_aesthetic=5)


def build_command(folder: Path, output_dir: Path) -> list[str]:
    """Return the command that curates a folder with BOUNDS and without OCR."""
    bounds = ["--bound", "min_short_side=200", "--bound", "min_aesthetic=5"]
    return [
        sys.executable,
        "-m",
        "omnivideo.cli",
        "data",
        "curate",
        str(folder),
        "-o",
        str(output_dir),
        "--no-ocr",
        *bounds,
    ]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file with one JSON object per line."""
    return [json.loads(line) for line in path.read_text().splitlines()]

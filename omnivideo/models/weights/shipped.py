"""The folders of the weights that are shipped with this package. This module does not need torch."""

import json
from pathlib import Path
from typing import Any

from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.presets import get_preset

SHIPPED_WEIGHTS_FOLDER = Path(__file__).parents[2] / "weights"  # one folder for each preset with shipped weights
INDEX_FILE = "model_index.json"


def find_shipped_weights(preset_name: str) -> Path:
    """Return the folder of a preset's shipped weights.

    Raises InvalidInput if the preset is unknown, and CheckpointError if it has no shipped weights.
    """
    folder = SHIPPED_WEIGHTS_FOLDER / get_preset(preset_name).name
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(
            f"no weights are shipped for the preset {preset_name!r}; "
            "pass a folder that `omnivideo weights import` wrote with --weights"
        )
    return folder


def find_weights(preset_name: str, folder: str) -> Path | None:
    """Return a folder of weights, by default the shipped ones, or None if this machine has none for the preset."""
    path = Path(folder) if folder else SHIPPED_WEIGHTS_FOLDER / get_preset(preset_name).name
    return path if (path / INDEX_FILE).is_file() else None


def check_preset(folder: Path, preset_name: str, field: str) -> None:
    """Raise InvalidInput unless a folder has weights of this preset, which a setting or an option, `field`, names."""
    found = read_index(folder).get("preset")
    if found != preset_name:
        raise InvalidInput(
            field, f"{preset_name} is not the preset of the weights in {folder.name!r}, which is {found}"
        )


def read_index(folder: Path) -> dict[str, Any]:
    """Return a folder's index; raise CheckpointError if it is missing, damaged or of another format."""
    path = folder / INDEX_FILE
    if not path.is_file():
        raise CheckpointError(f"no {INDEX_FILE} in the weights folder {folder.name!r}")
    try:
        index: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{INDEX_FILE} in {folder.name!r} is not JSON") from error
    if index.get("_class_name") != "OmniVideo" or index.get("format") != 1:
        raise CheckpointError(f"{INDEX_FILE} in {folder.name!r} does not have format 1")
    return index

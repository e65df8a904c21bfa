"""The folders of the weights that are shipped with this package. This module does not need torch."""

from pathlib import Path

from omnivideo.errors import CheckpointError
from omnivideo.presets import get_preset

SHIPPED_WEIGHTS_FOLDER = Path(__file__).parents[2] / "weights"  # one folder for each preset with shipped weights
INDEX_FILE = "model_index.json"


def find_shipped_weights(preset_name: str) -> Path:
    """Return the folder of a preset's shipped weights.

    Raises InvalidInput if the preset is unknown, and CheckpointError if it has no shipped weights.
    """
    folder = SHIPPED_WEIGHTS_FOLDER / get_preset(preset_name).name
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(f"no weights are shipped for the preset {preset_name!r}; pass a folder with --weights")
    return folder


def find_weights(preset_name: str, folder: str) -> Path | None:
    """Return a folder of weights, by default the shipped ones, or None if this machine has none for the preset."""
    path = Path(folder) if folder else SHIPPED_WEIGHTS_FOLDER / get_preset(preset_name).name
    return path if (path / INDEX_FILE).is_file() else None

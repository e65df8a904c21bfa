"""Convert our folder to the published layout, bit for bit, and a training checkpoint to our folder.

Every tensor keeps its type. Keys and shapes are compared with the preset before anything is written.
"""

import pickle
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.models.weights.checkpoint import BRIDGE_PARTS, verify_digests
from omnivideo.models.weights.folder import (
    PartStates,
    WeightsReport,
    build_report,
    check_state,
    ignore_progress,
    write_index,
    write_parts,
)
from omnivideo.models.weights.published import (
    NULL_CONTEXT_FILE,
    PUBLISHED_PRESETS,
    TensorLocation,
    get_markers_file,
    get_part_folder,
    list_weight_files,
    locate_tensors,
)
from omnivideo.models.weights.shipped import read_index
from omnivideo.models.weights.tensor_files import (
    StateDict,
    WriteProgress,
    check_dense_tensors,
    map_safetensors_folder,
    read_pickle,
    stage_folder,
)
from omnivideo.presets import Preset, get_preset

# ---------------------------------------------------------------- ours to published


def export_weights(folder: Path, target: Path) -> WeightsReport:
    """Verify our folder and convert it to the layout that the authors' code reads."""
    model_preset = get_preset(read_index(folder)["preset"])
    if model_preset.name not in PUBLISHED_PRESETS:
        text = f"the preset {model_preset.name!r} has no published layout; allowed: {', '.join(PUBLISHED_PRESETS)}"
        raise InvalidInput("weights", text)
    verify_digests(folder)
    expected = locate_tensors(model_preset)
    parts = {name: map_safetensors_folder(folder / name) for name in list_part_folders(model_preset, expected)}
    for name, state in parts.items():
        shapes = {
            location.key: location.shape
            for location in expected.values()
            if name in list_decoder_folders(location.part, model_preset)
        }
        check_state(name, state, shapes)
    markers = map_safetensors_folder(folder / "markers")
    report = build_report(model_preset, parts | ({"markers": markers} if markers else {}))
    with stage_folder(target, report.total_bytes) as partial:
        for decoder_index, file in enumerate(list_weight_files(model_preset)):
            state = {
                key: parts[get_part_folder(location.part, decoder_index)][location.key]
                for key, location in expected.items()
            }
            save_pickle(partial / file, state)
        if markers:
            save_plain_pickle(partial / get_markers_file(model_preset), {f"<{key}>": markers[key] for key in markers})
        null = map_safetensors_folder(folder / "null_context")
        if null:
            lists = {"text_emb": [null["text"].clone()], "vlm_last_hidden_states": null["hidden_states"]}
            save_plain_pickle(partial / NULL_CONTEXT_FILE, lists)
    return report


def list_decoder_folders(part: str, model_preset: Preset) -> list[str]:
    """Return the subfolders of a part, one for each decoder."""
    return [get_part_folder(part, decoder_index) for decoder_index in range(len(list_weight_files(model_preset)))]


def list_part_folders(model_preset: Preset, expected: Mapping[str, TensorLocation]) -> list[str]:
    return [
        name
        for part in dict.fromkeys(location.part for location in expected.values())
        for name in list_decoder_folders(part, model_preset)
    ]


def save_pickle(path: Path, state: StateDict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch raises this if the disk is full
        raise CheckpointError(f"{path.name} could not be written; the disk may be full") from error


def save_plain_pickle(path: Path, content: Mapping[str, Any]) -> None:
    """Write markers or the null condition as a plain pickle, which the authors' code reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    copies = {key: value.clone() if isinstance(value, Tensor) else value for key, value in content.items()}
    with path.open("wb") as file:
        pickle.dump(copies, file)


# ---------------------------------------------------------------- a training checkpoint to ours


def pack_training_checkpoint(
    state_file: Path, base: Path, folder: Path, on_progress: WriteProgress = ignore_progress
) -> WeightsReport:
    """Convert a stage's `state.pt` to a complete folder, with averaged weights wherever the run keeps averages.

    `base` is the folder that the run started from. Everything that the checkpoint lacks is copied from it:
    configurations, tokenizers, text encoder and VAE.
    """
    index, parts = read_index(base), read_training_parts(state_file)
    model_preset = get_preset(index["preset"])
    for name, state in parts.items():
        base_shapes = {key: tuple(value.shape) for key, value in map_safetensors_folder(base / name).items()}
        check_state(name, state, base_shapes)
    copied_digests = {file: digest for file, digest in index["sha256"].items() if file.split("/")[0] not in parts}
    copied_bytes = sum((base / file).stat().st_size for file in copied_digests)

    def list_replaced_files(path: str, names: list[str]) -> list[str]:
        return [name for name in names if ".safetensors" in name and Path(path).name in parts]

    report = build_report(model_preset, parts)
    with stage_folder(folder, report.total_bytes + copied_bytes) as partial:
        shutil.copytree(base, partial, dirs_exist_ok=True, ignore=list_replaced_files)
        write_index(partial, model_preset, copied_digests | write_parts(partial, model_preset, parts, on_progress))
    return report


def read_training_parts(state_file: Path) -> PartStates:
    """Return the parts of a stage's checkpoint, named as in the folder."""
    loaded = read_pickle(state_file)
    if not {"model", "average", "step"} <= loaded.keys():
        raise CheckpointError(f"{state_file.name} is not a training checkpoint")
    parts = defaultdict[str, StateDict](dict)
    for key, value in check_dense_tensors(state_file.name, loaded["model"] | loaded["average"]).items():
        top, _, rest = key.removeprefix("bridge.").partition(".")
        parts["transformer" if top == "decoder" else top][rest] = value
    unknown = sorted(parts.keys() - {"transformer", "mllm", *BRIDGE_PARTS})
    if unknown:
        raise CheckpointError(f"{state_file.name} has parts that belong to no omnivideo model: {', '.join(unknown)}")
    return dict(parts)

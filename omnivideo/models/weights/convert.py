"""Convert published weights to our folder and back, bit for bit, and a training checkpoint to our folder.

Every tensor keeps its type. Keys and shapes are compared with the preset before anything is written.
"""

import json
import pickle
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.models.weights.checkpoint import (
    BRIDGE_PARTS,
    INDEX_FILE,
    WEIGHTS_FILE,
    check_keys,
    read_index,
    verify_digests,
)
from omnivideo.models.weights.published import (
    PUBLISHED_PRESETS,
    TensorLocation,
    detect_preset,
    get_markers_file,
    get_part_folder,
    list_required_markers,
    list_weight_files,
    locate_tensors,
)
from omnivideo.models.weights.tensor_files import (
    NAME_BY_DTYPE,
    StateDict,
    WriteProgress,
    check_dense_tensors,
    map_safetensors_folder,
    read_pickle,
    read_small_pickle,
    stage_folder,
    write_safetensors,
)
from omnivideo.presets import PRESETS, Preset, get_preset

DECODER_WEIGHTS = "diffusion_pytorch_model"
MAX_SHARD_BYTES = 5 << 30  # of one file of a decoder
UNPUBLISHED_PARTS = ("mllm", "text_encoder", "tokenizer", "vae")  # the other parts of a complete folder
PartStates = dict[str, StateDict]


@dataclass(frozen=True)
class PartReport:
    """The size of one part: its tensors, their parameters, types and bytes."""

    name: str
    tensor_count: int
    parameter_count: int
    dtypes: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True)
class WeightsReport:
    """The parts of a source, and the parts of a complete folder that it lacks."""

    preset: str
    parts: tuple[PartReport, ...]
    missing_parts: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)


def ignore_progress(file: str, count: int) -> None:
    """Do nothing; the default for `on_progress`."""


def build_report(model_preset: Preset, parts: PartStates, missing_parts: tuple[str, ...]) -> WeightsReport:
    part_reports = []
    for name, state in parts.items():
        tensors = list(state.values())
        dtypes = tuple(sorted({NAME_BY_DTYPE[tensor.dtype] for tensor in tensors}))
        parameter_count, size_bytes = (
            sum(tensor.numel() for tensor in tensors),
            sum(tensor.nbytes for tensor in tensors),
        )
        part_reports.append(PartReport(name, len(tensors), parameter_count, dtypes, size_bytes))
    return WeightsReport(model_preset.name, tuple(part_reports), missing_parts)


# ---------------------------------------------------------------- published to ours


def import_weights(
    source: Path, folder: Path | None, name: str | None = None, on_progress: WriteProgress = ignore_progress
) -> WeightsReport:
    """Convert published weights, a folder or one file, to our `folder`; None only checks and counts the tensors."""
    model_preset = resolve_preset(source, name)
    parts = read_published_parts(source, model_preset)
    missing_parts = tuple(part for part in ("markers", *UNPUBLISHED_PARTS) if part not in parts)
    report = build_report(model_preset, parts, missing_parts)
    if folder is not None:
        with stage_folder(folder, report.total_bytes) as partial:
            write_index(partial, model_preset, write_parts(partial, model_preset, parts, on_progress))
    return report


def resolve_preset(source: Path, name: str | None) -> Preset:
    """Return the named preset, or the one whose files the source has; raise InvalidInput or CheckpointError."""
    if not source.exists():
        raise InvalidInput("source", f"{source.name!r} does not exist")
    preset_name = name or (detect_preset(source) if source.is_dir() else detect_preset_from_keys(source))
    if preset_name is None:
        layouts = "; ".join(f"{join_weight_files(PRESETS[preset])} ({preset})" for preset in PUBLISHED_PRESETS)
        raise CheckpointError(f"{source.name!r} has none of the published layouts: {layouts}")
    model_preset = get_preset(preset_name)
    if model_preset.name not in PUBLISHED_PRESETS:
        raise InvalidInput("preset", f"{preset_name!r} is not published; allowed: {', '.join(PUBLISHED_PRESETS)}")
    if source.is_file() and model_preset.experts.num_decoders > 1:
        text = f"{model_preset.name} has two files; pass the folder with {join_weight_files(model_preset)}"
        raise InvalidInput("source", text)
    return model_preset


def join_weight_files(model_preset: Preset) -> str:
    return " and ".join(list_weight_files(model_preset))


def detect_preset_from_keys(file: Path) -> str:
    """Return the preset of a single file; only version 1 has an adapter."""
    keys = read_published_state(file)
    return PUBLISHED_PRESETS[0] if any(key.startswith("adapter.") for key in keys) else PUBLISHED_PRESETS[1]


def read_published_state(file: Path) -> StateDict:
    """Return the tensors of a published file, even if they are nested one level deep, as DeepSpeed saves them."""
    loaded = read_pickle(file)
    for level in ("module", "model"):
        if isinstance(loaded.get(level), Mapping):
            loaded = dict(loaded[level])
            break
    return check_dense_tensors(file.name, loaded)


def read_published_parts(source: Path, model_preset: Preset) -> PartStates:
    """Return our parts with our keys; raise CheckpointError for the first key or shape that does not fit."""
    files = [source] if source.is_file() else [source / file for file in list_weight_files(model_preset)]
    expected, parts = locate_tensors(model_preset), defaultdict[str, StateDict](dict)
    for decoder_index, file in enumerate(files):
        state = read_published_state(file)
        shapes = {key: location.shape for key, location in expected.items()}
        check_state(f"{file.parent.name}/{file.name}", state, shapes)
        for key, location in expected.items():
            parts[get_part_folder(location.part, decoder_index)][location.key] = state[key]
    markers = source / get_markers_file(model_preset)
    if source.is_dir() and markers.is_file():
        parts["markers"] = read_markers(markers, model_preset)
    return dict(parts)


def check_state(label: str, state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the tensors have exactly the expected keys and shapes."""
    mismatched = [key for key in state if key in expected and tuple(state[key].shape) != expected[key]]
    check_keys(label, sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys()), mismatched)


def read_markers(file: Path, model_preset: Preset) -> StateDict:
    """Return the markers under our names; each has one or more embeddings [n, D]."""
    state = read_small_pickle(file)
    required_keys = {f"<{name}>" for name in list_required_markers(model_preset)}
    mismatched = [key for key, value in state.items() if value.ndim != 2 or value.shape[1] != model_preset.text_width]
    known_keys = {f"<{name}>" for name in list_required_markers(PRESETS[PUBLISHED_PRESETS[0]])}
    check_keys(file.name, sorted(required_keys - state.keys()), sorted(state.keys() - known_keys), mismatched)
    return {key.strip("<>"): value for key, value in state.items()}


# ---------------------------------------------------------------- writing our folder


def write_parts(folder: Path, model_preset: Preset, parts: PartStates, on_progress: WriteProgress) -> dict[str, str]:
    """Write the files of all parts in the layout of `checkpoint` and return the SHA-256 of each."""
    digests: dict[str, str] = {}
    for name, state in parts.items():
        (folder / name).mkdir(exist_ok=True)
        for file, shard in split_part_files(name, state, folder / name):
            digests[f"{name}/{file}"] = write_safetensors(folder / name / file, shard, on_progress)
        if name.startswith("transformer"):
            with torch.device("meta"):
                WanTransformer3DModel(**model_preset.decoder).save_config(folder / name)
    return digests


def write_index(folder: Path, model_preset: Preset, digests: Mapping[str, str]) -> None:
    index = {
        "_class_name": "OmniVideo",
        "format": 1,
        "preset": model_preset.name,
        "sha256": dict(sorted(digests.items())),
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def split_part_files(name: str, state: StateDict, folder: Path) -> list[tuple[str, StateDict]]:
    """Return the files of a part with their tensors; for a decoder in shards, write the index that diffusers reads."""
    if not name.startswith("transformer"):
        return [(WEIGHTS_FILE, state)]
    shards = split_shards(state)
    if len(shards) == 1:
        return [(f"{DECODER_WEIGHTS}.safetensors", state)]
    files = [
        (f"{DECODER_WEIGHTS}-{number:05}-of-{len(shards):05}.safetensors", shard)
        for number, shard in enumerate(shards, 1)
    ]
    total_bytes = sum(value.nbytes for value in state.values())
    weight_map = {key: file for file, shard in files for key in shard}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / f"{DECODER_WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return files


def split_shards(state: StateDict) -> list[StateDict]:
    """Split the tensors into shards of at most MAX_SHARD_BYTES, unless one tensor is larger."""
    shards: list[StateDict] = [{}]
    shard_bytes = 0
    for key, value in state.items():
        if shards[-1] and shard_bytes + value.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            shard_bytes = 0
        shards[-1][key] = value
        shard_bytes += value.nbytes
    return shards


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
    report = build_report(model_preset, parts | ({"markers": markers} if markers else {}), ())
    with stage_folder(target, report.total_bytes) as partial:
        for decoder_index, file in enumerate(list_weight_files(model_preset)):
            state = {
                key: parts[get_part_folder(location.part, decoder_index)][location.key]
                for key, location in expected.items()
            }
            save_pickle(partial / file, state)
        if markers:
            save_markers(partial / get_markers_file(model_preset), markers)
    return report


def list_decoder_folders(part: str, model_preset: Preset) -> list[str]:
    """Return the subfolders of a part, one for each decoder."""
    return [get_part_folder(part, decoder_index) for decoder_index in range(model_preset.experts.num_decoders)]


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


def save_markers(path: Path, markers: StateDict) -> None:
    """Write the markers as a plain pickle, which the authors' code reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pickle.dump({f"<{name}>": value.clone() for name, value in markers.items()}, file)


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

    report = build_report(model_preset, parts, ())
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

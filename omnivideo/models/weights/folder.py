"""Write a folder in our format, and report the sizes of its parts.

The layout is that of `checkpoint`. Tensors are written in pieces, files that are in our format already are linked.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from omnivideo.models.weights.checkpoint import WEIGHTS_FILE
from omnivideo.models.weights.shipped import INDEX_FILE
from omnivideo.models.weights.strict import check_keys
from omnivideo.models.weights.tensor_files import (
    NAME_BY_DTYPE,
    StateDict,
    WriteProgress,
    digest_file,
    link_file,
    read_safetensors_header,
    write_safetensors,
)
from omnivideo.presets import Preset

DECODER_WEIGHTS = "diffusion_pytorch_model"
MAX_SHARD_BYTES = 5 << 30  # of one file of a decoder or a text encoder
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # configurations and tokenizers; never code
PartStates = dict[str, StateDict]


@dataclass(frozen=True)
class PartContent:
    """What becomes a part's subfolder: tensors to write, or a folder whose files are linked.

    `config` is an object of diffusers or transformers that can save its configuration.
    """

    tensors: StateDict
    config: Any = None
    folder: Path | None = None


@dataclass(frozen=True)
class PartReport:
    """The size of one part: its tensors, their parameters, types and bytes, and whether its files are linked."""

    name: str
    tensor_count: int
    parameter_count: int
    dtypes: tuple[str, ...]
    size_bytes: int
    is_linked: bool = False


@dataclass(frozen=True)
class WeightsReport:
    """The parts of a source, and the parts of a complete folder that it lacks.

    `missing_files` names what holds those parts as published, and where to get it.
    """

    preset: str
    parts: tuple[PartReport, ...]
    missing_parts: tuple[str, ...] = ()
    missing_files: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)


def ignore_progress(file: str, count: int) -> None:
    """Do nothing; the default for `on_progress`."""


def build_report(model_preset: Preset, parts: PartStates) -> WeightsReport:
    """Return the report of parts that are tensors."""
    contents = {name: PartContent(state) for name, state in parts.items()}
    return WeightsReport(model_preset.name, tuple(report_parts(contents)))


def report_parts(contents: Mapping[str, PartContent]) -> Iterator[PartReport]:
    """Yield the size of each part; a folder's sizes come from the headers of its files."""
    for name, content in contents.items():
        if content.folder is None:
            tensors = list(content.tensors.values())
            dtypes = tuple(sorted({NAME_BY_DTYPE[tensor.dtype] for tensor in tensors}))
            parameters, size_bytes = sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
            yield PartReport(name, len(tensors), parameters, dtypes, size_bytes)
            continue
        entries = [entry for path in list_linked_files(content.folder)
                   for entry in read_safetensors_header(path)[1].values()]  # fmt: skip
        parameters = sum(math.prod(entry["shape"]) for entry in entries)
        size_bytes = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)
        dtypes = tuple(sorted({entry["dtype"] for entry in entries}))
        yield PartReport(name, len(entries), parameters, dtypes, size_bytes, is_linked=True)


def check_state(label: str, state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the tensors have exactly the expected keys and shapes."""
    mismatched = [key for key in state if key in expected and tuple(state[key].shape) != expected[key]]
    check_keys(label, sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys()), mismatched)


# ---------------------------------------------------------------- writing our folder


def write_contents(
    folder: Path, model_preset: Preset, contents: Mapping[str, PartContent], on_progress: WriteProgress
) -> dict[str, str]:
    """Write or link the files of all parts, and return the SHA-256 of each weights file."""
    digests: dict[str, str] = {}
    for name, content in contents.items():
        if content.folder is not None:
            digests |= link_part(content.folder, folder / name, name, on_progress)
            continue
        digests |= write_parts(folder, model_preset, {name: content.tensors}, on_progress)
        if content.config is not None:
            save = getattr(content.config, "save_config", None) or content.config.save_pretrained
            save(folder / name)
    return digests


def link_part(source: Path, target: Path, name: str, on_progress: WriteProgress) -> dict[str, str]:
    """Link a folder's safetensors files and copy its other files; return the SHA-256 of the former."""
    digests = {}
    for path in list_linked_files(source):
        relative = path.relative_to(source)
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        link_file(path, target / relative)
        digests[f"{name}/{relative.as_posix()}"] = digest_file(path, on_progress)
    for path in list_visible_files(source):
        if path.suffix in COPIED_SUFFIXES:
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))
    return digests


def list_linked_files(folder: Path) -> list[Path]:
    return [path for path in list_visible_files(folder) if path.suffix == ".safetensors"]


def list_visible_files(folder: Path) -> list[Path]:
    """Return all files below a folder, except in hidden folders, where the hub keeps its records."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if not any(name.startswith(".") for name in path.relative_to(folder).parts))


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
    """Return the files of a part with their tensors; for a part in shards, write the index that its library reads."""
    stem = DECODER_WEIGHTS if name.startswith("transformer") or name == "vae" else Path(WEIGHTS_FILE).stem
    shards = split_shards(state) if name.startswith(("transformer", "text_encoder")) else [state]
    if len(shards) == 1:
        return [(f"{stem}.safetensors", state)]
    files = [(f"{stem}-{number:05}-of-{len(shards):05}.safetensors", shard) for number, shard in enumerate(shards, 1)]
    total_bytes = sum(value.nbytes for value in state.values())
    weight_map = {key: file for file, shard in files for key in shard}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
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

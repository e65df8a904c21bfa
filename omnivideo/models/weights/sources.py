"""Find the files of a preset's parts in published folders, as they were downloaded.

Every folder that is given is searched, hidden folders excepted, so that `omni_ckpts/`, a folder of the hub's
repositories and a single repository all work. A published file is recognised by the end of its path, a folder of
transformers or diffusers by its config.json, and a folder of ours by its model_index.json. The folders given first
win, and in one folder the file with the shortest path. The sources may hold the files of several presets: markers and
the null condition are taken beside the preset's own weights, and an MLLM, a VAE or a text encoder of the preset's kind
comes before one of another kind.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.models.weights.published import (
    NULL_CONTEXT_FILE,
    PUBLISHED_PRESETS,
    get_markers_file,
    get_part_folder,
    list_weight_files,
)
from omnivideo.models.weights.shipped import INDEX_FILE
from omnivideo.models.weights.strict import explain_unreadable
from omnivideo.models.weights.wan_layouts import TEXT_ENCODER_FILE, TOKENIZER_FOLDER, VAE_FILE
from omnivideo.presets import PRESETS, Preset

MAX_DEPTH = 6  # of folders below the one that is given
LOST_AND_FOUND = "lost+found"  # of a disk's file system; only root may read it
OUR_CLASS = "OmniVideo"
VILA_FOLDERS = ("llm", "vision_tower", "mm_projector")
QWEN3_VL_TYPES = ("qwen3_vl", "qwen3_vl_moe")


@dataclass(frozen=True)
class FoundPart:
    """Where a part was found: a published file, or a folder with a configuration and safetensors files."""

    name: str
    path: Path
    form: str  # "published file", "vila", "qwen3-vl", "diffusers", "transformers", "tokenizer" or "ours"

    @property
    def label(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"


@dataclass(frozen=True)
class SourceTree:
    """The files and folders below the given ones, the first and shortest paths first."""

    files: tuple[Path, ...]
    folders: tuple[Path, ...]

    def list_files(self, ending: str) -> list[Path]:
        return [path for path in self.files if path.as_posix().endswith("/" + ending)]

    def find_file(self, ending: str) -> Path | None:
        return next(iter(self.list_files(ending)), None)

    def find_file_beside(self, ending: str, neighbour: Path) -> Path | None:
        """Return the file that has the most parent folders in common with its neighbour; of several, the first."""
        return max(self.list_files(ending), key=lambda path: count_common_folders(path, neighbour), default=None)

    def find_folder(self, ending: str) -> Path | None:
        return next((path for path in self.folders if path.as_posix().endswith("/" + ending)), None)


def count_common_folders(first: Path, second: Path) -> int:
    return len(Path(os.path.commonpath((first.parent, second.parent))).parts)


def scan_sources(sources: Sequence[Path]) -> SourceTree:
    """List everything below the given folders.

    Raises InvalidInput for one that does not exist, and CheckpointError for a folder that must not be read.
    """
    try:
        return scan_folders(sources)
    except OSError as error:
        name = Path(str(error.filename)).name
        raise CheckpointError(f"{name!r} in the source cannot be read: {error.strerror}") from None


def scan_folders(sources: Sequence[Path]) -> SourceTree:
    files: list[Path] = []
    folders: list[Path] = []
    for source in sources:
        if not source.exists():
            raise InvalidInput("source", f"{source.name!r} does not exist")
        top = Path(os.path.abspath(source))
        if source.is_file():
            files.append(top)
            continue
        found = list(walk_folder(top, MAX_DEPTH))
        order = sorted(found, key=lambda path: (len(path.parts), path.as_posix()))
        files += [path for path in order if path.is_file()]
        folders += [top, *(path for path in order if path.is_dir())]
    return SourceTree(tuple(files), tuple(folders))


def walk_folder(folder: Path, depth: int) -> Iterator[Path]:
    for path in folder.iterdir():
        if not path.name.startswith(".") and path.name != LOST_AND_FOUND:
            yield path
            if depth > 1 and path.is_dir():
                yield from walk_folder(path, depth - 1)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's dictionary; raise CheckpointError if it is missing, damaged or something else."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path.parent.name}/{path.name} cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(explain_unreadable(path, "JSON")) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.parent.name}/{path.name} is not a dictionary in JSON")
    return value


# ---------------------------------------------------------------- the preset


def detect_preset(tree: SourceTree) -> Preset:
    """Return the preset whose own files are there; raise CheckpointError for none and InvalidInput for several."""
    ours = [name for name in list_our_folders(tree).values() if name in PUBLISHED_PRESETS]
    found = {name: sum(tree.find_file(file) is not None for file in list_own_files(PRESETS[name]))
             for name in PUBLISHED_PRESETS}  # fmt: skip
    complete = [name for name in found if all(tree.find_file(file) for file in list_weight_files(PRESETS[name]))]
    candidates = list(dict.fromkeys([*ours, *complete])) or [name for name, count in found.items() if count]
    if len(candidates) == 1:
        return PRESETS[candidates[0]]
    if candidates:
        raise InvalidInput("preset", f"the source has files of {' and '.join(candidates)}; choose one with --preset")
    layouts = "; ".join(f"{' and '.join(list_weight_files(PRESETS[name]))} ({name})" for name in PUBLISHED_PRESETS)
    raise CheckpointError(f"the source has none of the published layouts: {layouts}")


def list_own_files(preset: Preset) -> tuple[str, ...]:
    """Return the published files that only this preset has."""
    if preset.version == 1:
        return (*list_weight_files(preset), get_markers_file(preset), NULL_CONTEXT_FILE)
    return list_weight_files(preset)


def list_our_folders(tree: SourceTree) -> dict[Path, Any]:
    """Return the preset of each folder in our format, in the order of the tree."""
    indices = {file.parent: read_json(file) for file in tree.files if file.name == INDEX_FILE}
    return {folder: index.get("preset") for folder, index in indices.items() if index.get("_class_name") == OUR_CLASS}


# ---------------------------------------------------------------- the parts


def list_required_parts(preset: Preset) -> tuple[str, ...]:
    """Return the subfolders of a complete folder of ours."""
    conditions = {"hidden": "hidden_projection", "source": "visual_context"}
    per_decoder = ["transformer", *(name for part, name in conditions.items() if part in preset.condition.parts)]
    parts = [get_part_folder(part, index) for index in range(len(list_weight_files(preset))) for part in per_decoder]
    parts += ["vision_head"] if preset.vision_head else []
    parts += ["adapter"] if preset.adapter else []
    parts += ["null_context"] if preset.null.kind == "context-file" else []
    return ("mllm", *parts, "markers", "text_encoder", "tokenizer", "vae")


def find_side_file(tree: SourceTree, preset: Preset, ending: str) -> Path | None:
    """Return the file beside the preset's weights, such as its markers, but not one that belongs to other weights."""
    weights = next(filter(None, map(tree.find_file, list_weight_files(preset))), None)
    if weights is None:
        return tree.find_file(ending)
    file = tree.find_file_beside(ending, weights)
    others = [path for name in PUBLISHED_PRESETS for other in list_weight_files(PRESETS[name])
              if other not in list_weight_files(preset) for path in tree.list_files(other)]  # fmt: skip
    if file is None or any(count_common_folders(file, path) > count_common_folders(file, weights) for path in others):
        return None
    return file


def is_of_kind(part: FoundPart, preset: Preset) -> bool:
    """Return whether a part's configuration is of the family or the width that the preset needs."""
    if part.form in ("vila", "tokenizer"):
        return part.form == "tokenizer" or preset.mllm.family == "vila"
    config = read_json(part.path / "config.json")
    if part.name == "mllm":
        text_config = config.get("text_config")
        width = text_config.get("hidden_size") if isinstance(text_config, dict) else None
        return preset.mllm.family == "qwen3-vl" and width == preset.mllm_width
    if part.name == "vae":
        return bool(config.get("z_dim") == preset.decoder["in_channels"])
    return bool(config.get("d_model") == preset.text_width)


def find_library_parts(tree: SourceTree, preset: Preset) -> dict[str, FoundPart]:
    """Return the parts that stand in folders of transformers or diffusers, or in Wan's own files.

    One that is not of the preset's kind is returned only if there is no other; its fault is then named.
    """
    parts: dict[str, FoundPart] = {}
    for name, ending in (("vae", VAE_FILE), ("text_encoder", TEXT_ENCODER_FILE)):
        file = tree.find_file(ending)
        if file is not None:
            parts[name] = FoundPart(name, file, "published file")
    classified = [found for folder in tree.folders if (found := classify_folder(folder)) is not None]
    for found in sorted(classified, key=lambda part: not is_of_kind(part, preset)):
        parts.setdefault(found.name, found)
    tokenizer = tree.find_folder(TOKENIZER_FOLDER)
    if tokenizer is not None:
        parts["tokenizer"] = FoundPart("tokenizer", tokenizer, "tokenizer")
    return parts


def classify_folder(folder: Path) -> FoundPart | None:
    """Return the part that a folder of transformers or diffusers holds, or None."""
    if (folder / "llm").is_dir() and (folder / "config.json").is_file():
        return FoundPart("mllm", folder, "vila")
    if folder.name in ("tokenizer", "umt5-xxl") and not (folder / "config.json").exists():
        names = {path.name for path in folder.iterdir()}
        known = {"tokenizer.json", "spiece.model", "tokenizer_config.json"}
        return FoundPart("tokenizer", folder, "tokenizer") if names & known else None
    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json")
    if config.get("_class_name") == "AutoencoderKLWan":
        return FoundPart("vae", folder, "diffusers")
    if config.get("model_type") == "umt5" and folder.name != "umt5-xxl":
        return FoundPart("text_encoder", folder, "transformers")
    if config.get("model_type") in QWEN3_VL_TYPES:
        return FoundPart("mllm", folder, "qwen3-vl")
    return None


def find_folders_without_config(tree: SourceTree, missing: Sequence[str]) -> list[Path]:
    """Return the folders with weights of another library that may be missing parts, but whose config.json is not.

    It is absent, or in a folder with the name of a missing part, that of another model. Folders of ours need none.
    """
    ours = list_our_folders(tree).keys()
    return [
        folder
        for folder in tree.folders
        if ((folder / "llm").is_dir() or any(folder.glob("*.safetensors")))
        and (folder.name in missing or not (folder / "config.json").is_file())
        and ours.isdisjoint((folder, *folder.parents))
    ]


def find_our_parts(tree: SourceTree, preset: Preset) -> dict[str, FoundPart]:
    """Return the parts of a folder in our format.

    Raises CheckpointError if all such folders are of other presets and there are no published weights of this one.
    """
    ours = list_our_folders(tree)
    folder = next((folder for folder, name in ours.items() if name == preset.name), None)
    if folder is None:
        if ours and not any(map(tree.find_file, list_weight_files(preset))):
            other, name = next(iter(ours.items()))
            raise CheckpointError(f"{other.name!r} holds weights of {name!r}, not of {preset.name!r}")
        return {}
    names = [name for name in list_required_parts(preset) if (folder / name).is_dir()]
    return {name: FoundPart(name, folder / name, "ours") for name in names}

"""Published weights into our folder and back, bit for bit; and a training run's checkpoint into such a folder.

Every tensor keeps its type.  Keys and shapes are compared with the preset's before a byte is written.
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
from omnivideo.models.checkpoint import BRIDGE_PARTS, INDEX, WEIGHTS, complain, read_index, verify
from omnivideo.models.published import (
    PUBLISHED,
    Place,
    files_of,
    layout_of,
    markers_file,
    markers_needed,
    part_name,
    places,
)
from omnivideo.models.streams import (
    DTYPE_NAMES,
    State,
    Tell,
    map_tensors,
    read_pickle,
    read_small_pickle,
    tensors_of,
    whole_folder,
    write_tensors,
)
from omnivideo.presets import PRESETS, Preset, preset

DECODER_WEIGHTS = "diffusion_pytorch_model"
SHARD = 5 << 30  # of a decoder's file, in bytes
ELSEWHERE = ("mllm", "text_encoder", "tokenizer", "vae")  # what a whole folder has besides
Parts = dict[str, State]


@dataclass(frozen=True)
class PartReport:
    """One part of the folder: its tensors, their numbers, types and bytes."""

    name: str
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Report:
    """What was found, and which parts of a whole folder the source does not have."""

    preset: str
    parts: tuple[PartReport, ...]
    absent: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


def quiet(file: str, count: int) -> None:
    """Tells nobody."""


def report_of(chosen: Preset, parts: Parts, absent: tuple[str, ...]) -> Report:
    rows = []
    for name, state in parts.items():
        values = list(state.values())
        dtypes = tuple(sorted({DTYPE_NAMES[value.dtype] for value in values}))
        counts = sum(value.numel() for value in values), sum(value.nbytes for value in values)
        rows.append(PartReport(name, len(values), counts[0], dtypes, counts[1]))
    return Report(chosen.name, tuple(rows), absent)


# ---------------------------------------------------------------- theirs to ours


def import_weights(source: Path, folder: Path | None, name: str | None = None, tell: Tell = quiet) -> Report:
    """Published weights (their folder, or one file of tensors) into our folder; None only checks and counts them."""
    chosen = chosen_preset(source, name)
    parts = published_parts(source, chosen)
    absent = tuple(part for part in ("markers", *ELSEWHERE) if part not in parts)
    report = report_of(chosen, parts, absent)
    if folder is not None:
        with whole_folder(folder, report.bytes) as partial:
            write_index(partial, chosen, write_parts(partial, chosen, parts, tell))
    return report


def chosen_preset(source: Path, name: str | None) -> Preset:
    """The named preset, else the one whose files the source has."""
    if not source.exists():
        raise InvalidInput("source", f"{source.name!r} does not exist")
    found = name or (layout_of(source) if source.is_dir() else preset_of_keys(source))
    if found is None:
        wanted = "; ".join(f"{' and '.join(files_of(PRESETS[one]))} ({one})" for one in PUBLISHED)
        raise CheckpointError(f"{source.name!r} has none of the published layouts: {wanted}")
    chosen = preset(found)
    if chosen.name not in PUBLISHED:
        raise InvalidInput("preset", f"{found!r} is not published; use {', '.join(PUBLISHED)}")
    if source.is_file() and chosen.decoders > 1:
        raise InvalidInput(
            "source", f"{chosen.name} has two files; name the folder with {' and '.join(files_of(chosen))}"
        )
    return chosen


def preset_of_keys(file: Path) -> str:
    """Only version 1 has an adapter."""
    keys = read_state(file)
    return PUBLISHED[0] if any(key.startswith("adapter.") for key in keys) else PUBLISHED[1]


def read_state(file: Path) -> State:
    """Their file's tensors, which may lie one level down, as DeepSpeed leaves them."""
    loaded = read_pickle(file)
    for level in ("module", "model"):
        if isinstance(loaded.get(level), Mapping):
            loaded = dict(loaded[level])
            break
    return tensors_of(file.name, loaded)


def published_parts(source: Path, chosen: Preset) -> Parts:
    """Our parts with our keys; raises CheckpointError on the first key or shape that is not the preset's."""
    files = [source] if source.is_file() else [source / file for file in files_of(chosen)]
    expected, parts = places(chosen), defaultdict[str, State](dict)
    for number, file in enumerate(files):
        state = read_state(file)
        strict(f"{file.parent.name}/{file.name}", state, {key: place.shape for key, place in expected.items()})
        for key, place in expected.items():
            parts[part_name(place.part, number)][place.key] = state[key]
    markers = source / markers_file(chosen)
    if source.is_dir() and markers.is_file():
        parts["markers"] = read_markers(markers, chosen)
    return dict(parts)


def strict(file: str, state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [key for key in state if key in expected and tuple(state[key].shape) != expected[key]]
    complain(file, sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys()), wrong)


def read_markers(file: Path, chosen: Preset) -> State:
    """The markers by our names: each some embeddings [n, D]."""
    state, needed = read_small_pickle(file), markers_needed(chosen)
    theirs = {f"<{name}>" for name in needed}
    wrong = [key for key, value in state.items() if value.ndim != 2 or value.shape[1] != chosen.text_width]
    known = {f"<{name}>" for name in markers_needed(PRESETS[PUBLISHED[0]])}
    complain(file.name, sorted(theirs - state.keys()), sorted(state.keys() - known), wrong)
    return {key.strip("<>"): value for key, value in state.items()}


# ---------------------------------------------------------------- our folder


def write_parts(folder: Path, chosen: Preset, parts: Parts, tell: Tell) -> dict[str, str]:
    """The parts' files in the layout of `checkpoint`; returns the sha256 of each."""
    digests: dict[str, str] = {}
    for name, state in parts.items():
        (folder / name).mkdir(exist_ok=True)
        for file, shard in files_for(name, state, folder / name):
            digests[f"{name}/{file}"] = write_tensors(folder / name / file, shard, tell)
        if name.startswith("transformer"):
            with torch.device("meta"):
                WanTransformer3DModel(**chosen.decoder).save_config(folder / name)
    return digests


def write_index(folder: Path, chosen: Preset, digests: Mapping[str, str]) -> None:
    index = {"_class_name": "OmniVideo", "format": 1, "preset": chosen.name, "sha256": dict(sorted(digests.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def files_for(name: str, state: State, folder: Path) -> list[tuple[str, State]]:
    """One file, or a decoder's shards with the index that diffusers reads beside them."""
    if not name.startswith("transformer"):
        return [(WEIGHTS, state)]
    shards = shards_of(state)
    if len(shards) == 1:
        return [(f"{DECODER_WEIGHTS}.safetensors", state)]
    files = [
        (f"{DECODER_WEIGHTS}-{at:05}-of-{len(shards):05}.safetensors", shard) for at, shard in enumerate(shards, 1)
    ]
    total = sum(value.nbytes for value in state.values())
    weight_map = {key: file for file, shard in files for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{DECODER_WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return files


def shards_of(state: State) -> list[State]:
    shards: list[State] = [{}]
    size = 0
    for key, value in state.items():
        if shards[-1] and size + value.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += value.nbytes
    return shards


# ---------------------------------------------------------------- ours to theirs


def export_weights(folder: Path, target: Path) -> Report:
    """Our folder, checked against its sums, in the layout that the authors' code reads."""
    chosen = preset(read_index(folder)["preset"])
    if chosen.name not in PUBLISHED:
        raise InvalidInput(
            "weights", f"the preset {chosen.name!r} has no published layout; {', '.join(PUBLISHED)} have"
        )
    verify(folder)
    expected = places(chosen)
    parts = {name: map_tensors(folder / name) for name in parts_of(chosen, expected)}
    for name, state in parts.items():
        shapes = {place.key: place.shape for place in expected.values() if name in both(place.part, chosen)}
        strict(name, state, shapes)
    markers = map_tensors(folder / "markers")
    report = report_of(chosen, parts | ({"markers": markers} if markers else {}), ())
    with whole_folder(target, report.bytes) as partial:
        for number, file in enumerate(files_of(chosen)):
            state = {key: parts[part_name(place.part, number)][place.key] for key, place in expected.items()}
            save_pickle(partial / file, state)
        if markers:
            save_markers(partial / markers_file(chosen), markers)
    return report


def both(part: str, chosen: Preset) -> list[str]:
    """A part's folders, one for each decoder."""
    return [part_name(part, number) for number in range(chosen.decoders)]


def parts_of(chosen: Preset, expected: Mapping[str, Place]) -> list[str]:
    return [name for part in dict.fromkeys(place.part for place in expected.values()) for name in both(part, chosen)]


def save_pickle(path: Path, state: State) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's own writer on a full disk
        raise CheckpointError(f"{path.name} could not be written: is the disk full?") from error


def save_markers(path: Path, markers: State) -> None:
    """A plain pickle, as their code reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pickle.dump({f"<{name}>": value.clone() for name, value in markers.items()}, file)


# ---------------------------------------------------------------- a run's checkpoint to ours


def pack_run(state_file: Path, base: Path, folder: Path, tell: Tell = quiet) -> Report:
    """A stage's `state.pt` as a whole folder: averaged weights where it keeps them, and `base` for what it has not.

    `base` is the folder that the run began with; its configurations, tokenizers, text encoder and VAE are copied.
    """
    index, parts = read_index(base), run_parts(state_file)
    chosen = preset(index["preset"])
    for name, state in parts.items():
        strict(name, state, {key: tuple(value.shape) for key, value in map_tensors(base / name).items()})
    copied = {file: digest for file, digest in index["sha256"].items() if file.split("/")[0] not in parts}
    report = report_of(chosen, parts, ())
    with whole_folder(folder, report.bytes + sum((base / file).stat().st_size for file in copied)) as partial:
        shutil.copytree(base, partial, dirs_exist_ok=True, ignore=lambda at, names: left_out(Path(at), names, parts))
        write_index(partial, chosen, copied | write_parts(partial, chosen, parts, tell))
    return report


def run_parts(state_file: Path) -> Parts:
    """The parts that a stage's checkpoint holds, under the names of the folder."""
    loaded = read_pickle(state_file)
    if not {"model", "average", "step"} <= loaded.keys():
        raise CheckpointError(f"{state_file.name} is not a checkpoint of a recipe")
    parts = defaultdict[str, State](dict)
    for key, value in tensors_of(state_file.name, loaded["model"] | loaded["average"]).items():
        top, _, rest = key.removeprefix("bridge.").partition(".")
        parts["transformer" if top == "decoder" else top][rest] = value
    unknown = sorted(parts.keys() - {"transformer", "mllm", *BRIDGE_PARTS})
    if unknown:
        raise CheckpointError(f"{state_file.name} is of no stage that joins the parts: it has {', '.join(unknown)}")
    return dict(parts)


def left_out(folder: Path, names: list[str], parts: Parts) -> list[str]:
    """Of a folder to copy: the weights that are written anew."""
    return [name for name in names if ".safetensors" in name and folder.name in parts]

"""Convert published weights to our folder, bit for bit.

Every tensor keeps its type. Keys, shapes, widths and vocabularies are compared with the preset before anything is
written. What is in our format already, folders of transformers and diffusers, is linked.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.models.weights.check import find_part_faults, find_tokenizer_faults
from omnivideo.models.weights.digests import record_digests
from omnivideo.models.weights.folder import (
    PartContent,
    WeightsReport,
    check_state,
    ignore_progress,
    report_parts,
    write_contents,
    write_index,
)
from omnivideo.models.weights.published import (
    NULL_CONTEXT_FILE,
    PUBLISHED_PRESETS,
    get_markers_file,
    get_part_folder,
    list_required_markers,
    list_weight_files,
    locate_tensors,
)
from omnivideo.models.weights.repositories import find_repository
from omnivideo.models.weights.sources import (
    FoundPart,
    SourceTree,
    detect_preset,
    find_folders_without_config,
    find_library_parts,
    find_our_parts,
    find_side_file,
    list_required_parts,
    read_json,
    scan_sources,
)
from omnivideo.models.weights.strict import check_keys
from omnivideo.models.weights.tensor_files import (
    StateDict,
    WriteProgress,
    check_dense_tensors,
    read_pickle,
    read_small_pickle,
    read_tensor_lists,
    stage_folder,
)
from omnivideo.models.weights.wan_layouts import (
    TEXT_ENCODER_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
    build_meta_vae,
    locate_text_encoder_tensors,
    locate_vae_tensors,
    read_text_encoder_config,
    rename_tensors,
)
from omnivideo.presets import PRESETS, Preset, get_preset

Contents = dict[str, PartContent]


def import_weights(
    sources: Path | Sequence[Path],
    folder: Path | None,
    name: str | None = None,
    on_progress: WriteProgress = ignore_progress,
    allow_missing: bool = False,
    on_report: Callable[[WeightsReport], None] = lambda report: None,
) -> WeightsReport:
    """Convert published weights to our `folder`; None only checks them and counts the tensors.

    `on_report` gets the report before anything is written. Raises CheckpointError if a part is missing, unless
    `allow_missing` is set or nothing is to be written.
    """
    paths = [sources] if isinstance(sources, Path) else list(sources)
    tree = scan_sources(paths)
    single_file = paths[0] if len(paths) == 1 and paths[0].is_file() else None
    preset = resolve_preset(tree, name, single_file)
    contents = read_contents(tree, preset, single_file)
    missing = tuple(part for part in list_required_parts(preset) if part not in contents)
    missing_files = tuple(describe_missing_parts(preset, missing))
    if missing and not single_file:
        folders = find_folders_without_config(tree, missing)
        missing_files += tuple(f"a config.json in {folder.name}/ that says what it holds" for folder in folders)
    report = WeightsReport(preset.name, tuple(report_parts(contents)), missing, missing_files)
    on_report(report)
    if folder is None:
        return report
    if missing and not allow_missing:
        raise CheckpointError(f"missing from the source: {'; '.join(missing_files)}")
    written_bytes = sum(part.size_bytes for part in report.parts if not part.is_linked)
    with stage_folder(folder, written_bytes) as partial:
        digests = write_contents(partial, preset, contents, on_progress)
        write_index(partial, preset, digests)
        record_digests(partial, digests)
    return report


def resolve_preset(tree: SourceTree, name: str | None, single_file: Path | None) -> Preset:
    """Return the named preset, or the one whose files the sources have; raise InvalidInput or CheckpointError."""
    if name is not None and name not in PUBLISHED_PRESETS:
        get_preset(name)  # raises InvalidInput for an unknown one
        raise InvalidInput("preset", f"{name!r} is not published; allowed: {', '.join(PUBLISHED_PRESETS)}")
    if name is not None:
        preset = PRESETS[name]
    else:
        preset = PRESETS[detect_preset_from_keys(single_file)] if single_file else detect_preset(tree)
    if single_file and len(list_weight_files(preset)) > 1:
        files = " and ".join(list_weight_files(preset))
        raise InvalidInput("source", f"{preset.name} has two files; pass the folder with {files}")
    return preset


def detect_preset_from_keys(file: Path) -> str:
    """Return the preset of a single file; only version 1 has an adapter."""
    keys = read_published_state(file)
    return PUBLISHED_PRESETS[0] if any(key.startswith("adapter.") for key in keys) else PUBLISHED_PRESETS[1]


def describe_missing_parts(preset: Preset, missing: Sequence[str]) -> list[str]:
    """Return what is missing and where to get it, one line for each file or folder as published."""
    lines: dict[str, None] = {}
    for part in missing:
        repository = find_repository(preset, part)
        place = f" (in {repository.id}, {repository.size_bytes / 1e9:.1f} GB)" if repository else ""
        if part == "markers" and preset.condition.optional_markers:
            place += "; with --allow-missing the condition has no markers, as in the authors' code"
        lines[get_published_name(preset, part) + place] = None
    return list(lines)


def get_published_name(preset: Preset, part: str) -> str:
    """Return the published file or folder that holds a part."""
    names = {
        "markers": get_markers_file(preset),
        "null_context": NULL_CONTEXT_FILE,
        "vae": VAE_FILE,
        "text_encoder": TEXT_ENCODER_FILE,
        "tokenizer": f"{TOKENIZER_FOLDER}/",
        "mllm": "ar_model/checkpoint/" if preset.version == 1 else "the folder of Qwen3-VL",
    }
    decoder_index = int(part.rpartition("_")[2]) - 1 if part[-1:].isdigit() else 0
    return names.get(part) or list_weight_files(preset)[decoder_index]


# ---------------------------------------------------------------- reading and checking


def read_contents(tree: SourceTree, preset: Preset, single_file: Path | None) -> Contents:
    """Return the content of every part that the sources have; raise CheckpointError for the first fault."""
    contents = read_omni_parts(tree, preset, single_file)
    found = {} if single_file else find_our_parts(tree, preset) | find_library_parts(tree, preset)
    for name, part in found.items():
        if name not in contents:
            contents[name] = read_found_part(preset, part)
    if "tokenizer" in contents and "text_encoder" in contents:
        folder, encoder = contents["tokenizer"].folder, contents["text_encoder"]
        assert folder is not None, "a tokenizer is always a folder"
        config = read_json(encoder.folder / "config.json") if encoder.folder else encoder.config.to_dict()
        raise_first(list(find_tokenizer_faults("tokenizer", folder, config["vocab_size"])))
    return {name: contents[name] for name in list_required_parts(preset) if name in contents}


def read_omni_parts(tree: SourceTree, preset: Preset, single_file: Path | None) -> Contents:
    """Return the parts in the authors' own files: decoders, the modules before them, markers and null condition."""
    contents: Contents = {}
    first_file = tree.find_file(list_weight_files(preset)[0])
    for index, ending in enumerate(list_weight_files(preset)):
        file = single_file or (tree.find_file_beside(ending, first_file) if first_file else tree.find_file(ending))
        if file is not None:
            contents |= read_published_parts(file, preset, index)
    markers, null = (find_side_file(tree, preset, ending) for ending in (get_markers_file(preset), NULL_CONTEXT_FILE))
    if markers is not None and not single_file:
        contents["markers"] = PartContent(read_markers(markers, preset))
    if null is not None and preset.version == 1 and not single_file:
        contents["null_context"] = PartContent(read_null_context(null, preset))
    return contents


def read_published_parts(file: Path, preset: Preset, decoder_index: int) -> Contents:
    """Return our parts of one published file; raise CheckpointError for the first key or shape that does not fit."""
    state, expected = read_published_state(file), locate_tensors(preset)
    label = f"{file.parent.name}/{file.name}"
    check_state(label, state, {key: location.shape for key, location in expected.items()})
    parts: dict[str, StateDict] = {}
    for key, location in expected.items():
        parts.setdefault(get_part_folder(location.part, decoder_index), {})[location.key] = state[key]
    return {name: PartContent(tensors) for name, tensors in parts.items()}


def read_published_state(file: Path) -> StateDict:
    """Return the tensors of a published file, even if they are nested one level deep, as DeepSpeed saves them."""
    loaded = read_pickle(file)
    for level in ("module", "model"):
        if isinstance(loaded.get(level), Mapping):
            loaded = dict(loaded[level])
            break
    return check_dense_tensors(file.name, loaded)


def read_markers(file: Path, preset: Preset) -> StateDict:
    """Return the preset's markers under our names; each has one or more embeddings [n, D].

    The file of version 2 has the two markers of version 1 that it does not use; they are left out.
    """
    state, names = read_small_pickle(file), list_required_markers(preset)
    known = {f"<{name}>" for name in list_required_markers(PRESETS[PUBLISHED_PRESETS[0]])}
    mismatched = [key for key, value in state.items() if value.ndim != 2 or value.shape[1] != preset.text_width]
    required = {f"<{name}>" for name in names}
    check_keys(file.name, sorted(required - state.keys()), sorted(state.keys() - known), mismatched)
    return {name: state[f"<{name}>"] for name in names}


def read_null_context(file: Path, preset: Preset) -> StateDict:
    """Return version 1's null condition: the MLLM's hidden states [1, N, M] and the text [L, D]."""
    lists = read_tensor_lists(file)
    state: StateDict = {}
    for key, our_key, width in (
        ("vlm_last_hidden_states", "hidden_states", preset.mllm_width),
        ("text_emb", "text", preset.text_width),
    ):
        if not lists.get(key):
            raise CheckpointError(f"{file.name}: {key} is missing")
        value = lists[key][0]
        if value.ndim not in (2, 3) or value.shape[-1] != width:
            raise CheckpointError(f"{file.name}: {key} has the shape {list(value.shape)}; {preset.name} needs {width}")
        state[our_key] = value
    unknown = sorted(lists.keys() - {"vlm_last_hidden_states", "text_emb", "text_emb_siglip2"})
    if unknown:
        raise CheckpointError(f"{file.name}: {unknown[0]} is unknown")
    hidden, text = state["hidden_states"], state["text"]
    return {"hidden_states": hidden[None] if hidden.ndim == 2 else hidden, "text": text.flatten(0, -2)}


def read_found_part(preset: Preset, part: FoundPart) -> PartContent:
    """Return a part from Wan's own file, or from a folder that is linked; raise CheckpointError for its first fault."""
    if part.form != "published file":
        raise_first(find_part_faults(preset, part.name, part.path))
        return PartContent({}, folder=part.path)
    state = check_dense_tensors(part.path.name, read_pickle(part.path))
    if part.name == "vae":
        locations = locate_vae_tensors(preset.vae)
        check_state(part.path.name, state, {key: shape for key, (_, shape) in locations.items()})
        return PartContent(rename_tensors(state, locations), build_meta_vae(preset.vae))
    config = read_text_encoder_config(part.path.name, state)
    locations = locate_text_encoder_tensors(config)
    check_state(part.path.name, state, {key: shape for key, (_, shape) in locations.items()})
    if config.d_model != preset.text_width:
        text = f"the text encoder has width {config.d_model}; {preset.name} needs {preset.text_width}"
        raise CheckpointError(f"{part.path.name}: {text}")
    return PartContent(rename_tensors(state, locations), config)


def raise_first(faults: Sequence[str]) -> None:
    if faults:
        others = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckpointError(faults[0] + others)

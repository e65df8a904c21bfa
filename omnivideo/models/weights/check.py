"""Check that the parts of a folder fit together, without loading them: every part is built on the meta device.

Only configurations and the headers of safetensors files are read. A fault is one line that begins with its part.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, UMT5Config
from transformers.utils import logging

from omnivideo.errors import CheckpointError
from omnivideo.models.vila import VilaProjector
from omnivideo.models.weights.checkpoint import WEIGHTS_FILE, load_mllm_tokenizer
from omnivideo.models.weights.published import (
    PUBLISHED_PRESETS,
    build_meta_modules,
    get_part_folder,
    list_required_markers,
    list_weight_files,
)
from omnivideo.models.weights.shipped import INDEX_FILE, read_index
from omnivideo.models.weights.sources import QWEN3_VL_TYPES, list_required_parts, read_json
from omnivideo.models.weights.strict import check_keys, check_not_quantized, get_first_line
from omnivideo.models.weights.tensor_files import read_safetensors_header
from omnivideo.models.weights.vila import load_vila_tokenizer, read_image_config
from omnivideo.models.weights.wan_layouts import (
    build_meta_text_encoder,
    build_meta_vae,
    list_text_encoder_shapes,
)
from omnivideo.presets import Preset, get_preset

Shapes = Mapping[str, tuple[int, ...]]
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")  # one of them is enough
VAE_FIELDS = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample")
VILA_TYPES = {"llm": "llama", "vision_tower": "siglip_vision_model"}
SHARD_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
VAE_STATISTICS = ("latents_mean", "latents_std")


def find_faults(folder: Path) -> list[str]:
    """Return what does not fit in a folder of ours, one line each; an empty list means that it can be loaded."""
    index = read_index(folder)
    preset = get_preset(index["preset"])
    faults = list(find_index_faults(folder, index["sha256"]))
    for name in list_required_parts(preset):
        if (folder / name).is_dir():
            faults += find_part_faults(preset, name, folder / name)
        elif name != "markers" or not preset.condition.optional_markers:
            faults.append(f"{name}: the folder is missing")
    if (folder / "tokenizer").is_dir() and (folder / "text_encoder" / "config.json").is_file():
        vocab_size = read_json(folder / "text_encoder" / "config.json").get("vocab_size", 0)
        faults += find_tokenizer_faults("tokenizer", folder / "tokenizer", vocab_size)
    return faults


def find_index_faults(folder: Path, digests: Mapping[str, str]) -> Iterator[str]:
    """Yield the weights files that the index or the folder lacks."""
    for file in digests:
        if not (folder / file).is_file():
            yield f"{file.split('/')[0]}: {file} is missing"
    for path in sorted(folder.rglob("*.safetensors")):
        file = path.relative_to(folder).as_posix()
        if file not in digests:
            yield f"{file.split('/')[0]}: {file} is not listed in {INDEX_FILE}"


def find_part_faults(preset: Preset, name: str, folder: Path) -> list[str]:
    """Return the faults of one part in a folder of our format, or of transformers or diffusers."""
    try:
        if name == "tokenizer":
            return []  # compared with the text encoder's vocabulary
        if name == "mllm":
            return collect_mllm_faults(preset, folder)
        if name == "vae":
            return list(find_vae_faults(preset, folder))
        if name == "text_encoder":
            return list(find_text_encoder_faults(preset, folder))
        if name == "markers":
            return list(find_marker_faults(preset, read_folder_shapes(folder)))
        if name == "null_context":
            return list(find_null_context_faults(preset, read_folder_shapes(folder)))
        return list(find_module_faults(preset, name, folder))
    except CheckpointError as error:
        return [str(error)]


def read_folder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors in a folder's safetensors files.

    Raises CheckpointError for a damaged file, for shards without their index, and for one that it names but that is
    missing.
    """
    files = sorted(folder.glob("*.safetensors"))
    indices = list(folder.glob("*.safetensors.index.json"))
    shards = [match for path in files if (match := SHARD_NAME.fullmatch(path.name))]
    if shards and not indices:
        raise CheckpointError(f"{folder.name}/{shards[0][1]}.safetensors.index.json is missing")
    for index in indices:
        listed = set(read_json(index).get("weight_map", {}).values())
        missing = sorted(file for file in listed if not (folder / file).is_file())
        if missing:
            raise CheckpointError(f"{folder.name}/{missing[0]} is missing")
        files = [path for path in files if path.name in listed]
    if not files:
        raise CheckpointError(f"{folder.name}/{WEIGHTS_FILE} is missing from the weights")
    return {key: tuple(entry["shape"]) for path in files for key, entry in read_safetensors_header(path)[1].items()}


def find_shape_faults(name: str, shapes: Shapes, expected: Shapes) -> Iterator[str]:
    """Yield one fault for missing keys, one for unknown keys and one for wrong shapes."""
    mismatched = sorted(key for key in shapes if key in expected and shapes[key] != tuple(expected[key]))
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    yield from list_key_faults(name, missing, unknown, mismatched)


def list_key_faults(name: str, missing: list[str], unknown: list[str], mismatched: list[str]) -> Iterator[str]:
    nothing: list[str] = []
    for group in ((missing, nothing, nothing), (nothing, unknown, nothing), (nothing, nothing, mismatched)):
        try:
            check_keys(name, *group)
        except CheckpointError as error:
            yield str(error)


# ---------------------------------------------------------------- our modules


def find_module_faults(preset: Preset, name: str, folder: Path) -> Iterator[str]:
    """Yield the faults of a decoder or of a module between it and the MLLM."""
    modules = build_meta_modules(preset)
    suffixes = {get_part_folder(part, index): part
                for part in modules for index in range(len(list_weight_files(preset)))}  # fmt: skip
    part = suffixes[name]
    if part == "transformer":
        yield from find_config_faults(name, read_json(folder / "config.json"), preset.decoder, preset.name)
    expected = {key: tuple(value.shape) for key, value in modules[part].state_dict().items()}
    yield from find_shape_faults(name, read_folder_shapes(folder), expected)


def find_config_faults(name: str, config: Mapping[str, Any], expected: Mapping[str, Any], owner: str) -> Iterator[str]:
    for field, value in expected.items():
        if json.dumps(config.get(field)) != json.dumps(value):  # tuples are lists in a file
            yield f"{name}: {field} is {config.get(field)}; {owner} needs {value}"


def find_marker_faults(preset: Preset, shapes: Shapes) -> Iterator[str]:
    """Yield the faults of the markers; each has one or more rows [n, D]."""
    required = set(list_required_markers(preset))
    mismatched = [key for key, shape in shapes.items() if len(shape) != 2 or shape[1] != preset.text_width]
    missing, unknown = sorted(required - shapes.keys()), sorted(shapes.keys() - required)
    yield from list_key_faults("markers", missing, unknown, mismatched)


def find_null_context_faults(preset: Preset, shapes: Shapes) -> Iterator[str]:
    """Yield the faults of version 1's null condition: hidden states [1, N, M] and a text [L, D]."""
    widths = {"hidden_states": (3, preset.mllm_width), "text": (2, preset.text_width)}
    mismatched = [key for key, shape in shapes.items() if key in widths and (len(shape), shape[-1]) != widths[key]]
    missing, unknown = sorted(widths.keys() - shapes.keys()), sorted(shapes.keys() - widths.keys())
    yield from list_key_faults("null_context", missing, unknown, mismatched)


# ---------------------------------------------------------------- parts of diffusers and transformers


def find_vae_faults(preset: Preset, folder: Path) -> Iterator[str]:
    config = read_json(folder / "config.json")
    expected = build_meta_vae(preset.vae)
    # The statistics of a VAE of our own are measured when it has been trained; the preset does not know them.
    fields = (*VAE_FIELDS, *VAE_STATISTICS) if preset.name in PUBLISHED_PRESETS else VAE_FIELDS
    yield from find_config_faults("vae", config, {field: expected.config[field] for field in fields}, preset.name)
    shapes = {key: tuple(value.shape) for key, value in expected.state_dict().items()}
    yield from find_shape_faults("vae", read_folder_shapes(folder), shapes)


def find_text_encoder_faults(preset: Preset, folder: Path) -> Iterator[str]:
    config = read_json(folder / "config.json")
    if config.get("model_type") != "umt5":
        yield f"text_encoder: model_type is {config.get('model_type')!r}; {preset.name} needs 'umt5'"
        return
    if config.get("d_model") != preset.text_width:
        yield f"text_encoder: it has width {config.get('d_model')}; the decoder needs {preset.text_width}"
    expected = list_text_encoder_shapes(build_meta_text_encoder(UMT5Config(**config)))
    shapes = read_folder_shapes(folder)
    shapes.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
    yield from find_shape_faults("text_encoder", shapes, expected)


def find_tokenizer_faults(name: str, folder: Path, vocab_size: int) -> Iterator[str]:
    """Yield a fault if a tokenizer cannot be read, or has ids for which the model has no embedding."""
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        yield f"{name}: {folder.name}/{TOKENIZER_FILES[0]} is missing"
        return
    for path in sorted(folder.glob("*.json")):
        try:
            read_json(path)
        except CheckpointError as error:
            yield str(error)
            return
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the readers of tokenizers raise errors of many types, plain Exception among them
        yield f"{name}: the tokenizer cannot be read: {get_first_line(error)}"
        return
    if len(tokenizer) > vocab_size:
        yield f"{name}: the tokenizer has {len(tokenizer)} tokens; the model has {vocab_size} embeddings"


def collect_mllm_faults(preset: Preset, folder: Path) -> list[str]:
    """Return the faults of an MLLM, up to the first that keeps the rest from being checked."""
    faults: list[str] = []
    try:
        for fault in find_mllm_faults(preset, folder):
            faults.append(fault)
    except CheckpointError as error:
        faults.append(str(error))
    return faults


def find_mllm_faults(preset: Preset, folder: Path) -> Iterator[str]:
    config = read_json(folder / "config.json")
    family = "qwen3-vl" if config.get("model_type") in QWEN3_VL_TYPES else "vila" if "llm_cfg" in config else "another"
    if family != preset.mllm.family:
        text = f"{folder.name}/config.json describes a model of the family {family!r}"
        yield f"mllm: {text}; {preset.name} needs {preset.mllm.family!r}"
    elif family == "vila":
        yield from find_vila_faults(preset, folder)
    else:
        yield from find_qwen_faults(preset, folder, config)


def find_qwen_faults(preset: Preset, folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    text_config = config.get("text_config", {})
    if text_config.get("hidden_size") != preset.mllm_width:
        yield f"mllm: it has width {text_config.get('hidden_size')}; {preset.name} needs {preset.mllm_width}"
    kind = "Qwen3VLMoe" if config["model_type"] == "qwen3_vl_moe" else "Qwen3VL"
    yield from find_transformers_faults(f"{kind}ForConditionalGeneration", folder, "mllm")
    faults = list(find_tokenizer_faults("mllm", folder, text_config.get("vocab_size", 0)))
    yield from faults
    if preset.mllm.routing == "tokens" and not faults:
        load_mllm_tokenizer(folder.parent, text_config["vocab_size"])


def find_vila_faults(preset: Preset, folder: Path) -> Iterator[str]:
    """Yield the faults of VILA's three folders: language model, vision tower and the projector between them."""
    llm, tower = read_json(folder / "llm" / "config.json"), read_json(folder / "vision_tower" / "config.json")
    for name, config in (("llm", llm), ("vision_tower", tower)):
        if config.get("model_type") != VILA_TYPES[name]:
            yield f"mllm/{name}: model_type is {config.get('model_type')!r}; {preset.name} needs {VILA_TYPES[name]!r}"
            return
    width, tower_width = llm.get("hidden_size", 0), tower.get("hidden_size", 0)
    if width != preset.mllm_width:
        yield f"mllm/llm: it has width {width}; {preset.name} needs {preset.mllm_width}"
    yield from find_transformers_faults("LlamaForCausalLM", folder / "llm", "mllm/llm")
    yield from find_transformers_faults("SiglipVisionModel", folder / "vision_tower", "mllm/vision_tower")
    read_json(folder / "mm_projector" / "config.json")
    with torch.device("meta"):
        projector = VilaProjector(tower_width, width)
    expected = {key: tuple(value.shape) for key, value in projector.state_dict().items()}
    yield from find_shape_faults("mllm/mm_projector", read_folder_shapes(folder / "mm_projector"), expected)
    read_image_config(folder)
    faults = list(find_tokenizer_faults("mllm/llm", folder / "llm", llm.get("vocab_size", 0)))
    yield from faults
    if not faults:
        load_vila_tokenizer(folder, llm["vocab_size"])


def find_transformers_faults(class_name: str, folder: Path, label: str) -> Iterator[str]:
    """Yield the keys that do not fit a transformers model, which renames and joins some of them when it loads."""
    read_json(folder / "config.json")
    check_not_quantized(label, folder / "config.json")
    read_folder_shapes(folder)  # a damaged or a missing file is named here
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers prints a table of what we report in one line
    try:
        _, report = getattr(transformers, class_name).from_pretrained(
            folder, device_map="meta", local_files_only=True, use_safetensors=True, ignore_mismatched_sizes=True,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError, ImportError) as error:
        yield f"{label} cannot be built: {get_first_line(error).replace(str(folder), folder.name)}"
        return
    finally:
        logging.set_verbosity(verbosity)
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    yield from list_key_faults(label, sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), mismatched)

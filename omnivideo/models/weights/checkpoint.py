"""Save and load a preset's weights: a Diffusers-style folder, loaded strictly.

    model_index.json       preset, format, and the SHA-256 of every weights file
    mllm/ vision_head/ adapter/ visual_context/ markers/ transformer/ text_encoder/ tokenizer/ vae/
    null_context/ hidden_projection/            of published presets
    transformer_2/ hidden_projection_2/ visual_context_2/    of the second of two experts

Every weights file is safetensors. A missing or unknown key or a wrong shape is an error when loading;
`verify_digests` finds files that have changed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from omnivideo.errors import CheckpointError
from omnivideo.models.bridge import NullContext
from omnivideo.models.conditions import MarkerEmbeddings
from omnivideo.models.device import measure_machine
from omnivideo.models.mllm import VISUAL_TOKENS
from omnivideo.models.offload import place_parts
from omnivideo.models.omni import Bridge, OmniVideoModel, get_expert_part, get_torch_dtype
from omnivideo.models.placement import Machine, Placement, plan_placement
from omnivideo.models.positions import add_absolute_positions
from omnivideo.models.weights.digests import RECORD_FILE, compute_file_digest, stamp_files, write_record
from omnivideo.models.weights.mapped_pages import MappedPages
from omnivideo.models.weights.part_sizes import measure_parts
from omnivideo.models.weights.qwen3_vl import load_qwen3_vl, restore_published_layout
from omnivideo.models.weights.shipped import INDEX_FILE, read_index
from omnivideo.models.weights.strict import check_keys as check_keys
from omnivideo.models.weights.strict import get_first_line as get_first_line
from omnivideo.models.weights.strict import load_strict as load_strict
from omnivideo.models.weights.vila import load_vila, load_vila_tokenizer
from omnivideo.presets import Precision, Preset, get_preset

Contents = Literal["all", "without-mllm", "mllm"]

BRIDGE_PARTS = ("vision_head", "adapter", "visual_context", "markers")
WEIGHTS_FILE = "model.safetensors"


def save(omni: OmniVideoModel, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write all parts in the given precision, without changing the models in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"mllm": omni.mllm, "text_encoder": omni.text_encoder, "vae": omni.vae}
    parts |= {get_expert_part("transformer", index): decoder for index, decoder in enumerate(omni.decoders)}
    for name, part in parts.items():
        save_library_model(part, folder / name, dtype)
    omni.mllm_tokenizer.save_pretrained(folder / "mllm")
    omni.tokenizer.save_pretrained(folder / "tokenizer")
    for name, module in omni.bridge.named_children():
        (folder / name).mkdir(exist_ok=True)
        state = module.state_dict()
        save_file({key: value.to(dtype).contiguous() for key, value in state.items()}, folder / name / WEIGHTS_FILE)
    files = {str(path.relative_to(folder)): compute_file_digest(path) for path in sorted(folder.rglob("*.safetensors"))}
    index = {"_class_name": "OmniVideo", "format": 1, "preset": omni.preset.name, "sha256": files}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def save_library_model(part: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a part's configuration as its library does, and its weights as one safetensors file."""
    folder.mkdir(exist_ok=True)
    if isinstance(part, WanTransformer3DModel | AutoencoderKLWan):
        part.save_config(folder)
        path = folder / "diffusion_pytorch_model.safetensors"
    else:
        part.config.save_pretrained(folder)
        path = folder / WEIGHTS_FILE
    strip_provenance(folder / "config.json")
    state = {key: value.to(dtype).contiguous() for key, value in part.state_dict().items()}
    if isinstance(part, Qwen3VLMoeForConditionalGeneration):
        state = restore_published_layout(state)
    if isinstance(part, UMT5EncoderModel):
        state.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
    save_file(state, path, metadata={"format": "pt"})


def strip_provenance(config: Path) -> None:
    """Remove what a library records of a model's origin: the folder that it was loaded from, and its precision."""

    def strip_keys(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: strip_keys(entry) for key, entry in value.items() if key not in ("_name_or_path", "dtype")}

    config.write_text(json.dumps(strip_keys(json.loads(config.read_text())), indent=2, sort_keys=True) + "\n")


def verify_digests(folder: Path) -> None:
    """Compare every weights file with the index, and record what was read.

    Raises CheckpointError for the first file that differs.
    """
    stamps, digests = stamp_files(folder), read_index(folder)["sha256"]
    for name, expected in digests.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{name} is missing from the weights")
        if compute_file_digest(path) != expected:
            raise CheckpointError(f"{name} is damaged: its SHA-256 differs from the index")
    write_record(folder / RECORD_FILE, stamps, digests)


def load(
    folder: Path,
    device: torch.device | str = "cpu",
    precision: Precision = "preset",
    contents: Contents = "all",
    machine: Machine | None = None,
) -> OmniVideoModel:
    """Load the parts of a folder's preset, in evaluation mode, each where it fits (`OmniVideoModel.placement`).

    Each part has the type that the preset states, or all are in float32. A process that gets the MLLM's features from
    a server loads everything else, and that server only what computes them. `machine` is what is free for the model,
    by default all that is free on this machine and on the device.
    """
    model_preset, device = get_preset(read_index(folder)["preset"]), torch.device(device)
    if precision == "float32":
        model_preset = model_preset.in_float32()
    sizes = measure_parts(folder, model_preset, list_part_names(model_preset, contents))
    placement = plan_placement(sizes, machine or measure_machine(device))
    omni = load_parts(
        folder,
        lambda name, part: move_resident(name, part, placement, device),
        lambda part: get_torch_dtype(model_preset, part),
        contents,
        model_preset,
    )
    place_parts(omni.parts, placement, device, MappedPages().release)
    omni.placement, omni.placed_on = placement, torch.device("cpu") if placement.mode == "CPU" else device
    return omni


def list_part_names(model_preset: Preset, contents: Contents = "all") -> tuple[str, ...]:
    """Return the names of the parts in `OmniVideoModel.parts`."""
    with torch.device("meta"):
        bridge_parts = select_bridge_parts(Bridge(model_preset), contents)
    if contents == "mllm":
        return ("mllm", *bridge_parts)
    decoders = (get_expert_part("decoder", index) for index in range(model_preset.experts.num_decoders))
    return (*(("mllm",) if contents == "all" else ()), *decoders, *bridge_parts, "text_encoder", "vae")


def select_bridge_parts(bridge: Bridge, contents: Contents) -> tuple[str, ...]:
    """Return the parts between MLLM and decoder that a process needs: a server of the MLLM only the vision head."""
    return tuple(name for name in bridge.part_names if contents != "mllm" or name == "vision_head")


def move_resident(name: str, part: Any, placement: Placement, device: torch.device) -> Any:
    """Move a part, or each module of the bridge, to the device if it stays there; return the part."""
    modules = dict(part.named_children()) if name == "bridge" else {name: part}
    for key, module in modules.items():
        if placement.find_part(key).location == "gpu":
            module.to(device)
    return part


def keep_file_dtype(part: str) -> None:
    """Return None for every part: the type in which `load_strict` reads it."""


def load_parts(
    folder: Path,
    place_part: Callable[[str, Any], Any],
    choose_dtype: Callable[[str], torch.dtype | None] = keep_file_dtype,
    contents: Contents = "all",
    model_preset: Preset | None = None,
) -> OmniVideoModel:
    """Load parts as `load` does, and let `place_part` move each to its device before the next one is read.

    `place_part` gets a part and its name, such as "bridge", `choose_dtype` a name of the preset's `dtypes`.
    """
    model_preset = model_preset or get_preset(read_index(folder)["preset"])
    logging.disable_progress_bar()  # transformers shows a progress bar for each part, however small
    parts: dict[str, Any] = {"decoder": None, "text_encoder": None, "tokenizer": None, "vae": None}
    if contents != "mllm":
        for index in range(model_preset.experts.num_decoders):
            decoder = load_strict(
                WanTransformer3DModel, folder, get_expert_part("transformer", index), choose_dtype("decoder")
            )
            name = get_expert_part("decoder", index)
            parts["second_decoder" if index else "decoder"] = place_part(name, decoder)
    parts |= {"mllm": None, "mllm_tokenizer": None}
    if contents != "without-mllm":
        mllm, parts["mllm_tokenizer"] = load_mllm(model_preset, folder, choose_dtype("mllm"))
        parts["mllm"] = place_part("mllm", mllm)
    parts["bridge"] = place_part("bridge", load_bridge(model_preset, folder, choose_dtype, contents))
    if contents != "mllm":
        text_encoder = load_strict(UMT5EncoderModel, folder, "text_encoder", choose_dtype("text_encoder"))
        parts["text_encoder"] = place_part("text_encoder", text_encoder)
        parts["tokenizer"] = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        parts["vae"] = place_part("vae", load_strict(AutoencoderKLWan, folder, "vae", choose_dtype("vae")))
        if model_preset.absolute_positions:
            parts["decoder"] = add_absolute_positions(parts["decoder"])
    return OmniVideoModel(preset=model_preset, **parts).eval()


def load_mllm(model_preset: Preset, folder: Path, dtype: torch.dtype | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the MLLM of the preset's family, and its tokenizer."""
    if model_preset.mllm.family == "vila":
        vila: Any = load_vila(folder / "mllm", dtype)
        return vila, load_vila_tokenizer(folder / "mllm", vila.get_input_embeddings().num_embeddings)
    mllm = load_qwen3_vl(folder, "mllm", dtype)
    has_routing_tokens = model_preset.mllm.routing == "tokens"
    return mllm, load_mllm_tokenizer(folder, mllm.get_input_embeddings().num_embeddings, has_routing_tokens)


def load_mllm_tokenizer(folder: Path, embedding_count: int, has_routing_tokens: bool = True) -> PreTrainedTokenizerBase:
    """Load the MLLM's tokenizer.

    Raises CheckpointError if it lacks the routing tokens that the preset needs; it would split them silently.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "mllm", local_files_only=True)
    if not has_routing_tokens:
        return tokenizer
    ids = tokenizer("".join(VISUAL_TOKENS), add_special_tokens=False).input_ids
    if ids != tokenizer.convert_tokens_to_ids(list(VISUAL_TOKENS)) or max(ids) >= embedding_count:
        raise CheckpointError(
            f"mllm: {', '.join(VISUAL_TOKENS)} must be one token each, with an embedding; add them to its tokenizer "
            "and model as described in docs/weights.md"
        )
    return tokenizer


def load_bridge(
    model_preset: Preset,
    folder: Path,
    choose_dtype: Callable[[str], torch.dtype | None] = keep_file_dtype,
    contents: Contents = "all",
) -> Bridge:
    """Load the bridge; the markers and the null context have as many embeddings as the weights contain."""
    with torch.device("meta"):
        bridge = Bridge(model_preset)
    for name in set(bridge.part_names) - set(select_bridge_parts(bridge, contents)):
        delattr(bridge, name)
    for name in bridge.part_names:
        path = folder / name / WEIGHTS_FILE
        if name == "markers" and model_preset.condition.optional_markers and not path.parent.is_dir():
            bridge.markers = MarkerEmbeddings.without_rows(model_preset.text_width, model_preset.condition.marker_names)
            continue
        if not path.is_file():
            raise CheckpointError(f"{name}/{WEIGHTS_FILE} is missing from the weights")
        dtype = choose_dtype(name.removesuffix("_2"))
        state = {key: value.to(dtype or value.dtype) for key, value in load_file(path).items()}
        with torch.device("meta"):
            if name == "markers":
                lengths = {key: len(value) for key, value in state.items()}
                bridge.markers = MarkerEmbeddings(model_preset.text_width, model_preset.condition.marker_names, lengths)
            if name == "null_context":
                lengths = {key: value.shape[-2] for key, value in state.items() if value.ndim > 1}
                bridge.null_context = NullContext(
                    model_preset.mllm_width,
                    model_preset.text_width,
                    lengths.get("hidden_states", 1),
                    lengths.get("text", 1),
                )
        module = bridge.get_submodule(name)
        expected = {key: value.shape for key, value in module.state_dict().items()}
        mismatched = [key for key in state if key in expected and state[key].shape != expected[key]]
        check_keys(name, sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys()), mismatched)
        module.load_state_dict(state, assign=True)
    return bridge

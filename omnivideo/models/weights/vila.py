"""Load VILA from its published layout: config.json, llm/, vision_tower/ and mm_projector/."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from omnivideo.errors import CheckpointError
from omnivideo.models.vila import Vila, VilaProjector
from omnivideo.models.vila_requests import VilaImageConfig, find_routing_ids
from omnivideo.models.weights.strict import check_keys, get_first_line, load_strict

PROJECTOR_FILE = "mm_projector/model.safetensors"
# What the published model has. Another value is another model, of which we have not checked a single output.
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "image_aspect_ratio": ("resize", "pad"),
    "mm_vision_select_feature": ("cls_patch",),
    "mm_use_im_start_end": (False, None),
    "s2": (False, None),
}


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON file of the folder; raise CheckpointError if it is missing or is not a JSON object."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"mllm: {name} is missing from the weights")
    try:
        value = json.loads(path.read_text())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"mllm: {name} is not a JSON object")
    return value


def read_image_config(folder: Path) -> tuple[VilaImageConfig, int]:
    """Return how images become pixels, and the index of the tower's hidden states that the projector gets.

    Raises CheckpointError for a VILA of another kind than the published one.
    """
    config = read_json(folder, "config.json")
    for name, allowed in SUPPORTED_VALUES.items():
        if config.get(name) not in allowed:
            values = " or ".join(json.dumps(value) for value in allowed)
            raise CheckpointError(f"mllm: config.json has {name} {config.get(name)!r}; supported: {values}")
    kind = read_json(folder, "mm_projector/config.json").get("mm_projector_type")
    if kind != "mlp_downsample":
        raise CheckpointError(f"mllm: mm_projector/config.json has a projector {kind!r}; supported: mlp_downsample")
    preprocessor = read_json(folder, "vision_tower/preprocessor_config.json")
    try:
        size, select_layer = preprocessor["size"], int(config["mm_vision_select_layer"])
        image_config = VilaImageConfig(
            height=int(size["height"]),
            width=int(size["width"]),
            resample=int(preprocessor["resample"]),
            rescale_factor=float(preprocessor["rescale_factor"]),
            mean=tuple(preprocessor["image_mean"]),
            std=tuple(preprocessor["image_std"]),
            resize_mode=config["image_aspect_ratio"],
        )
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"mllm: the image settings are incomplete: {get_first_line(error)}") from None
    return image_config, select_layer


def load_projector(folder: Path, tower_width: int, llm_width: int, dtype: torch.dtype | None) -> VilaProjector:
    """Load the projector between a tower and a Llama of these widths."""
    path = folder / PROJECTOR_FILE
    if not path.is_file():
        raise CheckpointError(f"mllm: {PROJECTOR_FILE} is missing from the weights")
    try:
        state = {key: value.to(dtype or value.dtype) for key, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"mllm: {PROJECTOR_FILE} cannot be read: {get_first_line(error)}") from None
    with torch.device("meta"):
        projector = VilaProjector(tower_width, llm_width)
    expected = {key: value.shape for key, value in projector.state_dict().items()}
    mismatched = [key for key in state if key in expected and state[key].shape != expected[key]]
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    check_keys("mm_projector", missing, unknown, mismatched)
    projector.load_state_dict(state, assign=True)
    return projector


def load_vila(folder: Path, dtype: torch.dtype | None = None) -> Vila:
    """Load a VILA, in evaluation mode. Without a `dtype`, each part keeps the precision of its file.

    Raises CheckpointError for a missing or damaged file, one that does not fit, and another kind of VILA.
    """
    image_config, select_layer = read_image_config(folder)
    vision_tower = load_strict(SiglipVisionModel, folder, "vision_tower", dtype)
    llm = load_strict(LlamaForCausalLM, folder, "llm", dtype)
    projector = load_projector(folder, vision_tower.config.hidden_size, llm.config.hidden_size, dtype)
    return Vila(vision_tower, projector, llm, select_layer, image_config).eval()


def load_vila_tokenizer(folder: Path, embedding_count: int) -> PreTrainedTokenizerBase:
    """Load VILA's tokenizer; raise CheckpointError if it lacks the tokens that route, or they have no embedding."""
    if not (folder / "llm" / "tokenizer_config.json").is_file():
        raise CheckpointError("mllm: llm/tokenizer_config.json is missing from the weights")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm", local_files_only=True)
    try:
        routing_ids = find_routing_ids(tokenizer)
    except LookupError as error:
        raise CheckpointError(f"mllm: {error.args[0]}") from None
    if max(routing_ids.values()) >= embedding_count:
        raise CheckpointError(f"mllm: the language model has no embedding for the token {max(routing_ids.values())}")
    return tokenizer

"""Load a Qwen3-VL, dense or mixture of experts, from a Hugging Face folder.

The published layout has the experts' weights as [experts, input, output]. transformers 5 computes with
[experts, output, input] and decides by the shape whether to transpose, so square weights would load silently wrong:
they are refused. vLLM reads the published layout only, and that is what our folders contain.

transformers copies what it transposes, 57 of the 62 GB of a 30B-A3B. Here experts are transposed views of their file,
as all other weights are: loading reads nothing, and pages can be given back.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration

from omnivideo.errors import CheckpointError
from omnivideo.models.weights.strict import load_strict

MODEL_CLASSES = {"qwen3_vl": Qwen3VLForConditionalGeneration, "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration}
EXPERT_KEYS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


class TransposedView(Transpose):  # type: ignore[misc]  # transformers has no types
    """Transposes an expert's weights [experts, input, output] without a copy; those that need none stay as they are."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        ((_, tensors),) = input_dict.items()
        tensor: Tensor = tensors[0] if isinstance(tensors, list) else tensors
        expected = kwargs["model"].get_parameter(kwargs["full_layer_name"]).shape
        target = self.get_target_pattern(input_dict, source_patterns, target_patterns)
        return {target: tensor if tensor.shape == expected else tensor.transpose(self.dim0, self.dim1)}


def register_expert_views() -> None:
    """Let transformers load experts as views of their file."""
    converters = [WeightConverter(key, key, [TransposedView(1, 2, check_dims=True)]) for key in EXPERT_KEYS]
    register_checkpoint_conversion_mapping("qwen3_vl_moe", converters, overwrite=True)


def read_model_config(folder: Path, name: str) -> dict[str, Any]:
    """Return config.json of a subfolder; raise CheckpointError if it is missing or damaged."""
    path = folder / name / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{name}/config.json is missing from the weights")
    try:
        config = json.loads(path.read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f"{name}/config.json is not a JSON object")
    return config


def load_qwen3_vl(folder: Path, name: str = "mllm", dtype: torch.dtype | None = None) -> Any:
    """Load a Qwen3-VL from a subfolder. Raises CheckpointError if it is another model or ambiguous."""
    config = read_model_config(folder, name)
    model_type = config.get("model_type")
    if model_type not in MODEL_CLASSES:
        raise CheckpointError(f"{name}: it is a {model_type!r}; supported: {', '.join(MODEL_CLASSES)}")
    if model_type == "qwen3_vl_moe":
        check_expert_shapes(name, config.get("text_config") or {})
        register_expert_views()
    return load_strict(MODEL_CLASSES[model_type], folder, name, dtype)


def check_expert_shapes(name: str, text_config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the shape of an expert's weights does not tell their layout."""
    width, expert_width = text_config.get("hidden_size"), text_config.get("moe_intermediate_size")
    if not isinstance(width, int) or not isinstance(expert_width, int):
        raise CheckpointError(f"{name}: config.json has no hidden_size or moe_intermediate_size")
    if width in (expert_width, 2 * expert_width):
        raise CheckpointError(
            f"{name}: experts of width {expert_width} in a model of width {width} have square weights, whose layout "
            "cannot be told; allowed: an expert width that is neither the model's width nor half of it"
        )


def restore_published_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dictionary of transformers' with the experts' weights as in the published layout."""
    return {
        key: value.transpose(1, 2).contiguous() if key.endswith(EXPERT_KEYS) else value for key, value in state.items()
    }

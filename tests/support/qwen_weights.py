"""Random weights of a small stock Qwen3-VL, dense or mixture of experts, with the tokenizer of the golden data.

Its attention heads are 32 wide, because vLLM's code for the CPU has none for the golden model's 16.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from omnivideo.models.weights.checkpoint import save_library_model
from tests.support.golden import golden_folder

PRESET = "omnivideo2-a14b"


def build_instruct_model(experts: bool, seed: int = 3, width: int = 64) -> Any:
    """Return a model of this width, with the golden model's tokens."""
    source = golden_folder() / "qwen3vl"
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"] | {
        "hidden_size": width, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_hidden_layers": 3, "moe_intermediate_size": 96, "intermediate_size": 96, "max_position_embeddings": 4096,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [8, 4, 4], "rope_type": "default"},
    }  # fmt: skip
    vision = config["vision_config"] | {
        "hidden_size": 64, "num_heads": 2, "out_hidden_size": width, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    for part in (text, vision):
        part.pop("model_type")
    tokens = {name: config[name] for name in config if name.endswith("_token_id")}
    config_class = Qwen3VLMoeConfig if experts else Qwen3VLConfig
    model_class = Qwen3VLMoeForConditionalGeneration if experts else Qwen3VLForConditionalGeneration
    torch.manual_seed(seed)
    model = model_class(config_class(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens))
    with torch.no_grad():  # larger than usual, so that answers differ between requests
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


def save_instruct_model(model: Any, folder: Path) -> None:
    """Write a model as a Hugging Face folder with the golden model's tokenizer."""
    folder.mkdir(parents=True)
    save_library_model(model, folder, torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copyfile(golden_folder() / "qwen3vl" / name, folder / name)


def write_instruct_weights(folder: Path, experts: bool, seed: int = 3) -> Path:
    """Write a folder that the MLLM's server can serve: mllm/ and an index with the name of a preset of version 2."""
    save_instruct_model(build_instruct_model(experts, seed), folder / "mllm")
    (folder / "model_index.json").write_text(json.dumps({"preset": PRESET}))
    return folder

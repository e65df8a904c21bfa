"""The part of a version 1 folder that the language model's server reads, with random weights.

Tokenizer, image size and tower are those of the golden VILA. Its Llama has attention heads of width 6, which vLLM's
attention on the CPU does not support, so this one is wider.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig

from omnivideo import presets
from omnivideo.models.bridge import VisionHead
from omnivideo.models.vila import Vila
from omnivideo.models.weights.vila import load_vila
from omnivideo.presets import Preset, QueryTransformerConfig, get_preset
from tests.support.golden import golden_folder

NAME = "tiny-vila"
SERVICE_PRESETS = "GOLDEN_SERVICE_PRESETS"  # set in the processes of a service that has the golden sizes
LLM_WIDTH, HEAD_WIDTH, NUM_QUERIES = 64, 32, 4


def build_preset() -> Preset:
    """Return version 1 with a vision head for this VILA."""
    head = QueryTransformerConfig(
        input_dim=LLM_WIDTH, width=HEAD_WIDTH, num_queries=NUM_QUERIES, num_layers=2, num_heads=4
    )
    return get_preset("omnivideo-1.3b").model_copy(update={"name": NAME, "mllm_width": LLM_WIDTH, "vision_head": head})


def register_preset() -> None:
    """Make the presets of tests known in this process. vLLM calls this in each of its processes."""
    presets.PRESETS[NAME] = build_preset()
    if SERVICE_PRESETS in os.environ:
        from tests.support.golden_service import register_presets

        register_presets()


def build_random_vision_head(input_dim: int = LLM_WIDTH) -> VisionHead:
    """Return a vision head whose random weights tell the hidden states of any two requests apart."""
    torch.manual_seed(3)
    return VisionHead(input_dim, HEAD_WIDTH, NUM_QUERIES, 2, 4).eval()


def build_random_vila() -> Vila:
    """Return a VILA whose Llama and projector are random, and large enough that answers differ between requests."""
    golden = load_vila(golden_folder() / "vila_ar_model", torch.float32)
    config = golden.llm.config.to_dict() | {
        "hidden_size": LLM_WIDTH, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32,
    }  # fmt: skip
    torch.manual_seed(4)
    vila = Vila.from_configs(
        golden.vision_tower.config, LlamaConfig(**config), golden.select_layer, golden.image_config
    )
    for part in (vila.llm, vila.projector):
        for parameter in part.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, 0, 0.15)
    return vila.eval()


def save_vila(vila: Vila, folder: Path) -> None:
    """Write a VILA in the published layout; the golden one has its tower, tokenizer and image processor."""
    shutil.copytree(golden_folder() / "vila_ar_model", folder)
    vila.llm.save_pretrained(folder / "llm")
    save_file(vila.projector.state_dict(), folder / "mm_projector" / "model.safetensors")


def write_weights(folder: Path) -> Path:
    """Write the folder and return it."""
    save_vila(build_random_vila(), folder / "mllm")
    (folder / "vision_head").mkdir()
    save_file(build_random_vision_head().state_dict(), folder / "vision_head" / "model.safetensors")
    index = {"_class_name": "OmniVideo", "format": 1, "preset": NAME, "sha256": {}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder

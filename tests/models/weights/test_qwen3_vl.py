"""A Qwen3-VL's folder: dense or mixture of experts, in the published layout; what cannot be told apart is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from omnivideo.errors import CheckpointError
from omnivideo.models.weights.checkpoint import save_library_model
from omnivideo.models.weights.mapped_pages import MappedPages
from omnivideo.models.weights.qwen3_vl import EXPERT_KEYS, load_qwen3_vl
from tests.support.golden import golden_folder


@pytest.mark.golden
def test_experts_are_saved_as_they_were_published(tmp_path):
    published = load_file(golden_folder() / "qwen3vl" / "model.safetensors")
    model = load_qwen3_vl(golden_folder(), "qwen3vl", torch.float32)
    save_library_model(model, tmp_path / "mllm", torch.float32)
    saved = load_file(tmp_path / "mllm" / "model.safetensors")
    experts = [key for key in published if key.endswith(EXPERT_KEYS)]
    assert experts and all(torch.equal(saved[key], published[key]) for key in experts)
    again = load_qwen3_vl(tmp_path, "mllm", torch.float32)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.golden
def test_experts_are_pages_of_their_file():
    """transformers would copy them, nearly all of a 30B-A3B, and loading would need as much memory."""
    model, pages = load_qwen3_vl(golden_folder(), "qwen3vl"), MappedPages()
    assert [name for name, weight in model.named_parameters() if not pages.holds(weight)] == []


@pytest.mark.golden
@pytest.mark.parametrize("expert_width", [16, 32])
def test_square_experts_are_refused_instead_of_loaded_the_wrong_way_round(tmp_path, expert_width):
    shutil.copytree(golden_folder() / "qwen3vl", tmp_path / "mllm")
    path = tmp_path / "mllm" / "config.json"
    path.chmod(0o644)
    config = json.loads(path.read_text())
    config["text_config"]["moe_intermediate_size"] = expert_width
    config["text_config"]["hidden_size"] = 32
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"experts of width {expert_width} in a model of width 32") as refused:
        load_qwen3_vl(tmp_path)
    assert "\n" not in str(refused.value)


def test_another_model_is_named(tmp_path):
    (tmp_path / "mllm").mkdir()
    (tmp_path / "mllm" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="mllm: it is a 'llama'; supported: qwen3_vl, qwen3_vl_moe"):
        load_qwen3_vl(tmp_path)


def test_a_dense_model_loads_too(tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 32,
              "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))
    save_library_model(model, tmp_path / "mllm", torch.float32)
    assert type(load_qwen3_vl(tmp_path)) is Qwen3VLForConditionalGeneration

"""A LoRA of another model, or none at all, is refused with every engine; one that fits is merged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnivideo.backends.mllm.launch import parse_options
from omnivideo.errors import InvalidInput
from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.lora import check_lora, merge_lora
from omnivideo.models.weights.mapped_pages import MappedPages
from omnivideo.presets import PRESETS, TINY

LAYER = "model.language_model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


def write_lora(folder, shapes, rank=2, alpha=4):
    """Write a LoRA with these weights: layer name to (out, in)."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha}))
    return folder


def get_layer_shape(omni):
    return tuple(dict(omni.mllm.named_modules())[LAYER].weight.shape)


def test_a_lora_is_merged(omni, weights, tmp_path, monkeypatch):
    lora = write_lora(tmp_path / "lora", {LAYER: get_layer_shape(omni)})
    check_lora(lora, weights / "mllm")
    monkeypatch.setitem(PRESETS, "tiny", TINY.model_copy(update={"dtypes": {"mllm": "float16"}}))
    loaded, pages = checkpoint.load(weights), MappedPages()  # its weights are pages of their file
    before = dict(loaded.mllm.named_modules())[LAYER].weight.clone()
    merge_lora(loaded.mllm, lora)
    tensors = load_file(lora / "adapter_model.safetensors")
    down, up = (tensors[f"{PREFIX}{LAYER}.lora_{part}.weight"] for part in "AB")
    pages.release(loaded.mllm.parameters())  # as after each use on a machine that is too small
    torch.testing.assert_close(dict(loaded.mllm.named_modules())[LAYER].weight, before + (2.0 * up @ down).half())


def test_a_lora_of_another_model_is_refused(omni, weights, tmp_path):
    rows, columns = get_layer_shape(omni)
    for shapes, message in (
        ({"model.layers.0.self_attn.q_proj": (rows, columns)}, "which this model does not have"),
        ({LAYER: (rows, columns + 1)}, "have another shape; it is of another model"),
    ):
        with pytest.raises(InvalidInput, match=f"lora: .*{message}"):
            check_lora(write_lora(tmp_path / "lora", shapes), weights / "mllm")
    for fields, message in (
        ({"rank_pattern": {"q_proj": 4}}, "has rank_pattern; supported: one rank"),
        ({"alpha_pattern": {"q_proj": 4}}, "has alpha_pattern; supported: one rank"),
        ({"lora_alpha": "4"}, "has lora_alpha '4'; allowed: a number"),
        ({"r": 8}, "do not have the rank 8 of"),
    ):
        lora = write_lora(tmp_path / "lora", {LAYER: (rows, columns)})
        config = json.loads((lora / "adapter_config.json").read_text())
        (lora / "adapter_config.json").write_text(json.dumps(config | fields))
        with pytest.raises(InvalidInput, match=f"lora: .*{message}"):
            check_lora(lora, weights / "mllm")
    lora = write_lora(tmp_path / "lora", {LAYER: (rows, columns)})
    save_file({"something.weight": torch.zeros(2, 2)}, lora / "adapter_model.safetensors")
    with pytest.raises(InvalidInput, match=r"lora: its key something\.weight is not a LoRA weight"):
        check_lora(lora, weights / "mllm")
    (lora / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InvalidInput, match=r"lora: adapter_model\.safetensors cannot be read"):
        check_lora(lora, weights / "mllm")


@pytest.mark.parametrize("engine", ["auto", "vllm", "transformers"])
def test_every_engine_refuses_a_missing_and_a_foreign_lora(engine, weights, tmp_path, monkeypatch):
    """The command itself, up to the point where a server would start."""
    from typer.testing import CliRunner

    from omnivideo.cli import service
    from omnivideo.cli.main import app

    monkeypatch.setattr(service, "run_server", lambda *arguments: pytest.fail("the server was started"))
    foreign = write_lora(tmp_path / "foreign", {"model.layers.0.mlp.up_proj": (8, 8)})
    assert parse_options(lora=foreign).lora == foreign
    for lora, message in ((tmp_path / "nowhere", "there is no folder 'nowhere'"), (foreign, "does not have")):
        arguments = ["mllm", "serve", "--engine", engine, "--weights", str(weights), "--lora", str(lora)]
        error = CliRunner().invoke(app, arguments).exception
        assert isinstance(error, InvalidInput) and error.field == "lora" and message in str(error)

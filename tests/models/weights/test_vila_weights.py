"""A published VILA folder that is incomplete, damaged or of another kind is refused in one line that names the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnivideo.errors import CheckpointError
from omnivideo.models.weights.vila import load_vila, load_vila_tokenizer
from tests.support.golden import golden_folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(golden_folder() / "vila_ar_model", tmp_path / "mllm"))


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load_all(folder: Path) -> None:
    model = load_vila(folder, torch.float32)
    load_vila_tokenizer(folder, model.get_input_embeddings().num_embeddings)


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_all(folder)
    text = str(caught.value)
    assert all(word in text for word in words) and "\n" not in text, text


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "llm/config.json",
        "llm/model.safetensors",
        "llm/tokenizer_config.json",
        "vision_tower/config.json",
        "vision_tower/model.safetensors",
        "vision_tower/preprocessor_config.json",
        "mm_projector/config.json",
        "mm_projector/model.safetensors",
    ],
)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert_refused(folder, name.split("/")[0])


@pytest.mark.parametrize("part", ["llm", "vision_tower", "mm_projector"])
def test_a_truncated_file_is_named(folder, part):
    path = folder / part / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert_refused(folder, part)


@pytest.mark.parametrize("part", ["llm", "vision_tower", "mm_projector"])
def test_an_extra_key_and_a_missing_key_are_named(folder, part):
    path = folder / part / "model.safetensors"
    state = load_file(path)
    save_file(state | {"surplus.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    assert_refused(folder, part, "surplus.weight", "is unknown")
    removed = sorted(state)[0]
    save_file({key: value for key, value in state.items() if key != removed}, path, metadata={"format": "pt"})
    assert_refused(folder, part, "is missing")


def test_a_projector_of_another_width_is_refused(folder):
    path = folder / "mm_projector" / "model.safetensors"
    state = load_file(path)
    save_file(state | {"layers.4.bias": torch.zeros(7)}, path)
    assert_refused(folder, "layers.4.bias", "different shape")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "image_aspect_ratio", "dynamic"),
        ("config.json", "mm_vision_select_feature", "patch"),
        ("config.json", "mm_use_im_start_end", True),
        ("config.json", "s2", True),
        ("mm_projector/config.json", "mm_projector_type", "linear"),
    ],
)
def test_another_kind_of_vila_is_refused(folder, name, key, value):
    change_json(folder / name, **{key: value})
    assert_refused(folder, name, str(value))


def test_settings_are_read_from_the_files(folder):
    change_json(folder / "config.json", mm_vision_select_layer=-1, image_aspect_ratio="pad")
    change_json(folder / "vision_tower" / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], resample=2)
    model = load_vila(folder)
    assert model.select_layer == -1 and model.image_config.resize_mode == "pad"
    assert model.image_config.mean == (0.1, 0.2, 0.3) and model.image_config.resample == 2


def test_incomplete_image_settings_are_refused(folder):
    path = folder / "vision_tower" / "preprocessor_config.json"
    path.write_text("{}")
    assert_refused(folder, "image settings", "size")
    path.write_text("[]")
    assert_refused(folder, "vision_tower/preprocessor_config.json", "JSON")


def test_a_tokenizer_without_routing_tokens_is_refused(folder):
    path = folder / "llm" / "tokenizer.json"
    path.write_text(path.read_text().replace("[GEN_VID]", "[OTHER]"))
    config = folder / "llm" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("[GEN_VID]", "[OTHER]"))
    assert_refused(folder, "[GEN_VID]", "128003")


def test_the_precision_is_that_of_the_request_or_of_the_file(folder):
    assert load_vila(folder, torch.bfloat16).dtype == torch.bfloat16
    assert load_vila(folder).dtype == torch.float32

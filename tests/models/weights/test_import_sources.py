"""Sources with the files of several presets, and outputs that exist: what is taken, and where it is written."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.models.weights.importer import import_weights
from omnivideo.models.weights.qwen3_vl import load_qwen3_vl
from omnivideo.models.weights.sources import read_json, scan_sources
from tests.support.golden import golden_folder
from tests.support.published_folders import (
    CHECKPOINTS,
    publish_golden,
    publish_random,
    read_states,
    use_golden_sizes,
    write_pickle,
)

VERSION_1, VERSION_2, TWO_EXPERTS = CHECKPOINTS
MLLM_WIDTH = read_json(golden_folder() / "qwen3vl" / "config.json")["text_config"]["hidden_size"]
SCALES = {VERSION_2: 1.0, TWO_EXPERTS: 2.0}  # of the markers, so that each preset has its own

pytestmark = pytest.mark.golden


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """One folder with the downloads of all three presets, as `weights download PRESET -o files` makes it."""
    files = tmp_path / "files"
    use_golden_sizes(monkeypatch, VERSION_1)
    publish_golden(files / "OmniVideo11B" / "omni_ckpts", VERSION_1)
    for name, folder in ((VERSION_2, "OmniVideo2-1.3B"), (TWO_EXPERTS, "OmniVideo2-A14B")):
        publish_random(files / folder, use_golden_sizes(monkeypatch, name, mllm_width=MLLM_WIDTH))
        markers = {key: value * SCALES[name] for key, value in read_states("v2_side_files", "special_tokens/").items()}
        write_pickle(files / folder / "special_tokens.pkl", markers)
    shutil.copytree(golden_folder() / "qwen3vl", files / "Qwen3-VL-30B-A3B-Instruct")
    return files


def test_each_preset_gets_its_own_files_from_one_folder(downloads, tmp_path):
    """Also with an earlier import in the same folder, which is of another preset."""
    with pytest.raises(InvalidInput, match=f"has files of {VERSION_1} and {VERSION_2} and {TWO_EXPERTS}; choose one"):
        import_weights(downloads, tmp_path / "nothing")
    for name in (VERSION_1, TWO_EXPERTS):
        ours = downloads / f"ours-{name}"
        assert not import_weights(downloads, ours, name).missing_parts
        assert (ours / "mllm" / "llm").is_dir() == (name == VERSION_1)
        if name != VERSION_1:
            expected = read_states("v2_side_files", "special_tokens/")["<img_st>"] * SCALES[name]
            assert torch.equal(load_file(ours / "markers" / "model.safetensors")["img_st"], expected)


def test_the_markers_of_another_preset_are_not_taken(downloads, tmp_path):
    (downloads / "OmniVideo2-A14B" / "special_tokens.pkl").unlink()
    with pytest.raises(CheckpointError, match=r"missing from the source: special_tokens\.pkl"):
        import_weights(downloads, tmp_path / "ours", TWO_EXPERTS)
    # What was given apart from all weights belongs to none of them.
    (tmp_path / "apart").mkdir()
    shutil.move(downloads / "OmniVideo2-1.3B" / "special_tokens.pkl", tmp_path / "apart")
    assert not import_weights([downloads, tmp_path / "apart"], None, TWO_EXPERTS).missing_parts


@pytest.mark.parametrize("method", ["fp8", "gptq"])
def test_a_quantised_mllm_is_named(downloads, tmp_path, method):
    """The hub has such folders beside the ones that the presets were made with."""
    path = downloads / "Qwen3-VL-30B-A3B-Instruct" / "config.json"
    path.chmod(0o644)
    path.write_text(json.dumps(read_json(path) | {"quantization_config": {"quant_method": method}}))
    text = rf"mllm: its weights are quantised \({method}\); supported: weights in float32, float16 or bfloat16"
    with pytest.raises(CheckpointError, match=text):
        import_weights(downloads, tmp_path / "ours", VERSION_2)
    shutil.copytree(path.parent, tmp_path / "mllm")
    with pytest.raises(CheckpointError, match=text):
        load_qwen3_vl(tmp_path)


def test_an_empty_output_stays_the_same_folder(downloads, tmp_path):
    """It may be a volume, which cannot be replaced and is another disk than its parent."""
    volume = tmp_path / "volume"
    (volume / "lost+found").mkdir(parents=True)
    inode = volume.stat().st_ino
    written: list[str] = []

    def watch(file: str, count: int) -> None:
        written.extend(path.name for path in tmp_path.iterdir())
        assert not (volume / "model_index.json").exists()

    import_weights(downloads, volume, VERSION_1, watch)
    assert set(written) == {"files", "volume"} and volume.stat().st_ino == inode
    assert (volume / "model_index.json").is_file() and not (volume / ".partial").exists()
    with pytest.raises(InvalidInput, match="output: 'volume' already exists"):
        import_weights(downloads, volume, VERSION_1)


def test_a_folder_that_must_not_be_read_is_named():
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        for closed in ("lost+found", "closed"):
            os.mkdir(f"{name}/{closed}", 0o700)
        os.chmod(f"{name}/closed", 0o000)
        try:
            if user == 0:
                os.seteuid(65534)  # root may read everything
            with pytest.raises(CheckpointError, match=r"^'closed' in the source cannot be read: Permission denied$"):
                scan_sources([Path(name)])
        finally:
            os.seteuid(user)
            os.chmod(f"{name}/closed", 0o700)

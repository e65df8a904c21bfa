"""One digest of all weights: changed by every tensor, and not computed again at every start."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnivideo.errors import CheckpointError
from omnivideo.models.weights import digests
from omnivideo.models.weights.checkpoint import verify_digests
from omnivideo.models.weights.digests import RECORD_FILE, combine_digests, compute_folder_digest
from omnivideo.models.weights.importer import import_weights
from omnivideo.models.weights.shipped import read_index
from tests.support.published_folders import CHECKPOINTS, publish_golden, use_golden_sizes


@pytest.fixture
def folder(weights, tmp_path):
    shutil.copytree(weights, tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def record_all(monkeypatch):
    monkeypatch.setattr(digests, "RECORD_ABOVE_BYTES", 0)


def test_the_digest_is_that_of_the_index(folder):
    assert compute_folder_digest(folder).value == combine_digests(read_index(folder)["sha256"])
    assert not (folder / RECORD_FILE).exists()  # a small folder is simply read


@pytest.mark.parametrize("file", ["transformer/diffusion_pytorch_model.safetensors", "markers/model.safetensors"])
def test_a_changed_tensor_changes_the_digest(folder, file, record_all):
    before = compute_folder_digest(folder)
    state = load_file(folder / file)
    key = sorted(state)[-1]
    state[key] = state[key] + torch.ones_like(state[key])
    save_file(state, folder / file)
    assert compute_folder_digest(folder).value != before.value  # though the index is as it was
    with pytest.raises(CheckpointError, match="the weights folder 'weights' changed while it was loaded"):
        before.check_unchanged()


def test_a_large_folder_is_read_once(folder, record_all, monkeypatch):
    digest = compute_folder_digest(folder)
    read_files: list[str] = []
    compute = digests.compute_file_digest
    monkeypatch.setattr(digests, "compute_file_digest", lambda path: read_files.append(path.name) or compute(path))
    assert compute_folder_digest(folder) == digest and read_files == []
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.rename(path.with_suffix(".old"))
    shutil.copyfile(path.with_suffix(".old"), path)
    os.utime(path, ns=times)  # another file of the same size and age
    assert compute_folder_digest(folder).value == digest.value and read_files == [path.name]
    os.utime(path, ns=(times[0], times[1] + 1))
    assert compute_folder_digest(folder).value == digest.value and read_files == [path.name] * 2


@pytest.mark.parametrize("content", ["", "[]", '{"vae/diffusion_pytorch_model.safetensors": [1]}'])
def test_a_damaged_record_is_ignored(folder, record_all, content):
    digest = compute_folder_digest(folder)
    (folder / RECORD_FILE).write_text(content)
    assert compute_folder_digest(folder).value == digest.value
    assert len(json.loads((folder / RECORD_FILE).read_text())) == len(digest.stamps)


def test_the_record_of_a_folder_that_cannot_be_written_is_elsewhere(folder, record_all, tmp_path, monkeypatch):
    (folder / RECORD_FILE).mkdir()  # no file can replace it
    digest = compute_folder_digest(folder, tmp_path / "home")
    monkeypatch.setattr(digests, "compute_file_digest", lambda path: pytest.fail("it was read again"))
    assert compute_folder_digest(folder, tmp_path / "home") == digest
    assert not list(folder.glob(f"{RECORD_FILE}.*"))


def test_a_check_of_all_digests_records_them(folder, record_all, monkeypatch):
    verify_digests(folder)
    monkeypatch.setattr(digests, "compute_file_digest", lambda path: pytest.fail("it was read again"))
    assert compute_folder_digest(folder).value == combine_digests(read_index(folder)["sha256"])


@pytest.mark.golden
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_import_records_what_it_has_written_and_linked(name, record_all, monkeypatch, tmp_path):
    use_golden_sizes(monkeypatch, name)
    publish_golden(tmp_path / "published", name)
    import_weights(tmp_path / "published", tmp_path / "first", name, allow_missing=True)
    import_weights(tmp_path / "first", tmp_path / "linked", name, allow_missing=True)
    monkeypatch.setattr(digests, "compute_file_digest", lambda path: pytest.fail("it was read again"))
    values = {compute_folder_digest(tmp_path / folder).value for folder in ("first", "linked")}
    assert values == {combine_digests(read_index(tmp_path / "first")["sha256"])}

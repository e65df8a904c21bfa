"""Downloads from a stand-in for the hub: pinned, resumed, verified, and then imported. One process for each command."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from omnivideo.models.weights.importer import import_weights
from omnivideo.models.weights.repositories import REPOSITORIES
from omnivideo.models.weights.sources import list_required_parts
from omnivideo.presets import PRESETS
from tests.support.hub_server import COMMIT, Hub, serve_hub
from tests.support.published_folders import CHECKPOINTS, publish_golden, use_golden_sizes

ROOT = Path(__file__).parents[3]
PRESET = "omnivideo-1.3b"
AUTHORS, WAN = (repository.id for repository in REPOSITORIES[PRESET])


@pytest.fixture
def hub(tmp_path):
    """The repositories of version 1, with golden tensors."""
    hub = Hub(tmp_path / "hub")
    publish_golden(hub.folder / AUTHORS, PRESET)
    shutil.move(hub.folder / AUTHORS / "wan" / "wanxiang1_3b", hub.folder / WAN)
    (hub.folder / WAN / "diffusion_pytorch_model.safetensors").write_bytes(b"the decoder that nobody needs")
    hub.commits[WAN] = REPOSITORIES[PRESET][1].revision or ""
    return hub


def download(address: str, folder: Path, *options: str, preset: str = PRESET) -> tuple[int, str]:
    command = [sys.executable, "-m", "omnivideo.cli", "weights", "download", preset, "-o", str(folder), *options]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(folder.parent), "HF_ENDPOINT": address}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(command, env=env, cwd=folder.parent, capture_output=True, text=True, timeout=200)
    return completed.returncode, completed.stdout + completed.stderr


@pytest.mark.golden
def test_a_download_is_pinned_verified_and_can_be_imported(hub, tmp_path, monkeypatch):
    with serve_hub(hub) as address:
        code, text = download(address, tmp_path / "files")
        assert code == 0 and "complete; next: omnivideo weights import" in text, text
        record = json.loads((tmp_path / "files" / "download.json").read_text())
        assert record["revisions"] == {AUTHORS: COMMIT, WAN: hub.commits[WAN]}
        assert not (tmp_path / "files" / "Wan2.1-T2V-1.3B" / "diffusion_pytorch_model.safetensors").exists()
        # The authors push another commit: what was pinned stays, and nothing is fetched again.
        hub.requests.clear()
        assert download(address, tmp_path / "files")[0] == 0
        assert {path for _, path, _ in hub.requests} == {
            f"api/models/{AUTHORS}/revision/{COMMIT}",
            f"api/models/{WAN}/revision/{hub.commits[WAN]}",
        }
    use_golden_sizes(monkeypatch, PRESET)
    report = import_weights(tmp_path / "files", tmp_path / "ours")
    assert report.preset == PRESET and not report.missing_parts


@pytest.mark.golden
def test_an_interrupted_download_continues(hub, tmp_path):
    """huggingface_hub writes pieces of 10 MB, and continues after the last."""
    file = hub.folder / AUTHORS / "ar_model" / "checkpoint" / "large.bin"
    file.write_bytes(random.Random(0).randbytes(25_000_000))
    hub.cut_after[f"{AUTHORS}/ar_model/checkpoint/large.bin"] = 15_000_000
    with serve_hub(hub) as address:
        code, text = download(address, tmp_path / "files")
        if code:  # huggingface_hub itself continues some cut connections
            assert "repeat the command to continue" in text, text
            code, text = download(address, tmp_path / "files")
    assert code == 0, text
    ranges = [start for method, path, start in hub.requests if path.endswith("large.bin") and start and method == "GET"]
    assert len(ranges) == 1 and 10_000_000 <= int(ranges[0].removeprefix("bytes=").rstrip("-")) <= 15_000_000
    fetched = tmp_path / "files" / "OmniVideo11B" / file.relative_to(hub.folder / AUTHORS)
    assert fetched.read_bytes() == file.read_bytes()


@pytest.mark.golden
def test_a_damaged_file_is_removed_and_fetched_again(hub, tmp_path):
    names = {"transformer/model.pt": "a large file", "ar_model/checkpoint/config.json": "a small file"}
    with serve_hub(hub) as address:
        for name in names:
            hub.changed_bytes.add(f"{AUTHORS}/{name}")
            code, text = download(address, tmp_path / "files")
            assert code == 2 and f"OmniVideo11B/{name} is damaged: its checksum differs" in text, text
            assert not (tmp_path / "files" / "OmniVideo11B" / name).exists()
            hub.changed_bytes.clear()
        assert download(address, tmp_path / "files")[0] == 0


@pytest.mark.golden
@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("gated", f"{AUTHORS}: its licence must be accepted on its page on the hub"),
        ("gone", f"{WAN} is not on the hub, or needs `hf auth login`"),
        ("revision", f"{WAN}: the hub does not have the pinned revision any more"),
        ("file", f"{AUTHORS} has no file *special_tokens/tokens.pkl"),
        ("offline", "repeat the command to continue"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(problem, message, hub, tmp_path):
    if problem == "gated":
        hub.gated.add(AUTHORS)
    elif problem == "gone":
        shutil.rmtree(hub.folder / WAN)
    elif problem == "revision":
        hub.commits[WAN] = "d" * 40
    elif problem == "file":
        (hub.folder / AUTHORS / "special_tokens" / "tokens.pkl").unlink()
    with serve_hub(hub) as address:
        code, text = download("http://127.0.0.1:9" if problem == "offline" else address, tmp_path / "files")
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and message in errors[0] and "Traceback" not in text, text


def test_the_list_needs_no_network(tmp_path):
    code, text = download("http://127.0.0.1:9", tmp_path / "files", "--list")
    assert code == 0 and AUTHORS in text and "Apache-2.0" in text and not (tmp_path / "files").exists()
    code, text = download("http://127.0.0.1:9", tmp_path / "files", preset="tiny")
    assert code == 2 and "preset: 'tiny' is not published; allowed: omnivideo-1.3b" in text


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_repositories_hold_every_part(name):
    parts = set(list_required_parts(PRESETS[name]))
    assert parts <= {part for repository in REPOSITORIES[name] for part in repository.holds}

"""The script for a machine with a GPU, run on the CPU without a network."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import find_faults, find_visible_faults

ROOT = Path(__file__).parents[2]


def run_script(out: Path, *options: str) -> list[dict]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "HOME": str(out), "OMP_NUM_THREADS": "1"}
    # Nothing can be fetched: every proxy is a closed port.
    environment |= {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *options, "--out", str(out / "report")]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads((out / "report" / "report.json").read_text())


def test_the_dry_run_measures_every_placement(tmp_path):
    device, *rows = run_script(tmp_path, "--dry-run")
    assert device["device"] == "CPU"
    assert [row["variant"] for row in rows] == [
        "all in float32", "all on the GPU", "parts in turn", "decoder in blocks"
    ]  # fmt: skip
    errors = [row["latents_error"] for row in rows]
    # bf16 differs from float32, a little; where the parts are makes no difference.
    assert errors[0] == 0 and 0 < errors[1] < 5e-2 and errors[1:] == [errors[1]] * 3
    assert all(row["finite"] and row["seconds_per_step"] > 0 and row["faults"] == [] for row in rows)


@pytest.mark.parametrize(
    ("options", "python", "message"),
    [
        (("--wheels",), sys.executable, "--wheels needs a folder"),
        (("--wheels", "nowhere"), sys.executable, "--wheels: no omnivideo-*.whl in nowhere"),
        (("--weights",), sys.executable, "--weights needs a folder"),
        (("--weights", "nowhere"), sys.executable, "--weights: no model_index.json in nowhere"),
        (("--dry-run",), "nowhere/python", "nowhere/python: no such interpreter"),
    ],
)
def test_what_is_missing_ends_the_script_in_one_line(tmp_path, options, python, message):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *options]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": python, "HOME": str(tmp_path)}
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert completed.returncode != 0 and message in completed.stderr and len(completed.stderr.splitlines()) == 1


def test_a_machine_without_a_gpu_ends_the_script(tmp_path, monkeypatch):
    """The published shapes would take days on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.sh", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="no GPU is visible to torch"):
        gpu.main()
    assert not (tmp_path / "out").exists()


def test_faults_are_named():
    """What a machine with faulty kernels or weights would give."""
    exact, other = torch.ones(3), torch.tensor([1.0, 1.0, 1.5])
    assert find_faults({"finite": True}, 0.01, exact, exact) == []
    assert find_faults({"finite": False}, float("nan"), other, exact) == [
        "pixels are not finite", "latents differ from those in float32 by more than 0.05",
        "latents depend on where the parts are",
    ]  # fmt: skip
    still = np.random.default_rng(0).integers(0, 255, (1, 8, 8, 3)).repeat(2, axis=0)
    assert find_visible_faults(still) == ["no motion at all"] and find_visible_faults(still[:1]) == []
    assert find_visible_faults(np.full((2, 8, 8, 3), 127)) == ["plain surfaces"]


def test_given_weights_render_every_task(tmp_path):
    shipped = str(ROOT / "omnivideo" / "weights" / "tiny")
    _, placement, *clips = run_script(tmp_path, "--weights", shipped, "--device", "cpu", "--steps", "4")
    assert placement["placement"].startswith("CPU (")
    assert [clip["task"] for clip in clips] == ["text-to-image", "text-to-video", "image-editing", "video-editing"]
    assert all((tmp_path / "report" / clip["file"]).stat().st_size > 100 for clip in clips)
    assert all(clip["faults"] == [] and clip["expect"] and clip["seconds"] > 0 for clip in clips)

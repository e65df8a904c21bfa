"""The script for a machine with a GPU, run on the CPU without a network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert all(row["finite"] and row["seconds_per_step"] > 0 for row in rows)


@pytest.mark.parametrize("options", [("--wheels",), ("--weights",), ("--weights", "nowhere")])
def test_a_missing_folder_ends_the_script(tmp_path, options):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *options]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "HOME": str(tmp_path)}
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert completed.returncode != 0 and options[0] in completed.stderr and "Traceback" not in completed.stderr


def test_given_weights_render_every_task(tmp_path):
    shipped = str(ROOT / "omnivideo" / "weights" / "tiny")
    _, placement, *clips = run_script(tmp_path, "--weights", shipped, "--device", "cpu", "--steps", "4")
    assert placement["placement"].startswith("CPU (")
    assert [clip["task"] for clip in clips] == ["text-to-image", "text-to-video", "image-editing", "video-editing"]
    assert all((tmp_path / "report" / clip["file"]).stat().st_size > 100 for clip in clips)
    assert all(clip["looks_broken"] is None and clip["expect"] and clip["seconds"] > 0 for clip in clips)

"""`make release`: the wheel is installed in an empty environment, and generates a clip there."""

import json
import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(1800)
def test_the_wheel_generates_a_clip(tmp_path):
    checkout = tmp_path / "checkout"
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for name in files:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, checkout / name)
    venv.create(tmp_path / "tools", with_pip=True)
    python = tmp_path / "tools" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "build", "cyclonedx-bom"]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=600, check=False)
    if installed.returncode:
        pytest.skip(f"pip cannot install the release tools here: {installed.stderr.strip().splitlines()[-1]}")
    release = subprocess.run(
        ["bash", "deploy/release.sh"],
        cwd=checkout,
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert release.returncode == 0, release.stderr[-3000:]
    (bill,) = (checkout / "dist").glob("*.cdx.json")
    components = {component["name"].lower() for component in json.loads(bill.read_text())["components"]}
    assert {"torch", "diffusers", "pydantic"} <= components
    assert len(list((checkout / "dist").glob("omnivideo-*.tar.gz"))) == 1

"""The golden tests pass on another set in the same form: no test has a value of the authors' set built in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.golden, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[1]
# Those that start no server of vLLM.
TESTS = (
    "tests/models", "tests/media/test_golden_sources.py", "tests/backends/decoder/test_golden_sampling.py",
    "tests/backends/test_golden_service.py", "tests/backends/mllm/test_vila.py",
)  # fmt: skip


def test_another_set_passes(tmp_path):
    folder = tmp_path / "golden"
    command = [sys.executable, "-m", "tests.support.golden_variant", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    options = ["-q", "-n0", "-p", "no:cacheprovider", "-m", "golden and not long"]
    completed = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *TESTS], cwd=ROOT, capture_output=True, text=True, timeout=800,
        env=os.environ | {"OMNIVIDEO_GOLDEN": str(folder)}, check=False,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stdout[-6000:]

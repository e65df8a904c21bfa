"""What README.md says runs as written in a fresh clone, from `make demo` to the Python example, run twice.

The clone's environment has the packages of this one; installing them is tested in tests/deploy. Two lines are left out:
`make test` and the evaluation and training, which take hours.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1800)
ROOT = Path(__file__).parents[2]
LEFT_OUT = ("make test", "omnivideo evaluate", "omnivideo train")
TORCH = "torch==2.13.0"
LAUNCHER = "#!{python}\nfrom omnivideo.cli.main import main\n\nmain()\n"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("this is no git checkout; the README was not tested in a fresh clone")
    folder = tmp_path_factory.mktemp("fresh") / "omnivideo"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True, timeout=120)
    create_environment(folder)
    return folder


def create_environment(clone: Path) -> None:
    """Create the clone's .venv as deploy/setup.sh does, with this environment's packages in place of installed ones."""
    folder = clone / ".venv"
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_paths(vars={"base": str(folder)})["purelib"])
    (packages / "test.pth").write_text(f"{clone}\n{sysconfig.get_paths()['purelib']}\n")
    launcher = folder / "bin" / "omnivideo"
    launcher.write_text(LAUNCHER.format(python=folder / "bin" / "python"))
    launcher.chmod(0o755)
    made_for = f"{clone} {TORCH} "
    parts = [(clone / name).read_bytes() for name in ("pyproject.toml", "deploy/setup.sh")]
    digest = hashlib.sha256(b"".join([made_for.encode() + b"\n", *parts])).hexdigest()
    (folder / "base.stamp").write_text(f"{digest}  -\n")
    for name, text in (("made-by-setup", ""), ("whole", f"{made_for}\n")):
        (folder / name).write_text(text)


def read_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)


def run_script(clone: Path, script: str) -> str:
    """Run lines of a shell in the clone, as a person types them, and return what they print."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = kept | {"OMNIVIDEO_HOME": str(clone / "home"), "TORCH": TORCH, "PATH": os.defpath}
    completed = subprocess.run(
        ["bash", "-e", "-c", script], cwd=clone, env=environment, capture_output=True, text=True, timeout=1500,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert completed.returncode == 0, f"{completed.stdout}\n{completed.stderr[-4000:]}"
    return completed.stdout


def test_the_commands_of_the_readme_run_one_after_the_other(clone):
    first, use, *_ = read_blocks("bash")
    lines = [line for block in (first, use) for line in block.splitlines() if not line.startswith(LEFT_OUT)]
    assert len(lines) >= 7
    printed = run_script(clone, "\n".join(lines))
    assert "turns right, by the scorer" in printed and "2 of 2 done" in printed
    for name in ("out/demo/contact-sheet.png", "clip.mp4", "blue.mp4.json", "out/star.png"):
        assert (clone / name).exists(), name


def test_the_python_example_runs_twice(clone):
    (example,) = read_blocks("python")
    (clone / "example.py").write_text(example)
    script = "source .venv/bin/activate\npython example.py"
    kinds = [re.findall(r"^(plan|done)$", run_script(clone, script), flags=re.M) for _ in range(2)]
    assert kinds == [["plan", "done"]] * 2
    assert sys.version_info >= (3, 11) and (clone / "clip.mp4.json").exists()

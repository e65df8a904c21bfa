"""pyproject.toml, the pre-commit hooks and `make lint` agree, and the package is marked as typed."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_package_is_marked_as_typed():
    assert (ROOT / "omnivideo" / "py.typed").exists()
    assert PROJECT["tool"]["mypy"]["strict"] is True


def test_modules_with_relaxed_types_exist():
    """A module that has been renamed must not stay in the list."""
    (relaxed,) = [row for row in PROJECT["tool"]["mypy"]["overrides"] if "warn_return_any" in row] or [{"module": []}]
    for module in relaxed["module"]:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), module


def test_the_hooks_run_the_checks_of_make_lint():
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.M)
    assert lint
    checks = [line.strip() for line in lint[1].splitlines() if line.strip().startswith(".venv/bin/")]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]] == checks

"""Imports follow the rules of docs/architecture.md, in every module, and importing a module has no side effects."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from docs import import_graph

ROOT = Path(__file__).parents[1]
BASE = set(import_graph.BASE)
# package -> packages that it may import, besides itself and BASE
MAY_IMPORT = {
    "models": set(),
    "storage": set(),
    "media": set(),
    "synthetic": set(),
    "agent": set(),
    "backends": {"models", "storage", "media"},
    "training": {"models", "storage", "media", "synthetic"},
    "evaluation": {"models", "synthetic", "media"},
    "api": {"agent", "media"},
    "wiring": {"agent", "api", "backends", "media", "models", "storage"},
    "sdk": {"agent", "backends", "media", "models", "storage", "wiring"},
    "cli": {"agent", "api", "backends", "evaluation", "media", "models", "sdk", "storage", "synthetic", "training"}
    | {"wiring"},
    "omnivideo": {"sdk"},
    "__main__": {"cli"},
} | {name: set() for name in BASE}  # fmt: skip
# package -> distributions that it must not import
MUST_NOT_IMPORT = {
    "agent": {"torch", "numpy", "celery", "vllm", "diffusers", "transformers", "fastapi"},
    "api": {"torch", "numpy", "vllm", "diffusers", "transformers", "celery", "sqlalchemy", "minio"},
    "models": {"celery", "fastapi", "langgraph", "minio", "vllm"},
    "training": {"celery", "fastapi", "langgraph"},
    "synthetic": {"torch", "celery", "fastapi", "langgraph"},
    "storage": {"celery", "fastapi"},
    "media": {"torch", "celery", "fastapi"},
    "evaluation": {"celery", "fastapi", "langgraph"},
    "wiring": {"fastapi"},
}
# Imports that break a rule today: module -> {what it imports: why}. An entry that no longer applies fails the test, so
# this list can only shrink.
KNOWN_EXCEPTIONS: dict[str, dict[str, str]] = {}
MODULES = import_graph.find_modules()
GRAPH = import_graph.build_graph(MODULES)
HEAVY = {
    "torch",
    "vllm",
    "celery",
    "fastapi",
    "diffusers",
    "transformers",
    "deepspeed",
    "sqlalchemy",
    "langgraph",
    "av",
}


def top_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def find_violations(module: str) -> set[str]:
    """Return what a module imports against the rules: modules of ours and names of distributions."""
    top = top_of(module)
    allowed = MAY_IMPORT[top] | BASE | {top}
    ours = {target for target in GRAPH[module] if top_of(target) not in allowed}
    distributions = {name.split(".")[0] for name in import_graph.read_imports(MODULES[module])}
    if top in BASE:
        return ours | (distributions - set(sys.stdlib_module_names) - {"omnivideo", "pydantic", "pydantic_settings"})
    return ours | (distributions & MUST_NOT_IMPORT.get(top, set()))


def test_every_package_has_a_rule():
    assert {top_of(module) for module in MODULES} == MAY_IMPORT.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_rules(module):
    assert find_violations(module) == KNOWN_EXCEPTIONS.get(module, {}).keys()


def test_exceptions_name_modules_that_exist():
    assert KNOWN_EXCEPTIONS.keys() <= MODULES.keys()


def test_the_rules_allow_no_cycle():
    assert not import_graph.find_cycles(MAY_IMPORT)


def test_no_modules_import_each_other():
    """This includes imports inside functions and those for type checkers."""
    assert not import_graph.find_cycles(GRAPH)


def test_the_diagrams_are_up_to_date():
    for page in import_graph.PAGES:
        text = page.read_text()
        assert import_graph.MARKED.search(text), page
        assert text == import_graph.render_page(text), f"{page.name}: run python docs/import_graph.py"


def run_python(code: str, *arguments: str, cwd: Path, home: Path) -> str:
    command = [sys.executable, "-c", code, *arguments]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    completed = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert completed.returncode == 0, completed.stderr[-4000:]
    return completed.stdout


LIGHT = ["omnivideo", *(f"omnivideo.{name}" for name in sorted(BASE)), "omnivideo.cli.main"]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_loads_no_heavy_library(module, tmp_path):
    code = f"import sys, json, {module}; print(json.dumps([name for name in {sorted(HEAVY)} if name in sys.modules]))"
    assert json.loads(run_python(code, cwd=tmp_path, home=tmp_path)) == []


# Imports every module in turn. An audit hook reports what is done to the machine while one of our modules executes;
# what a third-party library does while it is imported is not ours.
WATCH_IMPORTS = """
import importlib, json, os, sys, threading

WATCHED = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.putenv", "os.unsetenv", "os.system", "os.exec",
           "os.fork", "subprocess.Popen", "socket.connect", "socket.bind", "signal.pthread_kill", "shutil.rmtree",
           "sqlite3.connect"}
effects = []

def owner():
    frame = sys._getframe(2)
    while frame and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    return frame.f_globals.get("__name__", "") if frame else ""

def watch(event, arguments):
    writes = event == "open" and set(arguments[1] or "") & set("wax+")
    if (event in WATCHED or writes) and owner().startswith("omnivideo"):
        effects.append([owner(), event, repr(arguments)[:200]])

sys.addaudithook(watch)
names, missing = sys.argv[1:], []
sys.argv = ["imported", "--unknown-option"]  # whoever parses the command line at import fails on this
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing.append([name, error.name])
import torch
if torch.cuda.is_available() and torch.cuda.is_initialized():
    effects.append(["", "cuda", ""])
targets = [getattr(thread, "_target", None) for thread in threading.enumerate()]
ours = [str(target) for target in targets if target and target.__module__.startswith("omnivideo")]
print(json.dumps({"effects": effects, "missing": missing, "threads": ours}))
"""
RUN_BY_ALEMBIC = {
    "omnivideo.storage.database.migrations.env"
}  # a script by Alembic's convention: it runs when imported
NEEDS_VLLM = "omnivideo.backends.mllm.vllm_plugin."


def test_importing_has_no_side_effects(tmp_path):
    home, folder = tmp_path / "home", tmp_path / "folder"
    home.mkdir(), folder.mkdir()
    names = [name for name in MODULES if name not in RUN_BY_ALEMBIC]
    report = json.loads(run_python(WATCH_IMPORTS, *names, cwd=folder, home=home).splitlines()[-1])
    assert report["effects"] == [] and report["threads"] == []
    assert not list(folder.iterdir())
    assert all(name.startswith(NEEDS_VLLM) and lacking == "vllm" for name, lacking in report["missing"]), report[
        "missing"
    ]

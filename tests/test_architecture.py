"""Imports point one way (the rule book: who may import whom)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "omnivideo"
FREE = {"contracts", "ports", "errors", "settings", "presets"}
MAY = {
    "contracts": set(),
    "errors": set(),
    "presets": set(),
    "ports": set(),
    "models": set(),
    "storage": set(),
    "media": set(),
    "synthetic": set(),
    "backends": {"media", "models", "storage"},
    "training": {"models", "storage", "synthetic"},
    "evaluation": {"media", "models", "synthetic", "training"},
    "agent": {"media"},
    "api": {"agent"},
    "sdk": {"agent", "backends", "media", "models", "storage", "wiring"},
}
NEVER = {
    "contracts": {"torch", "diffusers", "transformers"},
    "presets": {"torch", "diffusers", "transformers"},
    "errors": {"torch"},
    "models": {"celery", "fastapi", "langgraph", "minio", "vllm"},
    "training": {"celery", "fastapi", "langgraph"},
    "synthetic": {"celery", "fastapi", "langgraph"},
    "agent": {"torch", "numpy", "diffusers", "transformers", "celery", "fastapi"},
    "api": {"torch", "numpy", "celery", "sqlalchemy", "minio"},
    "ports": {"torch", "numpy"},
}
EXCEPTIONS = {"agent/conversations.py": {"numpy"}}  # it hands out frames; the planner itself knows no arrays
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0].removesuffix(".py") in MAY]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    rooms = {entry.name.removesuffix(".py") for entry in ROOT.iterdir()}
    seen = {name.split(".")[1] for name in imported(path) if name.startswith("omnivideo.")} & rooms
    assert seen <= MAY[room] | FREE | {room}
    never = NEVER.get(room, set()) - EXCEPTIONS.get(path.relative_to(ROOT).as_posix(), set())
    assert not {name.split(".")[0] for name in imported(path)} & never

"""The tiers: each pattern still matches a test, and the Makefile's selections leave no test out."""

import ast
import re
from pathlib import Path

import pytest

from tests.support import tiers

ROOT = Path(__file__).parents[1]


def list_node_ids() -> list[str]:
    """Return the id of every test function, without parameters, as read from the files."""
    node_ids = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                node_ids.append(f"{path.relative_to(ROOT)}::{node.name}")
    return node_ids


NODE_IDS = list_node_ids()


def test_every_pattern_matches_a_test():
    assert not tiers.find_unused_patterns(NODE_IDS)


@pytest.mark.parametrize(
    ("node_id", "marks"),
    [
        ("tests/backends/mllm/test_vllm.py::test_x[a]", ["long", "slow"]),
        ("tests/backends/test_published_service.py::test_a_chat_with_one_expert_survives_a_killed_worker[a]", ["slow"]),
        ("tests/gpu/test_decode.py::test_x", ["gpu"]),
        ("tests/clients/test_clients.py::test_x", ["clients"]),
        ("tests/deploy/stack/test_stack.py::test_x", ["deploy"]),
        ("tests/storage/test_jobs.py::test_x", []),
    ],
)
def test_marks_of_a_test(node_id, marks):
    assert tiers.list_tiers(node_id) == marks


def selects(expression: str, marks: list[str]) -> bool:
    """Evaluate a `-m` expression for a test with these marks."""
    names = set(re.findall(r"\w+", expression)) - {"not", "and", "or"}
    return bool(eval(expression, {"__builtins__": {}}, {name: name in marks for name in names}))


def test_every_test_is_in_a_tier():
    """`make test` and the other tiers select each test once; `make test-fast` selects a subset of `make test`."""
    makefile = (ROOT / "Makefile").read_text()
    chosen = dict(re.findall(r"^(\w+)_TIER := (.+)$", makefile, flags=re.M))
    assert chosen.keys() == {"FAST", "MAIN", "LONG", "CLIENTS", "GPU", "DEPLOY"}
    for node_id in NODE_IDS:
        marks = tiers.list_tiers(node_id)
        main_tiers = [name for name in ("MAIN", "LONG", "CLIENTS", "GPU", "DEPLOY") if selects(chosen[name], marks)]
        assert len(main_tiers) == 1, (node_id, main_tiers)
        assert not selects(chosen["FAST"], marks) or main_tiers == ["MAIN"]

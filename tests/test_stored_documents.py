"""Stored documents are read by one method, which ignores fields of later versions; those of clients are refused.

tests/deploy/test_versions.py runs a later version, which adds a field to every message, beside this one.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

import omnivideo.agent.mllm_plan
import omnivideo.backends.mllm.protocol
import omnivideo.records
import omnivideo.turns
from omnivideo.contracts import Artifact, FrozenModel, Job, resolve_sampling_params
from omnivideo.presets import TINY

PACKAGE = Path(omnivideo.__file__).parent
READERS = ("agent", "api", "backends", "sdk", "storage")
# What is built from fields that this process has chosen or checked, or that are columns of a table.
BUILT_HERE = {
    ("agent/thread.py", "TurnOptions"),  # a client's; those of a stored turn are read before
    ("backends/decoder/worker_report.py", "WorkerRecord"),
    ("backends/mllm/protocol.py", "TextSampling"),
    ("backends/mllm/remote.py", "WriteRequest"),
    ("storage/database/idempotency.py", "KeyClaim"),
    ("storage/database/job_rows.py", "JobStatus"),
}


def list_messages(base: type = FrozenModel) -> Iterator[type]:
    for message in base.__subclasses__():
        yield message
        yield from list_messages(message)


def test_every_message_refuses_unknown_fields_of_clients():
    assert {message.model_config["extra"] for message in list_messages()} == {"forbid"}
    with pytest.raises(ValidationError):
        omnivideo.turns.Action(text="a", added="1")


def test_fields_of_later_versions_are_ignored_at_every_level():
    params = resolve_sampling_params(TINY, "text-to-image", width=60, height=64)
    source = Artifact(key="a", medium="image", width=64, height=64, frames=1, fps=8, caption="", created_by="a")
    job = Job(id="a", prompt="a", visual_tokens=None, source=source, params=params)

    def add_field(document):
        return {name: add_field(value) for name, value in document.items()} | {"added": 1} if isinstance(
            document, dict
        ) else document  # fmt: skip

    assert params.delivery is not None and Job.parse_stored(add_field(job.model_dump())) == job


def find_unpacked_messages(tree: ast.AST, names: set[str]) -> set[str]:
    """Return the messages that are built from a mapping, as in `Artifact(**fields)`."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return {call.func.id for call in calls if any(keyword.arg is None for keyword in call.keywords)} & names


def test_stored_documents_are_read_by_one_method():
    names = {message.__name__ for message in list_messages()}
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for folder in READERS
        for path in (PACKAGE / folder).rglob("*.py")
        for name in find_unpacked_messages(ast.parse(path.read_text()), names)
    }
    assert found == BUILT_HERE, "use parse_stored for what another version may have written"

"""The plan of a turn as an MLLM writes it: a JSON array of actions, each with the artifact that it refers to.

The prompt in prompts/instructions/plan.md requests it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from omnivideo.contracts import Artifact


@dataclass(frozen=True)
class PlannedAction:
    """One action of a plan. `reference` is "new", "last", "unclear", or the number of an artifact, from 1."""

    text: str
    reference: str


def build_plan_request(text: str, artifacts: Sequence[Artifact]) -> str:
    lines = (f"{number}. {artifact.medium}: {artifact.caption}" for number, artifact in enumerate(artifacts, start=1))
    return f"Made so far:\n{chr(10).join(lines) or 'nothing'}\n\nThe user says: {text}"


def parse_plan(answer: str, num_artifacts: int) -> list[PlannedAction]:
    """Return the plan in the MLLM's answer, or an empty list if there is no valid one."""
    start, end = answer.find("["), answer.rfind("]")
    try:
        entries = json.loads(answer[start : end + 1])
        actions = [PlannedAction(str(entry["do"]).strip(), str(entry["about"])) for entry in entries]
    except (ValueError, TypeError, KeyError):
        return []
    allowed_references = {"new", "last", "unclear", *map(str, range(1, num_artifacts + 1))}
    is_valid = all(action.text and action.reference in allowed_references for action in actions)
    return actions if is_valid else []

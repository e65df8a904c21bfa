"""The plan of a turn as an MLLM writes it: JSON of a fixed schema, which the engine enforces token by token.

The prompt in prompts/instructions/plan.md requests it. A plan can be cut off only at the limit of an answer's length;
its complete actions are used then.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from omnivideo.contracts import Artifact, FrozenModel
from omnivideo.turns import CommandName, ExecutedCommand

MAX_ACTIONS = 8
MAX_JOINED_CLIPS = 8
MAX_LISTED_ARTIFACTS = 32  # the newest ones, so that the prompt of a long conversation stays short
ActionText = Annotated[str, Field(min_length=1, max_length=300)]
NEW: Literal["new"] = "new"
LAST, UNCLEAR = "last", "unclear"
CURRENT = "current"  # only in plans by words: what "it" refers to


class PlannedGeneration(FrozenModel):
    """Make something new."""

    action: Literal["generate"]
    do: ActionText
    about: Literal["new"]


class PlannedEdit(FrozenModel):
    """WordedChange what `about` names: the number of an artifact, from 1, "last" or "unclear"."""

    action: Literal["edit"]
    do: ActionText
    about: str


class PlannedJoin(FrozenModel):
    """Make one clip of `clips`, the numbers of artifacts, in this order."""

    action: Literal["join"]
    do: ActionText
    clips: tuple[int, ...] = Field(min_length=2, max_length=MAX_JOINED_CLIPS)

    @property
    def about(self) -> str:
        return str(self.clips[0])


class PlannedAnswer(FrozenModel):
    """Answer in words, about an artifact or, with "new", about nothing that was made."""

    action: Literal["understand"]
    do: ActionText
    about: str


class PlannedQuestion(FrozenModel):
    """Ask the user `say` before anything else is done about `do`."""

    action: Literal["ask"]
    do: ActionText
    about: str
    say: ActionText


class PlannedRefusal(FrozenModel):
    """Do nothing about `do`, and tell the user `say`."""

    action: Literal["decline"]
    do: ActionText
    say: ActionText

    @property
    def about(self) -> str:
        return NEW


class PlannedCommand(FrozenModel):
    """Do `command` to the conversation; the other fields are its arguments, null where it has none."""

    action: Literal["command"]
    do: ActionText
    command: CommandName
    which: Annotated[int, Field(ge=1)] | None = None
    count: Annotated[int, Field(ge=1)] | None = None
    format: Annotated[str, Field(max_length=8)] | None = None
    file: Annotated[str, Field(max_length=100)] | None = None

    @property
    def about(self) -> str:
        return NEW

    def to_command(self) -> ExecutedCommand:
        arguments = {"which": self.which, "count": self.count, "format": self.format, "file": self.file}
        given = {name: value for name, value in arguments.items() if value is not None}
        return ExecutedCommand.model_validate({"name": self.command, "arguments": given})


PlannedAction = (
    PlannedGeneration | PlannedEdit | PlannedJoin | PlannedAnswer | PlannedQuestion | PlannedRefusal | PlannedCommand
)
ACTION_ADAPTER: TypeAdapter[PlannedAction] = TypeAdapter(PlannedAction)


class TurnPlan(FrozenModel):
    """The actions of a turn, in order."""

    actions: tuple[PlannedAction, ...] = Field(min_length=1, max_length=MAX_ACTIONS)


def list_references(num_artifacts: int) -> list[str]:
    """Return what an action can refer to: nothing, what the turn itself has just made, or one of the artifacts."""
    return [NEW, LAST, *([UNCLEAR] if num_artifacts else []), *map(str, list_numbers(num_artifacts))]


def list_numbers(num_artifacts: int) -> list[int]:
    """Return the numbers of the artifacts that the prompt lists."""
    return list(range(max(1, num_artifacts - MAX_LISTED_ARTIFACTS + 1), num_artifacts + 1))


def build_plan_schema(num_artifacts: int) -> str:
    """Return the JSON schema of a plan in a thread with this many artifacts; only its references are allowed."""
    schema: dict[str, Any] = TurnPlan.model_json_schema()
    schema["properties"]["actions"].pop("default", None)
    if num_artifacts < 2:  # nothing can be joined
        choices = schema["properties"]["actions"]["items"]["anyOf"]
        choices.remove({"$ref": "#/$defs/PlannedJoin"})
        del schema["$defs"]["PlannedJoin"]
    references = list_references(num_artifacts)
    for name, definition in schema["$defs"].items():
        definition.pop("description", None)
        if about := definition["properties"].get("about"):
            allowed = references[1:] if name == "PlannedEdit" else references
            definition["properties"]["about"] = {"enum": [NEW]} if "const" in about else {"enum": allowed}
        if clips := definition["properties"].get("clips"):
            clips["items"] = {"enum": list_numbers(num_artifacts)}
    schema.pop("description", None)
    return json.dumps(schema)


def build_plan_request(text: str, artifacts: Sequence[Artifact]) -> str:
    listed = artifacts[-MAX_LISTED_ARTIFACTS:]
    numbered = enumerate(listed, start=len(artifacts) - len(listed) + 1)
    lines = (f"{number}. {artifact.medium}: {artifact.caption}" for number, artifact in numbered)
    return f"Made so far:\n{chr(10).join(lines) or 'nothing'}\n\nThe user says: {text}"


def parse_plan(answer: str, num_artifacts: int) -> list[PlannedAction]:
    """Return the complete actions of a plan up to the first invalid one; none if the answer is no plan."""
    try:
        document = from_json(answer, allow_partial=True)
        entries = document["actions"]
    except (ValueError, TypeError, KeyError):
        return []
    allowed, actions = list_references(num_artifacts), []
    for entry in entries if isinstance(entries, list) else ():
        try:
            action = ACTION_ADAPTER.validate_python(entry)
        except ValidationError:
            break
        references = map(str, action.clips) if isinstance(action, PlannedJoin) else (action.about,)
        if not set(references) <= set(allowed) or not action.do.strip():
            break
        actions.append(action)
    return actions[:MAX_ACTIONS]

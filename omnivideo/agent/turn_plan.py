"""The actions of a turn as the planner's state keeps them: planned by the MLLM, or read from the words.

`action_texts`, `action_references`, `action_goals`, `action_messages` and `action_details` are lists with an entry for
each action. A detail is a dictionary: the `medium` of the result if it is certain, a `command`, a `fact` that is asked
for, a `seed_offset` of a variation, and the `task` of a clip that begins with given frames, with the number of the
picture that is its `last_frame`, or the `seconds` that are added. `joined` are the numbers of clips that become one.
"""

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from omnivideo.agent import english_rules, mllm_plan
from omnivideo.agent.commands import find_command
from omnivideo.agent.mllm_plan import (
    CURRENT,
    LAST,
    NEW,
    PlannedCommand,
    PlannedJoin,
    build_plan_request,
    build_plan_schema,
    parse_plan,
)
from omnivideo.agent.planner_prompts import Prompts
from omnivideo.agent.references import ReferenceSearch, StoredArtifacts
from omnivideo.agent.small_world.readings import Context, Reading
from omnivideo.agent.small_world.turn_reading import read_turn
from omnivideo.agent.state import PlannerState
from omnivideo.contracts import Artifact, MLLMRequest
from omnivideo.ports import MLLM
from omnivideo.presets import Preset
from omnivideo.turns import TurnOptions

# What an English command is to a preset that plans; the others depend on the conversation, and its MLLM plans them.
COMMANDS_FOR_EVERY_PRESET = ("undo", "restart", "help", "recap", "list", "save", "export")

AGREEMENT = re.compile(
    r"^\s*(?:yes|yeah|yep|sure|ok(?:ay)?|fine|please|go ahead|do (?:it|that|so)|all ?right|the first)\b", re.IGNORECASE
)
# Reading a long text takes up to 0.1 s, in which no other Python code runs. Of many such texts, one is read at a time:
# every request would otherwise wait for all of them at each of its steps.
MAX_SHORT_CHARS = 300
LONG_TEXT_LOCK = threading.Lock()


@contextmanager
def wait_to_read(text: str) -> Iterator[None]:
    """Wait until no other long text is read; a short one is read at once."""
    if len(text) <= MAX_SHORT_CHARS:
        yield
        return
    with LONG_TEXT_LOCK:
        yield


@contextmanager
def pause_reading(text: str) -> Iterator[None]:
    """Let others read while the reader of a text waits for the MLLM."""
    if len(text) <= MAX_SHORT_CHARS:
        yield
        return
    LONG_TEXT_LOCK.release()
    try:
        yield
    finally:
        LONG_TEXT_LOCK.acquire()


@dataclass(frozen=True)
class PlannedAction:
    """One action of a turn. What the plan does not say is ""."""

    text: str
    reference: str = ""
    goal: str = ""
    message: str = ""
    details: dict[str, Any] = field(default_factory=dict)


ACTIONS_ADAPTER = TypeAdapter(list[PlannedAction])  # reads those that a checkpoint holds


def to_state(actions: Sequence[PlannedAction]) -> dict[str, Any]:
    """Return the entries of the planner's state for the actions."""
    return {
        "action_texts": [action.text for action in actions],
        "action_references": [action.reference for action in actions],
        "action_goals": [action.goal for action in actions],
        "action_messages": [action.message for action in actions],
        "action_details": [action.details for action in actions],
    }


def splice_actions(state: PlannerState, first: int, last: int, actions: Sequence[PlannedAction]) -> dict[str, Any]:
    """Return the entries of the state in which the actions replace those from `first` up to `last`."""
    size, updates = len(state["action_texts"]), {}
    for key, values in to_state(actions).items():
        old = list(state.get(key) or [{} if key == "action_details" else ""] * size)  # type: ignore[call-overload]
        updates[key] = [*old[:first], *values, *old[last:]]
    return updates


def get_details(state: PlannerState) -> Mapping[str, Any]:
    """Return the details of the current action; none if the turn began before there were any."""
    details = state.get("action_details")
    return details[state["action_index"]] if details else {}


def reads_words(preset: Preset) -> bool:
    """Return whether requests are read by the words of a small world, which are in the preset's folder of prompts."""
    return preset.prompts == "keywords" and not preset.mllm.can_plan


def plan_turn(
    mllm: MLLM, preset: Preset, prompts: Prompts, state: PlannerState, text: str, descriptions: dict[str, str]
) -> list[PlannedAction]:
    """Return the actions of a text: as an MLLM that can plan writes them, or as the words say.

    `descriptions` receives the MLLM's descriptions of the artifacts that it had to look at.
    """
    artifacts = StoredArtifacts([*state.get("artifacts", []), *state["attachments"]])
    if prompts.plan is not None:
        system = prompts.add_background(prompts.plan, TurnOptions.parse_stored(state["options"]).background)
        return plan_by_mllm(text, artifacts, mllm, system or prompts.plan)
    if not reads_words(preset):
        with wait_to_read(text):
            return [PlannedAction(action) for action in english_rules.split_actions(text)]
    search = ReferenceSearch(mllm, prompts.describe, artifacts, descriptions)
    key = state["attachments"][-1]["key"] if state["attachments"] else state.get("current_key")
    current = artifacts.find_last(key)

    def describe_current() -> str:
        with pause_reading(text):
            return search.describe_artifact(current) if current else ""

    context = Context(
        preset,
        artifacts,
        current.medium if current else None,
        state["turns"][-1]["text"] if state["turns"] else "",
        artifacts.find_number(current.key) if current else 0,
        describe_current,
    )
    with wait_to_read(text):
        actions = [action_from_reading(reading) for reading in read_turn(text, context)]
    return repeat_question_for_attachments(actions, len(artifacts), len(state["attachments"]))


def repeat_question_for_attachments(
    actions: list[PlannedAction], num_artifacts: int, num_attachments: int
) -> list[PlannedAction]:
    """Return the actions, with a question about what is attached once for each attachment: the MLLM sees one at a time.

    The attachments are the last of the artifacts.
    """
    if num_attachments < 2 or not actions or (actions[0].goal, actions[0].reference) != ("understand", CURRENT):
        return actions
    numbers = range(num_artifacts - num_attachments + 1, num_artifacts + 1)
    return [replace(actions[0], reference=str(number)) for number in numbers] + actions[1:]


def action_from_reading(reading: Reading) -> PlannedAction:
    goal = reading.goal if reading.kind in ("do", "say", "fact") else reading.kind
    details: dict[str, Any] = {"medium": reading.medium} if reading.medium else {}
    if reading.command is not None:
        details["command"] = reading.command.model_dump()
    if reading.kind == "say":
        return PlannedAction(reading.text, reading.reference, goal, "", details | {"say": reading.message})
    if reading.fact is not None:
        details["fact"] = reading.fact
    if reading.task is not None:
        details["task"] = reading.task
    if reading.last_frame:
        details["last_frame"] = reading.last_frame
    if reading.joined:
        details["joined"] = list(reading.joined)
    if reading.seconds:
        details["seconds"] = reading.seconds
    return PlannedAction(reading.text, reading.reference, goal, reading.message, details)


def plan_by_mllm(text: str, artifacts: Sequence[Artifact], mllm: MLLM, prompt: str) -> list[PlannedAction]:
    """Return the MLLM's plan of a turn; a command in plain English needs none.

    The plan is valid unless it is cut off before the first action is complete; the turn is then one action about the
    last artifact.
    """
    command = find_command(text, artifacts, is_strict=True)
    if command is not None and command.name in COMMANDS_FOR_EVERY_PRESET:
        return [PlannedAction(text, goal="command", details={"command": command.model_dump()})]
    request = MLLMRequest(
        text=build_plan_request(text, artifacts), system=prompt, json_schema=build_plan_schema(len(artifacts))
    )
    planned_actions = parse_plan("".join(mllm.stream_text(request)), len(artifacts))
    if not planned_actions:
        return [PlannedAction(text, LAST if artifacts else NEW)]
    return list(map(convert_planned_action, planned_actions))


def convert_planned_action(action: mllm_plan.PlannedAction) -> PlannedAction:
    """Return an action of the MLLM's plan as the planner's state keeps it."""
    goal: str = action.action
    details: dict[str, Any] = {}
    if isinstance(action, PlannedCommand):
        details = {"command": action.to_command().model_dump()}
    elif isinstance(action, PlannedJoin):
        goal, details = "edit", {"joined": list(action.clips), "medium": "video"}
    return PlannedAction(action.do.strip(), action.about, goal, getattr(action, "say", ""), details)


def build_limit_question(num_generations: int, max_generations: int) -> str:
    return (
        f"That would be {num_generations} pictures and clips. I make at most {max_generations} at a time. "
        f"Shall I make the first {max_generations}? If not, what should I make?"
    )


def is_agreement(reply: str) -> bool:
    """Return whether the user agrees to the first actions, instead of saying what to do."""
    return AGREEMENT.match(reply) is not None


def keep_first_generations(
    actions: list[PlannedAction], renders: list[bool], max_generations: int
) -> list[PlannedAction]:
    """Return the actions up to the first one that would exceed the limit. `renders` says which render something."""
    kept, num_generations = list[PlannedAction](), 0
    for action, does_render in zip(actions, renders, strict=True):
        num_generations += does_render
        if num_generations <= max_generations:
            kept.append(action)
    return kept

"""What a thread's checkpoint holds: plain JSON, so that any saver can keep it and a later version can read it."""

import operator
from typing import Annotated, Any, TypedDict


class PlannerState(TypedDict, total=False):
    # The conversation so far.
    seed: int  # of the thread; every clip's seed follows from it
    turns: Annotated[list[dict[str, Any]], operator.add]  # contracts.Turn
    artifacts: Annotated[list[dict[str, Any]], operator.add]  # contracts.Artifact, in the order of their making
    current_key: str | None  # the key of what "it" is
    descriptions: dict[str, str]  # what the model sees on an artifact, where it was asked
    # The turn that runs.
    text: str
    attachments: list[dict[str, Any]]
    options: dict[str, Any]  # contracts.TurnOptions
    action_texts: list[str]  # the acts' words
    action_references: list[str]  # what each is about, where the model has planned it
    action_index: int  # the act that runs
    clarifications: list[tuple[str, str]]
    results: list[dict[str, Any]]  # contracts.ActionResult
    # The act that runs.
    action: dict[str, Any]  # contracts.Action
    action_done: bool  # whether it is done with
    detected_route: dict[str, Any]  # contracts.Route
    trace: dict[str, Any] | None  # contracts.ThinkTrace
    statement: str | None  # what the check asks about
    candidates: list[dict[str, Any]]  # contracts.Candidate
    failed_turns: int  # turns of this thread that failed

"""The state in a thread's checkpoint: plain JSON, which any checkpointer can store and a later version can read.

A rename needs a conversion of the stored checkpoints: storage/checkpoint_upgrade.py.
"""

import operator
from typing import Annotated, Any, TypedDict


class PlannerState(TypedDict, total=False):
    # The conversation so far.
    seed: int  # of the thread; every clip's seed is derived from it
    turns: Annotated[list[dict[str, Any]], operator.add]  # turns.Turn
    artifacts: Annotated[list[dict[str, Any]], operator.add]  # contracts.Artifact, in order of creation
    current_key: str | None  # the artifact that "it" refers to
    descriptions: dict[str, str]  # the MLLM's descriptions of artifacts, by key
    # The current turn.
    text: str
    attachments: list[dict[str, Any]]
    options: dict[str, Any]  # turns.TurnOptions
    action_texts: list[str]  # the text of each action
    action_references: list[str]  # what each action refers to according to the MLLM's plan, or ""
    action_details: list[dict[str, Any]]  # agent.turn_plan; absent in turns of older versions
    action_goals: list[str]  # turns.Goal or "ask" according to the plan, or ""; absent in turns of older versions
    action_messages: list[str]  # what the plan tells or asks the user instead of doing an action, or ""
    action_index: int  # of the current action
    limit_question: str  # about a turn that asks for too much, or ""
    limit_reply: str  # what to do instead, or ""
    limited_actions: list[dict[str, Any]]  # what remains of such a turn if the user agrees
    clarifications: list[tuple[str, str]]
    results: list[dict[str, Any]]  # turns.ActionResult
    # The current action.
    reference: dict[str, Any]  # the key of the artifact that it refers to, and the question to ask first
    action: dict[str, Any]  # turns.Action
    action_done: bool  # whether it is complete
    detected_route: dict[str, Any]  # contracts.Route
    trace: dict[str, Any] | None  # turns.ThinkTrace
    message: str  # what the user is told or asked instead of a result, or ""
    statement: str | None  # what the check asks the MLLM about
    candidates: list[dict[str, Any]]  # turns.Candidate
    failed_turns: int  # turns of this thread that failed

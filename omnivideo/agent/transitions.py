"""The edges of the planner's graph: which node follows, and how an action is closed."""

from typing import Any, Literal

from omnivideo.agent.state import PlannerState
from omnivideo.turns import ActionResult

# The names of the nodes are part of every stored checkpoint: a turn that waits for a reply resumes by these names. This
# node's name is older than its method's name.
REFERENCE_NODE = "refer"
GOALS_WITHOUT_SOURCE = ("ask", "decline", "command")


def close_action(state: PlannerState, result: ActionResult) -> dict[str, Any]:
    return {
        "results": [*state["results"], result.model_dump()],
        "action_index": state["action_index"] + 1,
        "action_done": True,
    }


def choose_next_node(state: PlannerState) -> str:
    return REFERENCE_NODE if state["action_index"] < len(state["action_texts"]) else "answer"


def get_planned(state: PlannerState, key: Literal["action_goals", "action_messages"]) -> str:
    """Return what the plan says of the current action; "" if there is no plan, or the turn began before there were."""
    values = state.get(key)
    return values[state["action_index"]] if values else ""


def choose_node_after_reference(state: PlannerState) -> str:
    """Return the node after a resolved reference; an action that only returns to an artifact is already done."""
    if state["action_done"]:
        return choose_next_node(state)
    goal = get_planned(state, "action_goals")
    return goal if goal in GOALS_WITHOUT_SOURCE else "think"


def choose_goal_node(state: PlannerState) -> str:
    kind = state["detected_route"]["kind"]
    if kind == "ask":
        return "ask"
    if state.get("message"):
        return "decline"
    if kind == "text":
        return "understand"
    return "edit" if state["action"]["source"] else "generate"


def choose_node_after_check(state: PlannerState) -> str:
    """Return the node that renders the next candidate, or the node of the next action if this one is done."""
    return choose_next_node(state) if state["action_done"] else choose_goal_node(state)

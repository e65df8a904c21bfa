"""The limit on what one turn may generate: a turn that asks for more is asked about first."""

import re
from collections.abc import Callable

from langgraph.types import interrupt

from omnivideo.agent.turn_plan import PlannedAction

AGREEMENT = re.compile(
    r"^\s*(?:yes|yeah|yep|sure|ok(?:ay)?|fine|please|go ahead|do (?:it|that|so)|all ?right|the first)\b", re.IGNORECASE
)
Clarifications = list[tuple[str, str]]


def limit_generations(
    text: str,
    plan: Callable[[str], list[PlannedAction]],
    is_generation: Callable[[PlannedAction], bool],
    max_generations: int,
) -> tuple[list[PlannedAction], Clarifications]:
    """Return the planned actions of a turn with at most `max_generations` to render, and the question asked about it.

    The user agrees to the first ones, or says what to do instead, which is planned too.
    """
    actions = plan(text)
    num_generations = count_generations(actions, is_generation, max_generations)
    if num_generations <= max_generations:
        return actions, []
    question = (
        f"That would be {num_generations} pictures and clips. I make at most {max_generations} at a time. "
        f"Shall I make the first {max_generations}? If not, what should I make?"
    )
    reply = str(interrupt(question))
    chosen = actions if AGREEMENT.match(reply) else plan(reply)
    return keep_first_generations(chosen, is_generation, max_generations), [(question, reply)]


def count_generations(
    actions: list[PlannedAction], is_generation: Callable[[PlannedAction], bool], max_generations: int
) -> int:
    """Return how many actions render something; few actions are not looked at, because they are within the limit."""
    return sum(map(is_generation, actions)) if len(actions) > max_generations else 0


def keep_first_generations(
    actions: list[PlannedAction], is_generation: Callable[[PlannedAction], bool], max_generations: int
) -> list[PlannedAction]:
    kept, num_generations = list[PlannedAction](), 0
    for action in actions:
        num_generations += len(actions) > max_generations and is_generation(action)
        if num_generations <= max_generations:
            kept.append(action)
    return kept

"""The limit on what one turn may generate: a turn that asks for more is asked about first."""

import re

from omnivideo.agent.turn_plan import PlannedAction

AGREEMENT = re.compile(
    r"^\s*(?:yes|yeah|yep|sure|ok(?:ay)?|fine|please|go ahead|do (?:it|that|so)|all ?right|the first)\b", re.IGNORECASE
)


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

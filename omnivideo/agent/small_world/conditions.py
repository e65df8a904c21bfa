"""Requests under a condition: "if it is red, make it blue" is a request where a red object is seen."""

from omnivideo.agent.small_world.facts import is_included
from omnivideo.agent.small_world.lexicon import normalize_text, tokenize
from omnivideo.agent.small_world.readings import Context
from omnivideo.agent.small_world.scenes import DescribedScene, read_scene
from omnivideo.agent.small_world.wordings import load_pattern

NEGATIONS = ("not", "no")


def resolve_condition(text: str, context: Context) -> tuple[str, str]:
    """Return what a text about a result asks for if its condition holds, and otherwise a question.

    A text without a condition, or with one about something else than what is seen, is returned as it is.
    """
    normalized = normalize_text(text).strip(" .!")
    match = load_pattern("condition").fullmatch(normalized) or load_pattern("condition_at_end").fullmatch(normalized)
    if match is None:
        return text, ""
    description = context.describe()
    is_met = check_claim(match["claim"], read_scene(tokenize(description)))
    if is_met is None:
        return text, ""
    request, _, alternative = load_pattern("otherwise").pattern.sub("\n", match["request"]).partition("\n")
    chosen = request if is_met != (match["word"] == "unless") else alternative
    chosen = chosen.strip(" ,;.")
    return chosen, "" if chosen else f"I see {description}, so I have changed nothing. What should I change?"


def check_claim(claim: str, scene: DescribedScene) -> bool | None:
    """Return whether a scene is as a claim says, such as "it is red" or "there is no star"; None if that is unclear."""
    tokens = [token for token in tokenize(claim) if token.text not in NEGATIONS]
    is_negated = any(token.text in NEGATIONS for token in tokenize(claim))
    if not scene.objects or any(not token.is_known for token in tokens):
        return None
    claimed = read_scene(tokens)
    values = [obj for obj in claimed.objects if obj.shape or obj.colour or obj.motion]
    if len(values) + (claimed.background is not None) != 1:
        return None
    if claimed.background:
        is_met = claimed.background == scene.background
    else:
        alike = [obj for obj in scene.objects if values[0].motion in (None, obj.motion)]
        is_met = any(is_included(values[0], obj) for obj in alike)
    return is_met != is_negated

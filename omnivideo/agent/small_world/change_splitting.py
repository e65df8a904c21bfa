"""Split a turn into the changes of what is seen: of several results, of what has a colour, of all but one object."""

import re
from collections.abc import Sequence

from omnivideo.agent import english_rules
from omnivideo.agent.small_world.lexicon import Token, normalize_text, tokenize
from omnivideo.agent.small_world.readings import Context
from omnivideo.agent.small_world.referring import list_object_names, name_object
from omnivideo.agent.small_world.scenes import read_scene
from omnivideo.agent.small_world.wordings import load_pattern

MAX_LEAD_TOKENS = 4
ITEM_FILLERS = ("to", "should be", "becomes", "become", "is", "now", "turns", "goes", "in", "into", "a", "only")
REMAINING = ("stays", "unchanged", "same", "the same", "stay", "keep", "remains", "as", "as it", "stays as it")
REMOVED = ("gone", "out", "away", "off", "removed", "remove", "delete")
MAX_CHANGED_RESULTS = 4  # by one "both" or "all"


def split_changes(text: str, context: Context) -> list[str]:
    """Return the changes of a text that names what is seen, such as "keep only the star"; [] for other texts."""
    normalized = normalize_text(text).strip(" .!?")
    if parts := split_by_results(normalized, context):
        return parts
    if match := load_pattern("gapped_results").fullmatch(normalized):  # "make the first one green and the second red"
        noun = "" if re.match(r" (?:one|picture|image|clip|video)\b", match["rest"]) else " one"
        return [match["lead"] + match["first"], f"{match['lead']}{match['second']}{noun}{match['rest']}"]
    if context.number > 1 and (match := load_pattern("restored").fullmatch(normalized)):
        return ["undo", match["rest"]]
    if match := load_pattern("undone_first").fullmatch(normalized):
        return ["undo", f"make it {match['value']}"]
    if match := load_pattern("exchanged_colour").fullmatch(normalized):
        return exchange_colours(match[1], match[2], context)
    if match := load_pattern("kept_object").fullmatch(normalized):
        kept = {obj.shape for obj in read_scene(tokenize(match[1])).objects}
        names = list_object_names(context)
        others = [name for name in names if not kept & {obj.shape for obj in read_scene(tokenize(name)).objects}]
        return [f"remove {name}" for name in others] if len(others) < len(names) else []
    return split_bare_changes(text, context)


def split_by_results(normalized: str, context: Context) -> list[str]:
    """Return a change of each result for "make both of them green", if the current one shows a single object."""
    match, number = load_pattern("both_results").search(normalized), len(context.artifacts)
    tokens = tokenize(normalized)
    is_change = any(token.has("colour", "ground", "shape") for token in tokens) and not any(
        token.has("task", "impossible", "add", "remove", "swap") for token in tokens
    )
    if not (match and is_change and 2 <= number <= MAX_CHANGED_RESULTS):
        return []
    if read_scene(tokenize(context.describe())).count > 1:
        return []
    ordinals = list(english_rules.ORDINAL_INDEX)[:number]
    return [f"{normalized[: match.start()]}the {ordinal} one{normalized[match.end() :]}" for ordinal in ordinals]


def exchange_colours(old: str, new: str, context: Context) -> list[str]:
    """Return the change of what has the old colour."""
    tokens = [*tokenize(old), *tokenize(new)]
    if not all(token.has("colour") for token in tokens):
        return []
    scene, colour = read_scene(tokenize(context.describe())), tokens[0].get("colour")
    if scene.background == colour:
        return [f"change the background to {new}"]
    return [f"make {name_object(obj, scene.objects)} {new}" for obj in scene.objects if obj.colour == colour]


def split_bare_changes(text: str, context: Context) -> list[str]:
    """Return "make the circle yellow" for each item of "circle yellow, star: green, white background"; or []."""
    if load_pattern("statement").fullmatch(normalize_text(text).strip(" .!?")):
        return []
    groups: list[list[Token]] = [[]]
    for token in skip_lead(tokenize(text)):
        if token.text in (",", "and", ";", ".", "!"):
            groups.append([])
        elif token.text not in (":", "please") and not (token.text == "the" and not groups[-1]):
            groups[-1].append(token)
    groups = [group for group in groups if group]
    changes = [read_item(group) for group in groups]
    named = {group[0].get("shape") for group in groups} - {None}
    if not named or None in changes:
        return []
    shapes = {obj.shape for obj in read_scene(tokenize(context.describe())).objects}
    return [change for change in changes if change] if named <= shapes else []


def skip_lead(tokens: Sequence[Token]) -> Sequence[Token]:
    """Return the tokens after words such as "changes:" at the beginning of a list."""
    mark = next((index for index, token in enumerate(tokens[:MAX_LEAD_TOKENS]) if token.text == ":"), -1)
    return tokens if any(token.has("shape", "ground") for token in tokens[: mark + 1]) else tokens[mark + 1 :]


def read_item(group: Sequence[Token]) -> str | None:
    """Return the change that an item of a list stands for, "" if it changes nothing, and None for other words."""
    grounds = [token for token in group if token.has("ground")]
    colours = [token for token in group if token.has("colour")]
    others = [token for token in group if not token.has("ground", "colour") and token.text not in ITEM_FILLERS]
    if grounds:
        is_complete = len(grounds) == len(colours) == 1 and not others
        return f"change the background to {colours[0].text}" if is_complete else None
    noun, *values = group
    values = [token for token in values if token.text not in ITEM_FILLERS]
    is_of_all = noun.get("reference") == "them" or noun.text == "all"
    if not noun.has("shape") and not is_of_all:
        return None
    target = "them" if is_of_all else f"the {noun.text}"
    words = " ".join(token.text for token in values)
    if words in REMAINING:
        return ""
    if words in REMOVED:
        return f"remove {target}"
    if len(values) != 1 or not values[0].has("colour", "size", "direction"):
        return None
    direction = values[0].get("direction")
    return f"make {target} {f'move {direction}' if direction else words}"

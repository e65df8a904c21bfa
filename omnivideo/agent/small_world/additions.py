"""What stands beside what there is: "a second star, green", "one more", "with two squares" become plain requests."""

import re

from omnivideo.agent.small_world.lexicon import normalize_text, tokenize
from omnivideo.agent.small_world.readings import Context
from omnivideo.agent.small_world.referring import read_current_scene
from omnivideo.agent.small_world.scenes import NUMBER_WORDS, read_scene
from omnivideo.agent.small_world.wordings import load_pattern

JOINED = re.compile(r"\b(?:and|also|plus|add|put|with)\b")
RESTATING_WORDS = {
    "please", "no", "not", "just", "only", "rather", "but", "and", "now", "ok", "okay", "sorry", "wait", "there",
    "should", "be", "of", "it", "was", "supposed", "to", "in", "like", "would", "exactly", "instead", "hey", "oh",
    "well", "then", "wanted", "clearly", "actually", ",", ".", "!", ";", ":",
}  # fmt: skip


def name_addition(text: str) -> str:
    """Return "add a green star" for "plus a green star" or "a third shape: a green star"; "" for other texts.

    A picture of its own and a background are no additions.
    """
    normalized = normalize_text(text).strip(" .!")
    tokens = tokenize(normalized)
    is_object = any(token.has("shape", "plural") or token.text == "one" for token in tokens)
    is_object = is_object and not tokens[0].has("remove")
    if not is_object or any(token.has("medium", "ground", "task") for token in tokens):
        return ""
    if match := load_pattern("further_object").fullmatch(normalized):
        return f"add {name_by_shape(match['rest'])}"
    match = load_pattern("joined_object").match(normalized)
    return f"add {name_by_shape(normalized[match.end() :])}" if match else ""


def name_by_shape(text: str) -> str:
    """Return "a green star" for "star, green" and "a star in green"."""
    text = load_pattern("colour_after_shape").sub(r"\2 \1", text)
    return text if re.match(r"(?:an?|another|one|two|three|four|[1-4])\b", text) else f"a {text}"


def find_other_number(text: str, context: Context) -> str:
    """Return "two" for "with two squares" if there are squares only, since that is no addition; "" for other texts."""
    if number := find_restated_number(text, context):
        return number
    match = load_pattern("with_number").fullmatch(normalize_text(text).strip(" .!?"))
    objects = read_current_scene(context).objects if match else []
    shapes = {token.get("plural") for token in tokenize(match["noun"])} if match else set()
    return match["number"] if match and len(objects) == 1 and objects[0].shape in shapes else ""


def find_restated_number(text: str, context: Context) -> str:
    """Return "two" for "I asked for two blue stars" where there is one blue star; "" for other texts."""
    tokens = tokenize(text)
    is_new = not tokens or (tokens[0].has("draw") and not tokens[0].text.startswith("i "))  # "draw two blue stars"
    if is_new or any(token.has("medium", "ground", "region", "relation", "motion", "go", "size") for token in tokens):
        return ""
    if any(not token.meanings and token.text not in RESTATING_WORDS for token in tokens):
        return ""
    named, objects = read_scene(tokens), read_current_scene(context).objects
    if len(named.objects) != 1 or len(objects) != 1 or named.conflicts or named.leftovers or named.unknown:
        return ""
    new, old = named.objects[0], objects[0]
    is_alike = new.shape == old.shape and new.colour in (None, old.colour)
    is_other_number = new.count is not None and 1 < new.count < len(NUMBER_WORDS) and new.count != (old.count or 1)
    return NUMBER_WORDS[new.count or 0] if is_alike and is_other_number else ""


def name_one_more(text: str, context: Context) -> str:
    """Return "add a red star" for "a red one as well", if there are only stars."""
    normalized = normalize_text(text)
    match, is_less = load_pattern("one_more").fullmatch(normalized), load_pattern("one_less").fullmatch(normalized)
    if not (match or is_less):
        return text
    objects = read_current_scene(context).objects
    if len(objects) != 1:
        return text
    count = (objects[0].count or 1) - 1
    if match is None:
        return f"make that {NUMBER_WORDS[count]}" if count else text
    is_added = match["more"] or "another" in match["object"] or JOINED.search(match["lead"])
    return f"{'add' if is_added else 'draw'} {match['object']}{objects[0].shape}"

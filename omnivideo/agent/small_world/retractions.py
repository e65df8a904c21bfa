"""Words that are taken back at once: "a blue square, no, hang on, a blue circle" asks for a circle."""

from collections.abc import Sequence

from omnivideo.agent.small_world.lexicon import Token, normalize_text, tokenize
from omnivideo.agent.small_world.scenes import GROUND_FILLERS, GROUND_PREPOSITIONS
from omnivideo.agent.small_world.wordings import load_pattern

CORRECTED_CATEGORIES = ("colour", "shape", "plural", "size", "direction", "number")
# What a phrase that replaces another one can consist of; the categories of its head, the most telling one first.
PHRASE_CATEGORIES = ("shape", "plural", "ground", "colour", "size", "direction", "motion", "number", "medium", "region")
MODIFIERS = ("colour", "size", "number")
ARTICLES = ("a", "an", "the", "one", "that", "this", "another")
MAX_RETRACTIONS = 4
WEAK_MARKERS = {"no", "nope", "actually", "sorry", "rather", "wait", "and", "but", "oh", "well"}
MARKS = (",", ".", ";", ":", "!", "?")


def take_back_words(text: str) -> str:
    """Return "make it yellow" for "make it white... no, yellow"; the text itself if it takes nothing back."""
    for _ in range(MAX_RETRACTIONS):
        if (reworded := take_back_first(text)) == text:
            break
        text = reworded
    return text


def take_back_first(text: str) -> str:
    normalized = normalize_text(text)
    match = load_pattern("self_correction").search(normalized)
    if match is not None and have_same_meaning(match[1], match[3]):
        return f"{normalized[: match.start(1)]}{match[3]}{normalized[match.end() :]}"
    for match in load_pattern("retraction_marker").pattern.finditer(normalized[:300]):
        before, after = normalized[: match.start()], normalized[match.end() :]
        if not is_retraction(match[0], after):
            continue
        if kept := load_pattern("kept_after_all").fullmatch(after):
            return kept["rest"] if "," not in before and " and " not in before else text
        if reworded := replace_phrase(tokenize(before), after):
            return reworded
    return text


def is_retraction(marker: str, after: str) -> bool:
    """Return whether words take something back; "no" and "actually" can also belong to what follows: "no stars"."""
    words = marker.strip(" ,.;:!-(\u2026").split()
    if not set(words) <= WEAK_MARKERS:
        return True
    is_apart = marker.rstrip(" ")[-1:] in MARKS
    return is_apart or after.startswith(("a ", "an ", "the ", "make ", "it "))


def have_same_meaning(first: str, second: str) -> bool:
    """Return whether two words are both colours, both shapes, and so on."""
    kinds = [
        {name for token in tokenize(word) for name, _ in token.meanings} & set(CORRECTED_CATEGORIES)
        for word in (first, second)
    ]
    return bool(kinds[0] & kinds[1])


def replace_phrase(before: Sequence[Token], after: str) -> str:
    """Return the words before with the last phrase replaced that is of the kind of the first one after; else ""."""
    match = load_pattern("retraction_lead").match(after)
    is_ground = (match is not None and match[0].rstrip().endswith((" on", "against"))) or after.startswith("on ")
    tokens = tokenize(after[match.end() if match else 0 :])
    length = 0
    while length < len(tokens) and (
        tokens[length].text in ARTICLES or (tokens[length].has(*PHRASE_CATEGORIES) and not tokens[length].has("make"))
    ):
        length += 1
    phrase, rest = tokens[:length], tokens[length:]
    head = next((name for name in PHRASE_CATEGORIES if any(token.has(name) for token in phrase)), "")
    if not head:
        return ""
    if head in ("shape", "plural"):
        replaced = replace_noun_phrase(before, phrase)
    else:
        kind = "colour" if head == "ground" else head
        value = next((token for token in reversed(phrase) if token.has(kind)), None)
        replaced = replace_value(before, value, is_ground=is_ground or head == "ground") if value else []
    return join_tokens([*replaced, *rest]) if replaced else ""


def replace_noun_phrase(before: Sequence[Token], phrase: Sequence[Token]) -> list[Token]:
    """Return the tokens with another last noun phrase; one of a bare shape keeps the colour and the size."""
    ends = [index for index, token in enumerate(before) if token.has("shape", "plural")]
    if not ends:  # "a red, no, a blue circle"
        start = len(before)
        while start and (before[start - 1].has("colour", "size") or before[start - 1].text in MARKS):
            start -= 1
        is_begun = start < len(before) and start and before[start - 1].text in ARTICLES
        return [*before[: start - 1], *phrase] if is_begun else []
    start = end = ends[-1]
    while start and before[start - 1].has(*MODIFIERS) and not before[start - 1].has("thing"):
        start -= 1
    is_bare = not any(token.has("colour", "size") for token in phrase)
    if is_bare and phrase[0].text != "the":
        noun = next(token for token in phrase if token.has("shape", "plural"))
        return [*before[:end], noun, *before[end + 1 :]]
    if start and before[start - 1].text in ARTICLES:
        start -= 1
    return [*before[:start], *phrase, *before[end + 1 :]]


def replace_value(before: Sequence[Token], value: Token, *, is_ground: bool) -> list[Token]:
    """Return the tokens with another last value of the same kind: the last colour, the last direction."""
    kinds = [name for name, _ in value.meanings]
    indexes = [index for index, token in enumerate(before) if token.has(*kinds)]
    alike = [index for index in indexes if is_ground_colour(before, index) == is_ground]
    if not indexes or (is_ground and not alike):
        return []
    index = (alike or indexes)[-1]
    return [*before[:index], value, *before[index + 1 :]]


def is_ground_colour(tokens: Sequence[Token], index: int) -> bool:
    if tokens[index + 1 : index + 2] and tokens[index + 1].has("ground"):
        return True
    while index and tokens[index - 1].text in GROUND_FILLERS:
        index -= 1
    return index > 0 and (tokens[index - 1].text in GROUND_PREPOSITIONS or tokens[index - 1].has("ground"))


def join_tokens(tokens: Sequence[Token]) -> str:
    """Return the text of tokens, without a blank before a mark."""
    words = [token.text if token.text in MARKS else f" {token.text}" for token in tokens]
    return "".join(words).strip()

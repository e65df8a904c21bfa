"""What people say around a request: greetings, excuses, who they are and what it is for. It is dropped.

Only clauses of such forms are dropped, and only if they name nothing of the world and another clause does. A clause
that could be a part of the wish, such as "exploding into sparks", stays, so that its words must be understood.
"""

import re
from itertools import pairwise

from omnivideo.agent import english_rules
from omnivideo.agent.small_world import talk
from omnivideo.agent.small_world.lexicon import normalize_text, tokenize
from omnivideo.agent.small_world.wordings import load_pattern, load_rewritings

SUBSTANCE = ("shape", "plural", "colour", "size", "resize", "motion", "direction", "ground", "region", "relation")
CLAUSE_END = re.compile(r"(?<![,.;:!?])[,.;:!?]++(?=\s|$)|\s[\u2013\u2014-]++(?=\s)")


def drop_framing(text: str) -> str:
    """Return a text without what is said around its request; the text itself if there is nothing of the kind."""
    if len(text) > english_rules.MAX_WORDING_CHARS:
        return text
    normalized = reword_framing(normalize_text(text))
    clauses = [clause for clause in split_clauses(normalized) if clause.strip(" ,.;:!?-")]
    has_substance = [names_substance(clause) for clause in clauses]
    if not any(has_substance):
        return text
    first = has_substance.index(True)
    kept = [
        clause
        for index, clause in enumerate(clauses)
        if has_substance[index]
        or not is_framing(clause.strip(" ,.;:!?-"))
        or (index > first and load_pattern("retraction").search(f", {clause.strip()}"))  # it takes back what was said
    ]
    if len(kept) == len(clauses):
        return text if normalized == normalize_text(text) else normalized
    return "".join(kept).strip(" ,;:-")


def reword_framing(text: str) -> str:
    """Return a normalised text with wishes of others as the speaker's own, and the like."""
    for pattern, replacement in load_rewritings():
        text = pattern.sub(replacement, text)
    return load_pattern("wish_of_another").sub(replace_wish, text)


def replace_wish(match: re.Match[str]) -> str:
    """Return "i want" for "the client wants", but not for "the star wants"."""
    return match[0] if names_substance(match[1]) else f"{match['lead']}i want "


def split_clauses(text: str) -> list[str]:
    """Return the clauses of a normalised text, each with the marks behind it; a request begins a new one."""
    ends = [match.end() for match in CLAUSE_END.finditer(text)]
    ends += [match.start() for match in load_pattern("request_head").pattern.finditer(text) if match.start()]
    bounds = [0, *sorted(set(ends)), len(text)]
    return [text[start:end] for start, end in pairwise(bounds) if start < end]


def names_substance(clause: str) -> bool:
    """Return whether a clause names something that a picture can show."""
    return any(token.has(*SUBSTANCE) for token in tokenize(clause))


def is_framing(clause: str) -> bool:
    """Return whether a clause only greets, thanks, excuses, or tells something about the speaker."""
    return load_pattern("framing").fullmatch(clause) is not None or (
        talk.find_small_talk(clause) is not None and talk.find_small_talk(clause) in talk.COURTESIES
    )

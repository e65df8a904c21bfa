"""What people say that is no request of the small world: small talk, in the MLLM's words, and other languages.

Beside a request, people say greetings, excuses, who they are and what it is for. That is dropped, in clauses of such
forms only, and only if they name nothing of the world and another clause does. A clause that could be a part of the
wish, such as "exploding into sparks", stays, so that its words must be understood.
"""

import re
import unicodedata
from itertools import pairwise

from omnivideo.agent import english_rules
from omnivideo.agent.small_world.lexicon import is_known_word, load_lexicon, normalize_text, split_words, tokenize
from omnivideo.agent.small_world.wordings import load_foreign_words, load_pattern, load_rewritings, load_small_talk

# What is small talk even as a question, when there is a result.
CERTAIN = (
    "thanks",
    "how are you?",
    "what is your name?",
    "who are you?",
    "what can you do?",
    "goodbye",
    "hello",
    "languages",
)

COURTESIES = ("thanks", "how are you?", "goodbye", "hello", "perfect")  # said beside a request
SUBSTANCE = ("shape", "plural", "colour", "size", "resize", "motion", "direction", "ground", "region", "relation")
CLAUSE_END = re.compile(r"(?<![,.;:!?])[,.;:!?]++(?=\s|$)|\s[\u2013\u2014-]++(?=\s)")


def find_small_talk(text: str) -> str | None:
    """Return the small talk of the MLLM's world that a text is, or None."""
    normalized = normalize_text(text).strip(" .!?")
    return next((said for pattern, said in load_small_talk() if pattern.search(normalized)), None)


def find_praise(text: str, has_result: bool) -> str | None:
    """Return "perfect" for praise that names what is seen, such as "that is a lovely star"; None for other texts.

    Only where there is a result is "nice star" praise and no request.
    """
    normalized = normalize_text(text).strip(" .!?")
    names = ("praise", "short_praise") if has_result else ("praise",)
    return "perfect" if any(load_pattern(name).fullmatch(normalized) for name in names) else None


def is_foreign(text: str) -> bool:
    """Return whether a text is not in English: other letters, or mostly unknown words with one of another language."""
    letters = [letter for letter in text if letter.isalpha()]
    if letters and sum(not is_latin(letter) for letter in letters) > len(letters) / 4:
        return True
    lexicon = load_lexicon()
    words = [word for word in split_words(normalize_text(text)) if word[0].isalpha()]
    unknown = [word for word in words if not is_known_word(lexicon, word) and word not in lexicon.described]
    foreign = [word for word in words if word in load_foreign_words()]
    accented = [word for word in words if not word.isascii()]
    if not words or (len(unknown) * 2 <= len(words) and len(foreign) * 2 < len(words)):
        return False
    return bool(foreign or accented)


def is_latin(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith("LATIN")


# ---------------------------------------------------------------- what is said around a request


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
    return match[0] if names_substance(match[2]) else f"{match['lead']}i want "


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
    return load_pattern("framing").fullmatch(clause) is not None or find_small_talk(clause) in COURTESIES

"""Small talk, in the MLLM's words, and requests in other languages than English."""

import unicodedata

from omnivideo.agent.small_world.lexicon import is_known_word, load_lexicon, normalize_text, split_words
from omnivideo.agent.small_world.wordings import load_foreign_words, load_pattern, load_small_talk

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

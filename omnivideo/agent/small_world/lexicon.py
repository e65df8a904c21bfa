"""The words of the small world and their meanings, read from prompts/keywords, and the words of a text as tokens."""

import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

from omnivideo.agent.small_world.wordings import load_contractions

MAX_PHRASE_WORDS = 7
MIN_MISSPELT_LETTERS, MAX_MISSPELT_LETTERS = 5, 20
INFLECTED_VERBS = ("add", "remove", "replace", "swap", "make", "draw", "put")
REAL_WORDS = ("squire", "squires", "lack", "whit")  # English words that are not misspelt ones of the world
VOWELS = "aeiou"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTHENED = re.compile(r"([a-z])\1{2,}")
SPELT_WORD = re.compile(r"(?<![\w.#'-])[a-z]{4,20}(?![\w'-]|\.\w)", re.IGNORECASE)
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*|[.,;:!?]")


@dataclass(frozen=True)
class Token:
    """Words of a text with their meanings: the value for each category of the lexicon; none for other words."""

    text: str
    meanings: tuple[tuple[str, str], ...] = ()
    is_known: bool = True

    def get(self, category: str) -> str | None:
        return next((value for name, value in self.meanings if name == category), None)

    def has(self, *categories: str) -> bool:
        return any(name in categories for name, _ in self.meanings)


@dataclass(frozen=True)
class WorldFacts:
    """What the world has. `contents` says so to the user, and `example` is a request."""

    object_colours: list[str]
    backgrounds: list[str]
    max_objects: int
    corners: dict[str, str]
    contents: str
    example: str


@dataclass(frozen=True)
class Lexicon:
    """`phrases` maps words to their meanings.

    `general` are the words that say nothing about the world, and `described` those of indirect requests and of facts.
    """

    phrases: dict[str, tuple[tuple[str, str], ...]]
    general: frozenset[str]
    described: frozenset[str]
    facts: WorldFacts

    def find_spelling(self, word: str) -> str:
        """Return the known word that a longer word becomes by one change of letters, or the word itself."""
        for repeated in (r"\1", r"\1\1"):  # "nooo", "greeen"
            if (shortened := LENGTHENED.sub(repeated, word)) != word and is_known_word(self, shortened):
                return shortened
        if len(word) == MIN_MISSPELT_LETTERS - 1:
            exchanged = [edit for edit in iterate_exchanges(word) if (edit,) in self.content_words]
            exchanged += [edit for edit in iterate_misspellings(word) if self.names_shape_or_colour(edit)]
            return exchanged[0] if exchanged and word not in REAL_WORDS else word
        if not MIN_MISSPELT_LETTERS <= len(word) <= MAX_MISSPELT_LETTERS or not word.isascii() or not word.isalpha():
            return word
        known = [edit for edit in iterate_misspellings(word) if (edit,) in self.content_words]
        if not known and len(word) > MIN_MISSPELT_LETTERS and word not in REAL_WORDS:
            known = [edit for edit in iterate_other_vowels(word) if self.names_shape_or_colour(edit)]
        if not known and word not in REAL_WORDS:
            known = [edit for edit in iterate_misspellings(word) if edit in self.general]
        return known[0] if known else word

    def names_shape_or_colour(self, word: str) -> bool:
        return any(name in ("shape", "plural", "colour") for name, _ in self.phrases.get(word, ()))

    @property
    def content_words(self) -> frozenset[tuple[str]]:
        return load_content_words()


def iterate_exchanges(word: str) -> Iterable[str]:
    """Yield what a word becomes if two neighbours are exchanged in it."""
    for index in range(len(word) - 1):
        yield word[:index] + word[index + 1] + word[index] + word[index + 2 :]


def iterate_other_vowels(word: str) -> Iterable[str]:
    """Yield what a word becomes if one of its vowels is another one."""
    for index, letter in enumerate(word):
        if letter in VOWELS:
            yield from (word[:index] + vowel + word[index + 1 :] for vowel in VOWELS if vowel != letter)


def iterate_misspellings(word: str) -> Iterable[str]:
    """Yield what a word becomes if two neighbours are exchanged, a letter is doubled or a letter is missing in it."""
    for index in range(len(word)):
        left, right = word[:index], word[index:]
        if len(right) > 1:
            yield left + right[1] + right[0] + right[2:]
            if right[0] == right[1]:
                yield left + right[1:]
        for letter in LETTERS:
            yield left + letter + right
    yield from (word + letter for letter in LETTERS)


def read_words(name: str) -> frozenset[str]:
    return frozenset((files("omnivideo.agent") / "prompts/keywords" / name).read_text(encoding="utf-8").split())


@cache
def load_lexicon() -> Lexicon:
    """Read the words of the world."""
    text = (files("omnivideo.agent") / "prompts/keywords/lexicon.toml").read_text(encoding="utf-8")
    phrases: dict[str, tuple[tuple[str, str], ...]] = {}
    document = tomllib.loads(text)
    facts = WorldFacts(**document.pop("facts"))
    for category, entries in document.items():
        for value, words in entries.items():
            for phrase in words:
                key = normalize_text(phrase)
                meaning = (value, value) if category == "verb" else (category, value)
                phrases[key] = (*phrases.get(key, ()), meaning)
    general = read_words("general_words.txt") | {"center"}
    for phrase in tuple(phrases):
        is_verb = len(phrase) > 2 and phrase.isalpha() and any(name in INFLECTED_VERBS for name, _ in phrases[phrase])
        if is_verb and (participle := build_participle(phrase)) not in general:
            phrases.setdefault(participle, phrases[phrase])
    return Lexicon(phrases, general, read_words("described_words.txt"), facts)


def build_participle(verb: str) -> str:
    """Return the form of a verb in "would you mind turning it": its last letter may be dropped or doubled."""
    if verb.endswith("e"):
        return f"{verb[:-1]}ing"
    is_doubled = re.search(r"(?:^|[^aeiou])[aeiou][^aeiouwxy]$", verb) is not None and len(verb) < 5
    return f"{verb}{verb[-1] if is_doubled else ''}ing"


@cache
def load_content_words() -> frozenset[tuple[str]]:
    """Return the single words, of five letters or more, that a misspelt word may stand for."""
    categories = (
        "shape", "plural", "colour", "size", "resize", "ground", "motion", "go", "direction", "medium", "speed",
        "thing", "add", "remove", "replace", "swap", "make", "draw",
    )  # fmt: skip
    return frozenset(
        (phrase,)
        for phrase, meanings in load_lexicon().phrases.items()
        if " " not in phrase and len(phrase) >= MIN_MISSPELT_LETTERS - 1 and meanings[0][0] in categories
    )


@lru_cache(maxsize=64)  # a turn's text is read by many rules
def normalize_text(text: str) -> str:
    """Return a text in small letters, without contractions and typographic quotes."""
    text = re.sub("[\u2018\u2019]", "'", " ".join(text.lower().split()))
    for pattern, full in load_contractions():
        text = pattern.sub(full, text)
    return text


def split_words(text: str) -> list[str]:
    """Return the words and the punctuation marks of a normalised text."""
    return WORD.findall(text)


def tokenize(text: str) -> list[Token]:
    """Return the longest known phrases of a text in order; a misspelt word counts as the word that it is like."""
    lexicon, words, tokens = load_lexicon(), split_words(normalize_text(text)), list[Token]()
    words = [word if is_known_word(lexicon, word) else lexicon.find_spelling(word) for word in words]
    position = 0
    while position < len(words):
        for length in range(min(MAX_PHRASE_WORDS, len(words) - position), 0, -1):
            phrase = " ".join(words[position : position + length])
            if phrase in lexicon.phrases:
                tokens.append(Token(phrase, lexicon.phrases[phrase]))
                break
        else:
            length, word = 1, words[position]
            tokens.append(Token(word, is_known=word in lexicon.general or not word[0].isalnum()))
        position += length
    return tokens


def correct_spelling(text: str) -> str:
    """Return a text with the words that its misspelt words are like; names of files stay as they are."""

    def correct_word(match: re.Match[str]) -> str:
        lexicon, word = load_lexicon(), match[0].lower()
        if is_known_word(lexicon, word) or word in lexicon.described:
            return match[0]
        spelling = lexicon.find_spelling(word)
        return match[0] if spelling == word else spelling

    return SPELT_WORD.sub(correct_word, text)


def name_target(tokens: Sequence[Token]) -> str:
    """Return the MLLM's words for a target, such as "the red circle" or "the small one"."""
    words = []
    for token in tokens:
        for category in ("size", "colour", "shape", "plural"):
            if value := token.get(category):
                words.append(f"{value}s" if category == "plural" else value)
                break
    if not tokens[-1].has("shape", "plural"):
        words.append("one" if words else "object")
    return "the " + " ".join(words)


def is_known_word(lexicon: Lexicon, word: str) -> bool:
    return word in lexicon.phrases or word in lexicon.general or not word[0].isalpha() or word in load_phrase_words()


@cache
def load_phrase_words() -> frozenset[str]:
    """Return every word that occurs in a phrase of the lexicon."""
    return frozenset(word for phrase in load_lexicon().phrases for word in phrase.split())

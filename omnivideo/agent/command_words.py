"""Commands by the words that they consist of, in any order: "get rid of that last edit", "i want the old one back".

A text is a command if each of its words is one of the command's own words or a filler, and if the words that make the
command are among them. So a word that could be a wish of its own, such as a colour, keeps a text from being a command.
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from omnivideo.turns import CommandName

WORDS_FILE = "prompts/command_words.toml"
WORD = re.compile(r"#?[a-z0-9]+(?:['+._-][a-z0-9]+)*")
MAX_WORDS, MAX_PHRASE_WORDS = 25, 3
NUMBER = re.compile(r"#?\d+")
LENGTHENED = re.compile(r"([a-z])\1{2,}")  # "nooo"
FILE_NAME = re.compile(r"[a-z0-9][\w-]*\.[a-z0-9]{2,4}")


@dataclass(frozen=True)
class CommandReading:
    """A command, the sets of concepts of which one must be there in full, and the further concepts that may be there.

    `needs_result` says that the words are this command only once there is a result.
    """

    name: CommandName
    needs: tuple[frozenset[str], ...]
    allows: frozenset[str]
    needs_result: bool


@dataclass(frozen=True)
class CommandWords:
    """`concepts` maps words, or phrases of up to three, to what they mean; `readings` are tried in order."""

    concepts: dict[str, frozenset[str]]
    readings: tuple[CommandReading, ...]


@cache
def load_command_words() -> CommandWords:
    """Read the words of the commands."""
    document = tomllib.loads((files("omnivideo.agent") / WORDS_FILE).read_text(encoding="utf-8"))
    concepts: dict[str, set[str]] = {}
    for concept, words in document["concepts"].items():
        for phrase in re.split(r"[,\n]\s*", words.strip()):
            concepts.setdefault(phrase, set()).add(concept)
    readings = tuple(
        CommandReading(
            entry["name"],
            tuple(frozenset(need.split()) for need in entry["needs"]),
            frozenset(entry.get("allows", "").split()) | {"filler"},
            entry.get("needs_result", False),
        )
        for entry in document["readings"]
    )
    return CommandWords({phrase: frozenset(names) for phrase, names in concepts.items()}, readings)


def list_concepts(words: Sequence[str]) -> list[frozenset[str]]:
    """Return the concepts of the longest known phrases in order; the empty set for an unknown word."""
    known, found, position = load_command_words().concepts, list[frozenset[str]](), 0
    while position < len(words):
        for length in range(min(MAX_PHRASE_WORDS, len(words) - position), 0, -1):
            phrase = " ".join(words[position : position + length])
            if meanings := known.get(phrase) or (list_concepts_of_form(phrase) if length == 1 else None):
                found.append(meanings)
                break
        else:
            return [*found, frozenset()]
        position += length
    return found


def list_concepts_of_form(word: str) -> frozenset[str]:
    """Return the concept of a number or of the name of a file."""
    return frozenset({"number"} if NUMBER.fullmatch(word) else {"filename"} if FILE_NAME.fullmatch(word) else ())


def find_command_by_words(text: str, *, has_result: bool) -> CommandName | None:
    """Return the command that all words of a text make together, or None."""
    words = WORD.findall(LENGTHENED.sub(r"\1", text))
    if not words or len(words) > MAX_WORDS:
        return None
    concepts = list_concepts(words)
    for reading in load_command_words().readings:
        if reading.needs_result and not has_result:
            continue
        for need in reading.needs:
            allowed = need | reading.allows
            if all(meanings & allowed for meanings in concepts) and need <= frozenset().union(*concepts):
                return reading.name
    return None

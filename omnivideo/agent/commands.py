"""Commands about the conversation itself, recognised by their English wording: undo, start over, save, and others.

They are executed without the MLLM, for every preset. An MLLM that plans can give the same commands in its plan, for
other languages and wordings. A text is a command only if all of it is one: by a pattern, or by the words that it
consists of in any order ("get rid of that last edit", "i want the old one back"). Then each of its words is one of the
command's own words or a filler, and the words that make the command are among them; a word that could be a wish of its
own, such as a colour, keeps a text from being a command.
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from omnivideo.agent.english_rules import ORDINAL_INDEX, WordingPattern
from omnivideo.contracts import Artifact
from omnivideo.turns import CommandName, ExecutedCommand

FILE_FORMATS = {"video": ("mp4", "gif"), "image": ("png", "gif")}
NUMBERS = {
    "a": 1, "an": 1, "one": 1, "another": 1, "two": 2, "a couple of": 2, "a pair of": 2, "couple": 2, "three": 3,
    "some": 3, "several": 3, "a few": 3, "few": 3, "other": 3, "more": 3, "four": 4, "five": 5, "six": 6,
    "seven": 7, "eight": 8,
}  # fmt: skip
COUNT = rf"(?P<count>\d+|{'|'.join(sorted(NUMBERS, key=len, reverse=True))})"
# Words of a clause that could be a request of its own.
CONTENT = re.compile(
    r"\b(?:draw|make|add|paint|turn|change|put|remove|create|generate|show|give|colou?r|recolou?r|take|delete|keep|use"
    r"|with|on|an?|the|in|instead|red|green|blue|yellow|orange|purple|cyan|white|black|grey|gray|pink|brown"
    r"|bigger|smaller|larger|faster|slower|longer|left|right|up|down|how|what|which|where|is|are)\b"
)
CLAUSE_MARK = r"[,;]+|\.+(?!\w)| and "
FORMATS = "gif|png|mp4|jpe?g|webp|webm|mov|avi|pdf|svg|bmp|tiff?|mkv"
FILE_NAME = rf"\b[\w-]+\.(?:{FORMATS})\b"
NAMED_RESULT = rf"\b(?:{'|'.join(ORDINAL_INDEX)}|original)\b|#?\d"
PATTERNS_FILE = "prompts/commands.toml"
WORDS_FILE = "prompts/command_words.toml"
WORD = re.compile(r"#?[a-z0-9]+(?:['+._-][a-z0-9]+)*")
MAX_WORDS, MAX_PHRASE_WORDS = 25, 3
NUMBER_WORD = re.compile(r"#?\d+")
LENGTHENED = re.compile(r"([a-z])\1{2,}")  # "nooo"
BARE_FILE_NAME = re.compile(r"[a-z0-9][\w-]*\.[a-z0-9]{2,4}")
CONTRACTED = (
    (r"['\u2018\u2019]", "'"), (r"\b(\w+)n't\b|\b(did|do|does|is|was)nt\b", r"\1\2 not"), (r"\b(\w+)'s\b", r"\1 is"),
    (r"\b(i|you|we)'d\b", r"\1 would"), (r"\b(i|you|we)'ve\b", r"\1 have"), (r"\bi'?m\b", "i am"),
    (r"\b(you|we)'re\b", r"\1 are"), (r"\blet is\b|\blets\b", "let us"), (r"\bwanna\b", "want to"),
    (r"\bgimme\b", "give me"), (r"\blemme\b", "let me"), (r"\bvid\b", "video"), (r"\bpic\b", "picture"),
)  # fmt: skip


@dataclass(frozen=True)
class CommandPatterns:
    """The wordings of the commands, compiled; `lead` and `tail` are the politeness around a command."""

    commands: tuple[tuple[CommandName, WordingPattern], ...]
    resend: WordingPattern
    lead: WordingPattern
    tail: WordingPattern


@cache
def load_patterns() -> CommandPatterns:
    """Read the wordings of the commands."""
    document = tomllib.loads((files("omnivideo.agent") / PATTERNS_FILE).read_text(encoding="utf-8"))
    numbers = "|".join(sorted(NUMBERS, key=len, reverse=True))
    parts = document["parts"] | {"count": rf"(?P<count>\d+|{numbers})", "ordinal": "|".join(ORDINAL_INDEX)}

    def compile_pattern(pattern: str) -> WordingPattern:
        while "<" in (rest := re.sub(r"\(\?(?:P<\w+>|<[=!])", "", pattern)):
            name = re.search(r"<(\w+)>", rest)
            assert name, "every part is named"
            pattern = re.sub(rf"(?<!P)<{name[1]}>", lambda match: parts[match[0].strip("<>")], pattern)
        return WordingPattern(pattern)

    return CommandPatterns(
        tuple((entry["name"], compile_pattern(entry["pattern"])) for entry in document["commands"]),
        *(compile_pattern(parts[name]) for name in ("resend", "lead", "tail")),
    )


def find_command(text: str, artifacts: Sequence[Artifact], *, is_strict: bool = False) -> ExecutedCommand | None:
    """Return the command that a whole text is, or None.

    Unless it is strict, a clause beside the command may say why, as in "i changed my mind, go back"; one that could be
    a request of its own may not.
    """
    words = " ".join(text.lower().split())
    for pattern, replacement in CONTRACTED:
        words = re.sub(pattern, replacement, words)
    words = re.sub(r"(?<![!?])[!?]++(?=\s|$)|(?<!\.)\.++(?=\s|$)", "", words).strip(" ,;:-")
    if command := match_polite_command(words, artifacts):
        return command
    # "wipe everything, i want to begin with a clean slate" says one command twice.
    parts = re.split(CLAUSE_MARK, words)
    clauses = [match_polite_command(part.strip(), artifacts) for part in parts]
    found = {repr(command): command for command in clauses if command is not None}
    others = [part for part, command in zip(parts, clauses, strict=True) if command is None and part.strip()]
    if len(found) > 1:  # "call it star.mp4 and save" is one command
        fullest = max(found.values(), key=lambda command: len(command.arguments))
        if all(is_part_of(command, fullest) for command in found.values()):
            found = {"": fullest}
    if len(found) == 1 and not (others and (is_strict or any(map(CONTENT.search, others)))):
        return next(iter(found.values()))
    return None if is_strict else match_command_words(words, artifacts)


def match_command_words(words: str, artifacts: Sequence[Artifact]) -> ExecutedCommand | None:
    """Return the command that all words make together, in whatever order they stand."""
    name = find_command_by_words(words, has_result=bool(artifacts))
    if name in ("resend", "save", "export"):
        number = find_result_number(re.sub(FILE_NAME, "", words), artifacts)
        if name == "resend":
            return ExecutedCommand(name=name, arguments={"which": number}) if number else None
        return build_file_command(name, words, number if re.search(NAMED_RESULT, words) else 0)
    groups = dict[str, str | None]()
    if name in ("vary", "undo") and (count := re.search(rf"\b{COUNT}\b", words.replace("twice", "two"))):
        groups["count"] = count["count"]
    if name == "undo" and (repeated := words.count("undo")) > 1:
        groups["count"] = str(repeated)
    elif name == "undo" and groups.get("count") in ("1", "a", "an", "one", "another", "other", "more", "some"):
        del groups["count"]
    return build_command(name, groups) if name else None


def build_file_command(name: CommandName, words: str, number: int) -> ExecutedCommand | None:
    """Return the command that writes the current result, or the one with a number other than 0, to a file."""
    formats = set(re.findall(rf"\b(?:{FORMATS})\b", re.sub(FILE_NAME, "", words)))
    if len(formats) > 1 or (name == "export" and not formats):
        return None
    arguments: dict[Any, int | str] = {"which": number} if number else {}
    if file := re.search(FILE_NAME, words):
        arguments["file"] = file[0]
    elif formats:
        arguments["format"] = formats.pop().replace("jpeg", "jpg")
    return ExecutedCommand(name=name, arguments=arguments)


def is_part_of(command: ExecutedCommand, other: ExecutedCommand) -> bool:
    """Return whether a command says nothing that the other one does not say."""
    return command.name == other.name and command.arguments.items() <= other.arguments.items()


def match_polite_command(words: str, artifacts: Sequence[Artifact]) -> ExecutedCommand | None:
    """Return the command that words are with or without the politeness around it, or None."""
    patterns = load_patterns()
    plain = patterns.lead.sub("", words)
    for candidate in dict.fromkeys((words, patterns.tail.sub("", words), plain, patterns.tail.sub("", plain))):
        if command := match_command(candidate.strip(" ,"), artifacts):
            return command
    return None


def match_command(words: str, artifacts: Sequence[Artifact]) -> ExecutedCommand | None:
    for name, pattern in load_patterns().commands:
        if match := pattern.fullmatch(words):
            return build_command(name, match.groupdict())
    if (match := load_patterns().resend.fullmatch(words)) and artifacts:
        number = find_result_number(match["which"], artifacts)
        is_named = any(word in match["which"] for word in (*ORDINAL_INDEX, "original", "earlier", "number", "#"))
        if number and (is_named or match["again"].strip()):
            return ExecutedCommand(name="resend", arguments={"which": number})
    return None


def build_command(name: CommandName, groups: dict[str, str | None]) -> ExecutedCommand:
    """Return the command with the arguments that its words give."""
    if name == "save" and groups.get("file"):
        return ExecutedCommand(name=name, arguments={"file": str(groups["file"])})
    if name == "undo" and (count := groups.get("count")):
        return ExecutedCommand(name=name, arguments={"count": int(count) if count.isdigit() else NUMBERS[count]})
    if name == "export":
        return ExecutedCommand(name=name, arguments={"format": str(groups["format"]).replace("jpeg", "jpg")})
    if name == "vary":
        count = groups.get("count") or "1"
        return ExecutedCommand(name=name, arguments={"count": int(count) if count.isdigit() else NUMBERS[count]})
    return ExecutedCommand(name=name)


def find_result_number(words: str, artifacts: Sequence[Artifact]) -> int:
    """Return the number, from 1, of the result that "the second clip", "number 3" or "it" names; 0 if there is none."""
    media = [
        word
        for word in words.split()
        if word in ("clip", "video", "animation", "movie", "film", "picture", "image", "photo", "drawing")
    ]
    medium = None if not media else "video" if media[0] in ("clip", "video", "animation", "movie", "film") else "image"
    numbers = [number for number, artifact in enumerate(artifacts, start=1) if medium in (None, artifact.medium)]
    if named := re.search(r"\b(?:number|no\.?|#) ?(one|two|three|four|five|six)\b", words):
        return NUMBERS[named[1]] if NUMBERS[named[1]] <= len(artifacts) else 0
    if digits := re.search(r"\d+", words):
        return int(digits[0]) if 1 <= int(digits[0]) <= len(artifacts) else 0
    ordinals = [ORDINAL_INDEX[word] for word in words.split() if word in ORDINAL_INDEX]
    index = ordinals[0] if ordinals else 0 if "original" in words else -2 if "earlier" in words else -1
    return numbers[index] if -len(numbers) <= index < len(numbers) else 0


# ---------------------------------------------------------------- commands by their words


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
    return frozenset(
        {"number"} if NUMBER_WORD.fullmatch(word) else {"filename"} if BARE_FILE_NAME.fullmatch(word) else ()
    )


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

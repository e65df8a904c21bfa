"""Split a turn into its actions: the items of a list, several results of one sentence, one action after the other."""

import re
from collections.abc import Sequence
from dataclasses import replace

from omnivideo.agent import english_rules
from omnivideo.agent.commands import find_command
from omnivideo.agent.small_world import talk
from omnivideo.agent.small_world.lexicon import Token, load_lexicon, normalize_text, tokenize
from omnivideo.agent.small_world.scenes import read_scene
from omnivideo.agent.small_world.wordings import load_pattern

ATTRIBUTES = ("colour", "size", "motion", "go", "direction", "speed", "region", "ground")
CONTENT = (
    *ATTRIBUTES, "shape", "plural", "resize", "longer", "task", "reference", "rest", "make", "draw", "add", "remove",
    "replace", "swap", "relation",
)  # fmt: skip
MAX_ITEMS = 9
LINE_MARK = re.compile(r"[ \t]*+(?:\(?[1-9a-h][.)]|[-*\u2022\u2013]|(?:step|no\.?) ?[1-9][:.)]?)[ \t]++", re.IGNORECASE)
NUMBER_MARK = re.compile(r"(?:(?<=\s)|^)\(?([1-9])[.)](?=\s)")
LINE_START = re.compile(
    rf"(?:(?:and|then|now|also|finally|please) )*(?:{english_rules.ACTION_START}|an?|i|one|two|three|four)\b",
    re.IGNORECASE,
)


def separate_items(text: str) -> str:
    """Return a text with a semicolon between the items of a list: lines, or parts with numbers."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bare = [LINE_MARK.sub("", line, count=1) for line in lines]
    if 1 < len(lines) <= MAX_ITEMS and (bare != lines or all(map(LINE_START.match, lines))):
        lead = bare[0] if bare[0] != lines[0] or bare[1:] == lines[1:] or not lines[0].endswith(":") else ""
        return "; ".join(line.rstrip(" ,;") for line in (lead, *bare[1:]) if line)
    marks = list(NUMBER_MARK.finditer(text))
    if 1 < len(marks) <= MAX_ITEMS and [int(mark[1]) for mark in marks] == list(range(1, len(marks) + 1)):
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        items = [text[mark.end() : end].strip(" ,;") for mark, end in zip(marks, ends, strict=True)]
        return "; ".join(items)
    return text


# ---------------------------------------------------------------- several results


def split_results(text: str) -> list[str]:
    """Return a request for each of several results of one text; [] for other texts."""
    normalized = normalize_text(text).strip(" .!?")
    if len(normalized) > english_rules.MAX_WORDING_CHARS:
        return []
    if parts := split_named_results(normalized):
        return parts
    if match := load_pattern("separate_results").fullmatch(normalized):
        words = re.sub(r"^(?:(?:please|draw|make|create|show me|give me|i want|i need) )+", "", match[1] or match["counted"] or match[3])
        parts = [part for part in re.split(r",? and then |,? then |,? and |, ", words) if part.strip()]
        if len(parts) > 1 and all(map(has_shape, parts)):
            return parts
    if match := load_pattern("both_media").fullmatch(normalized):
        return [f"a {match[1]} of {match[3]}", f"a {match[2]} of {match[3]}"] if match[1] != match[2] else []
    if match := load_pattern("equal_results").fullmatch(normalized):
        number = int(load_lexicon().phrases[match[1]][0][1])
        parts = [f"a {match[2].removesuffix('s')} of {match[3]}"] * number
    elif match := load_pattern("two_results").fullmatch(normalized):
        parts = [f"a {match[1].removesuffix('s')} of {words}" for words in (match[2], match[3])]
    elif match := load_pattern("listed_results").fullmatch(normalized):
        parts = split_listed_results(match)
    else:
        parts = [
            part.strip(" ,;").removeprefix("first ")
            for piece in load_pattern("separately").split(normalized)
            for part in load_pattern("next_result").split(piece)
            if part.strip()
        ]
        if parts and not has_shape(parts[0]):  # "first", "i want"
            del parts[0]
    return repeat_objects(parts) if len(parts) > 1 and all(map(has_shape, parts)) else []


def repeat_objects(parts: Sequence[str]) -> list[str]:
    """Return requests of which each names its objects: "a still of the same square" repeats those before."""
    repeated = list(parts[:1])
    for part in parts[1:]:
        objects = read_scene(tokenize(repeated[-1])).objects
        text = " and ".join(obj.to_text(with_motion=False) for obj in objects)
        repeated.append(re.sub(r"\b(?:the|that) same \w+", text, part))
    return repeated


def split_named_results(normalized: str) -> list[str]:
    """Return the requests of "picture one: a red circle. picture two: a red square"; [] for other texts."""
    marks = list(load_pattern("named_result").pattern.finditer(normalized))
    if len(marks) < 2 or normalized[: marks[0].start()].strip(" ,;:") not in ("", "please", "draw", "make"):
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(normalized)]
    items = [normalized[mark.end() : end].strip(" ,;.") for mark, end in zip(marks, ends, strict=True)]
    return [f"a {mark['noun'] or mark['noun2']} of {item}" for mark, item in zip(marks, items, strict=True)]


def split_listed_results(match: re.Match[str]) -> list[str]:
    """Return the requests of "three separate pictures, circle, square and star, all in blue"; [] if they are others."""
    tokens = list[Token]()
    for token in tokenize(match["objects"]):
        is_listed = tokens and token.has("shape") and tokens[-1].has("shape")  # "circle square and star"
        tokens += [Token(","), token] if is_listed else [token]
    scene, number = read_scene(tokens), int(load_lexicon().phrases[match["number"]][0][1])
    if len(scene.objects) != number or scene.conflicts or any(obj.count not in (None, 1) for obj in scene.objects):
        return []
    noun = match["noun"].removesuffix("s")
    texts = [replace(scene, objects=[obj], relation=None).to_text().partition(" of ")[2] for obj in scene.objects]
    return [f"a {noun} of {text}" for text in texts]


def has_shape(text: str) -> bool:
    return any(token.has("shape", "plural") for token in tokenize(text))


# ---------------------------------------------------------------- one action after the other


def split_turn(text: str) -> list[str]:
    """Split a turn into its actions; words that only describe what stands before them stay with it."""
    parts, ends_with_shape = list[str](), False
    text = load_pattern("taken_object").sub(r"\2 the \1", text)
    for part in english_rules.split_actions(text):
        tokens = tokenize(part)
        has_content = any(token.has(*CONTENT) or not token.is_known for token in tokens)
        if not has_content and not is_complete_by_itself(part):
            continue  # "two separate pictures please"
        if ends_with_shape and is_attribute(tokens):
            parts[-1] += f", {part}"
        elif parts and not ends_with_shape and is_attribute(tokenize(parts[-1])) and is_description(part):
            parts[-1] += f" {part}"  # "small. green. star."
            ends_with_shape = has_shape(part)
        else:
            parts.append(part)
            ends_with_shape = any(token.has("shape", "plural") for token in tokens)
    return parts or [text]


def is_description(part: str) -> bool:
    """Return whether a part of a turn only names a shape or its attributes."""
    return all(token.has("shape", "plural", *ATTRIBUTES) for token in tokenize(part))


def is_complete_by_itself(part: str) -> bool:
    is_talk = english_rules.QUESTION.search(part) or talk.find_small_talk(part)
    command = find_command(part, ())
    return bool(is_talk) or (command is not None and command.name != "cancel")  # "wait, make that yellow"


def is_attribute(tokens: Sequence[Token]) -> bool:
    """Return whether words only name colours, sizes, motions or places: "Blue. Falling."."""
    return bool(tokens) and all(
        token.has(*ATTRIBUTES) or (token.is_known and token.text in ("a", "very", "and", ",", "on", "it", "is"))
        for token in tokens
    ) and not any(token.has("make", "add", "remove", "put") for token in tokens)  # fmt: skip

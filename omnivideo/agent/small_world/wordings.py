"""The English wordings of the small world as compiled patterns, from prompts/keywords/wordings.toml."""

import re
import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from omnivideo.agent.english_rules import WordingPattern


@cache
def load_wordings() -> dict[str, Any]:
    """Read the file; the lines of a pattern are joined."""
    text = (files("omnivideo.agent") / "prompts/keywords/wordings.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def join_lines(text: str) -> str:
    return "".join(text.split("\n"))


@cache
def load_pattern(name: str) -> WordingPattern:
    """Return a pattern by its name in the file."""
    return WordingPattern(join_lines(load_wordings()[name]))


@cache
def load_small_talk() -> tuple[tuple[WordingPattern, str], ...]:
    """Return pairs of a pattern and what the MLLM is told instead."""
    return tuple(
        (WordingPattern(rf"(?:^|\b)(?:{join_lines(entry['pattern'])})"), entry["said"])
        for entry in load_wordings()["small_talk"]
    )


@cache
def load_foreign_words() -> frozenset[str]:
    return frozenset(load_wordings()["foreign"]["words"].split())


@cache
def load_weighty_words() -> frozenset[str]:
    return frozenset(load_wordings()["weighty"]["words"].split())


@cache
def load_contractions() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), full) for pattern, full in load_wordings()["contractions"].items())


@cache
def load_rewritings(name: str = "rewritings") -> tuple[tuple[WordingPattern, str], ...]:
    """Return pairs of a pattern of what is said around a request, and what stands for it."""
    return tuple((WordingPattern(join_lines(pattern)), full) for pattern, full in load_wordings()[name].items())

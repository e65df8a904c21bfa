"""Indirect requests against a solver of their prompts that is written from the tables alone."""

import random
import re
from collections import Counter

import pytest

from omnivideo.synthetic.captions import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    MOTION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    pluralize,
    to_canonical_text,
)
from omnivideo.synthetic.indirect_requests import (
    HELD_OUT_COMBINATIONS,
    KINDS,
    KINDS_WITH_HELD_OUT_FACTS,
    list_alternatives,
    sample_indirect_request,
)
from omnivideo.synthetic.knowledge import FACTS, NUMBERS, OPPOSITES, sample_knowledge_question
from omnivideo.synthetic.scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES

CORNERS = {"circle": 0, "triangle": 3, "square": 4, "star": 10}
SEEN_FIELDS = ("colour", "background", "shape", "size", "motion")
LONGEST_FIRST = sorted(FACTS, key=lambda fact: -len(fact.thing))
WORLD_COLOURS = {word for table in (COLOUR_WORDS, BACKGROUND_WORDS) for words in table.values() for word in words}


def contains(text: str, phrase: str) -> bool:
    return phrase in text and re.search(rf"(?<![\w-]){re.escape(phrase)}(?![\w'-])", text) is not None


def solve_facts(text: str) -> tuple[dict[str, str], str]:
    """Return the values of all things and numbers in the text, and the text without them."""
    solution = {}
    for fact in LONGEST_FIRST:
        if fact.kind == "second hop" and contains(text, fact.thing):
            text = text.replace(fact.thing, fact.value)
    for fact in LONGEST_FIRST:
        if not contains(text, fact.thing):
            continue
        if fact.kind in SEEN_FIELDS:
            is_opposite = re.search(rf"opposite[^,]*\b{re.escape(fact.thing)}", text)
            solution[fact.kind] = OPPOSITES[fact.value] if is_opposite else fact.value
        elif fact.kind in ("number", "arithmetic") and "count" not in solution:
            number = NUMBERS.index(fact.value)
            if fact.kind == "number":
                number = number * 2 if "twice" in text else number // 2 if "half as many" in text else number
                before = text[: text.index(fact.thing)]
                number += ("one more" in before) - (" less than" in before)
            solution["count"] = NUMBERS[number]
        else:
            continue
        text = re.sub(rf"[^,]*\b{re.escape(fact.thing)}[^,]*", " ", text) if fact.kind in SEEN_FIELDS[:2] else text
        text = re.sub(rf"\b{re.escape(fact.thing)}\b", " ", text)
    return solution, text


def solve_comparisons(text: str) -> dict[str, str]:
    solution = {}
    shapes = set(SHAPES)
    for pattern, holds in (
        (r"(?:more corners|but more) than a (\w+)", lambda shape, other: CORNERS[shape] > CORNERS[other]),
        (r"(?:fewer corners|but fewer) than a (\w+)", lambda shape, other: CORNERS[shape] < CORNERS[other]),
    ):
        for other in re.findall(pattern, text):
            shapes = {shape for shape in shapes if holds(shape, other)}
    if "than any other" in text:
        shapes = {(min if "fewer corners" in text else max)(SHAPES, key=CORNERS.__getitem__)}
    if "corners than" in text:
        (solution["shape"],) = shapes
    if match := re.search(r"\b(small|large) one\b", text):
        solution["size"] = OPPOSITES[match[1]]
    numbers = "|".join(NUMBERS)
    lower = re.search(rf"more than ({numbers})\b", text)
    upper = re.search(rf"fewer than ({numbers})\b", text)
    if lower and upper:
        candidates = range(NUMBERS.index(lower[1]) + 1, NUMBERS.index(upper[1]))
        (solution["count"],) = (NUMBERS[number] for number in candidates)
    return solution


def solve_negations(text: str) -> dict[str, str]:
    solution = {}
    if match := re.search(r"neither an? (\w+), an? (\w+) nor an? (\w+)", text):
        (solution["shape"],) = set(SHAPES) - set(match.groups())
    if match := re.search(r"not (small|large)\b", text):
        solution["size"] = OPPOSITES[match[1]]
    values = sorted({*(f"a {name}" for name in SHAPES), *COLOURS, *BACKGROUNDS, *MOTIONS}, key=len, reverse=True)
    pattern = rf"(?:moving |staying )?({'|'.join(values)})\b"
    for match in re.finditer(rf"{pattern} or {pattern}", text):
        nearby = text[max(match.start() - 30, 0) : match.start()] + text[match.end() :][:35]
        (excluded,) = {value for value in match.groups() if re.search(rf"not (moving |staying )?{value}\b", nearby)}
        (result,) = set(match.groups()) - {excluded}
        clause = text[max(text.rfind(",", 0, match.start() - 20), 0) : match.start()]
        if result.removeprefix("a ") in SHAPES:
            solution["shape"] = result.removeprefix("a ")
        elif result in MOTIONS:
            solution["motion"] = result
        else:
            solution["background" if re.search("background|backdrop", clause) else "colour"] = result
    return solution


def solve_opposites(text: str) -> dict[str, str]:
    solution = {}
    for value in re.findall(rf"opposite[^,]*? (?:moving |a )?({'|'.join(OPPOSITES)})\b", text):
        field = {"small": "size", "large": "size", "black": "background", "white": "background"}.get(value, "motion")
        solution[field] = OPPOSITES[value]
    return solution


def find_word(text: str, table: dict[str, tuple[str, ...]]) -> str | None:
    """Return the value of the longest of a table's words in the text."""
    pairs = sorted(
        ((word, value) for value, words in table.items() for word in words if word), key=lambda p: -len(p[0])
    )
    return next((value for word, value in pairs if contains(text, word) or contains(text, pluralize(word))), None)


def solve(prompt: str) -> dict[str, str | None]:
    """Return the values that a prompt gives to all fields."""
    by_facts, rest = solve_facts(prompt)
    solution: dict[str, str | None] = {
        **solve_comparisons(prompt), **solve_negations(prompt), **solve_opposites(rest), **by_facts
    }  # fmt: skip
    background = re.search(r"(?:on|against|in front of) (?:a )?(\w+)(?: background| backdrop)?$", prompt)
    background_word = {word: name for name, words in BACKGROUND_WORDS.items() for word in words}
    if background and background[1] in background_word and "background" not in solution:
        solution["background"] = background_word[background[1]]
    head = re.split(r"\b(?:on|against|in front of)\b", rest.replace("does not", "does_not"))[0]
    head = re.sub(r"[^,]*\bopposite[^,]*|or \w+|(?:small|large) one", "", head)
    motions = {name: words for name, words in MOTION_WORDS.items()}
    motions["still"] = (*motions["still"], "that do not move", "do not move", "not go anywhere", "not move")
    motions["still"] = (*motions["still"], "without moving")
    for field, table, text in (
        ("shape", SHAPE_WORDS, re.sub(r"corners[^,]*", "", head)),
        ("colour", COLOUR_WORDS, head),
        ("size", SIZE_WORDS, re.sub(r"getting \w+|becoming \w+", "", head)),
        ("motion", motions, rest.replace("does_not", "does not")),
    ):
        if field not in solution:
            solution[field] = find_word(text, table)
    if "count" not in solution:
        first = prompt.split()[0]
        solution["count"] = "one" if first in ("a", "an") else first
    return solution


@pytest.mark.parametrize("split", ["train", "held_out", "held_out_combinations"])
def test_solver_agrees_with_the_generator(split):
    rng = random.Random(f"solver/{split}")
    for index in range(2000):
        request = sample_indirect_request(rng, index % 2 == 0, split)
        solution, scene_spec = solve(request.prompt), request.scene_spec
        expected = {"count": NUMBERS[len(scene_spec.objects)], "background": scene_spec.background}
        expected |= {field: getattr(scene_spec.objects[0], field) for field in ("shape", "colour", "size", "motion")}
        assert {field: solution.get(field) for field in expected} == expected, request
        assert request.rewrite == to_canonical_text(scene_spec)


def test_reasoning_has_short_steps_and_prompts_vary():
    rng = random.Random("variety")
    requests = [sample_indirect_request(rng, index % 2 == 0) for index in range(5000)]
    assert len({request.prompt for request in requests}) >= 0.97 * len(requests)
    for request in requests:
        assert len(request.prompt.split()) <= 45
        assert 3 <= len(request.reasoning.split()) <= 50
        assert request.rewrite not in request.prompt
    kinds = Counter(kind for request in requests for kind in request.kinds)
    assert min(kinds[kind] for kind in KINDS) >= 300


def list_training_texts() -> list[str]:
    rng = random.Random("train")
    requests = [sample_indirect_request(rng, index % 2 == 0) for index in range(20_000)]
    assert not [request for request in requests for pair in HELD_OUT_COMBINATIONS if set(pair) <= set(request.kinds)]
    return [f"{request.prompt} | {request.reasoning}" for request in requests]


def test_training_has_no_held_out_facts_or_combinations():
    text = "\n".join(list_training_texts())
    for fact in FACTS:
        assert contains(text, fact.statement) or fact.is_held_out or fact.kind in ("second hop", "opposite"), fact
        if fact.is_held_out:
            assert not contains(text, fact.thing), fact
            assert not contains(text, fact.statement), fact
    for first, second in re.findall(r"\b(\w+) or (\w+) but not", text):
        field = "colour" if {first, second} <= set(COLOURS) else "background" if first in BACKGROUNDS else "motion"
        if first in MOTIONS:
            assert second not in list_alternatives(field, first, True)


def test_held_out_requests_use_held_out_facts():
    rng = random.Random("held out")
    held_out = [fact for fact in FACTS if fact.is_held_out]
    for kinds in [("association",), ("arithmetic",), ("two hops",), ("association", "two hops")]:
        for index in range(200):
            request = sample_indirect_request(rng, index % 2 == 0, "held_out", kinds)
            assert request.kinds == kinds
            assert any(contains(request.prompt, fact.thing) for fact in held_out), request
    for index in range(500):
        request = sample_indirect_request(rng, index % 2 == 0, "held_out_combinations")
        assert any(set(pair) <= set(request.kinds) for pair in HELD_OUT_COMBINATIONS)
        assert not any(contains(request.prompt, fact.thing) for fact in held_out)


def test_kinds_without_requests_are_refused():
    rng = random.Random(0)
    for kind in KINDS:
        assert sample_indirect_request(rng, True, "train", (kind,)).kinds == (kind,)
        if kind not in KINDS_WITH_HELD_OUT_FACTS:
            with pytest.raises(ValueError, match="no held-out facts"):
                sample_indirect_request(rng, True, "held_out", (kind,))
    with pytest.raises(ValueError, match="split 'train'"):
        sample_indirect_request(rng, True, "train", HELD_OUT_COMBINATIONS[0])


def test_things_are_unambiguous():
    things = Counter(fact.thing for fact in FACTS)
    assert max(things.values()) == 1
    lists = [fact for fact in FACTS if fact.kind in SEEN_FIELDS]
    for fact in lists:
        assert not [word for word in WORLD_COLOURS if contains(fact.thing, word)], fact
        assert not [other for other in FACTS if other is not fact and contains(other.thing, fact.thing)], fact
    for fact in FACTS:
        if fact.kind == "second hop":
            assert any(other.thing == fact.value for other in lists), fact


def test_a_third_of_the_facts_is_held_out_and_asked_about():
    for kind in (*SEEN_FIELDS, "number", "arithmetic", "second hop"):
        share = [fact.is_held_out for fact in FACTS if fact.kind == kind]
        assert 0.28 <= sum(share) / len(share) <= 0.4, kind
    rng = random.Random("questions")
    answers = {sample_knowledge_question(rng)[1] for _ in range(20_000)}
    assert answers == {fact.statement for fact in FACTS}

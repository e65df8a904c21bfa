"""Reasoning and text in answers that arrive in pieces, however they are cut."""

import itertools

import pytest

from omnivideo.agent.answer_text import end_at_stop, remove_reasoning, separate_reasoning, split_rewrite

ANSWERS = [
    ("a poem", "", "a poem"),
    ("<think>why</think>\n\na poem", "why", "a poem"),
    ("\n <think>why</think> a <think>how</think>poem", "whyhow", "a poem"),
    ("<think>it never ends", "it never ends", ""),
    ("a poem</think> more", "", "a poem more"),
    ("1 < 2 and a <thin line", "", "1 < 2 and a <thin line"),
    ("", "", ""),
]


def cut_in_all_ways(text: str, max_cuts: int = 2):
    """Yield the text as pieces, with up to `max_cuts` cuts at any places."""
    for count in range(max_cuts + 1):
        for places in itertools.combinations(range(1, len(text)), count):
            yield [text[start:end] for start, end in itertools.pairwise((0, *places, len(text)))]


@pytest.mark.parametrize(("answer", "reasoning", "text"), ANSWERS)
def test_reasoning_is_separated_wherever_the_pieces_are_cut(answer, reasoning, text):
    for pieces in [*cut_in_all_ways(answer), list(answer)]:
        parts = list(separate_reasoning(pieces))
        joined = {
            kind: "".join(piece for part_kind, piece in parts if part_kind == kind) for kind in ("thinking", "text")
        }
        assert joined == {"thinking": reasoning, "text": text}, pieces
        assert all(piece for _, piece in parts)
    assert remove_reasoning(answer) == text.strip()


def test_text_is_not_held_back_longer_than_a_mark_may_begin():
    pieces = iter(["one ", "two <", "b ", "three"])
    parts = separate_reasoning(pieces)
    assert next(parts) == ("text", "one ") and next(parts) == ("text", "two ") and next(parts) == ("text", "<b ")


@pytest.mark.parametrize(
    ("stop", "text"), [((), "one two three"), (("two",), "one "), (("w", "tw"), "one "), (("x",), "one two three")]
)
def test_a_stop_sequence_ends_the_text_wherever_the_pieces_are_cut(stop, text):
    for pieces in cut_in_all_ways("one two three"):
        parts = end_at_stop(((("text", piece)) for piece in pieces), stop)
        assert "".join(piece for _, piece in parts) == text, pieces


def test_a_stop_sequence_does_not_end_the_reasoning():
    parts = [("thinking", "one two"), ("text", "three two four")]
    assert list(end_at_stop(parts, ["two"])) == [("thinking", "one two"), ("text", "three ")]


def test_a_rewrite_has_no_reasoning():
    assert split_rewrite("<think>why</think> a ball <think>more</think>") == ("why", "a ball")
    assert split_rewrite("<think>it never ends") == ("it never ends", "")

"""1627 things that people say, beside the list of the evaluation: what the reading of words plans for each of them.

They were written before the rules that read them, in the voices of different people, in eight batches: `more` (788),
and `fresh` to `fresh7`, each of which was judged once before anything was changed for it.
"""

from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from omnivideo.evaluation.phrases.entries import Kind, Phrase
from tests.support.planned_conversations import PlannedConversation, judge_planned

LIST = Path(__file__).with_name("more_phrases.jsonl")
MIN_RIGHT, MAX_WRONG_CLIP = 0.97, 0.01


def test_what_people_say_is_planned_as_they_expect():
    phrases = [Phrase.model_validate_json(line) for line in LIST.read_text(encoding="utf-8").splitlines()]
    assert {phrase.kind for phrase in phrases} == set(get_args(Kind)) and len(phrases) > 1600
    verdicts = [(phrase, judge_planned(phrase)) for phrase in phrases]
    counts = Counter(verdict.judgement for _, verdict in verdicts)
    failures = [(phrase.id, phrase.text, verdict.reason) for phrase, verdict in verdicts if verdict.reason]
    assert counts["right"] >= MIN_RIGHT * len(phrases), failures
    assert counts["wrong_clip"] <= MAX_WRONG_CLIP * len(phrases), failures


# ---------------------------------------------------------------- the mechanisms


def say(text, *before):
    conversation = PlannedConversation()
    for message in before:
        conversation.say(message)
    return conversation.say(text)


RED, BLUE_STAR = "a picture of a red circle on a black background", "a picture of a blue star on a grey background"
PAIR = "a picture of a red circle and a blue square on a white background"


def list_objects(outcome):
    return [{(obj.shape, obj.colour) for obj in artifact.facts.objects} for artifact in outcome.artifacts]


@pytest.mark.parametrize(
    "text",
    [
        "My teacher asked for a green triangle.", "Hi! I am Bob and I teach maths, could you draw a green triangle?",
        "if it is not too much trouble, a green triangle please, for my class", "all I need is a green triangle",
        "would you be able to draw a green triangle? Best regards, Rolf",
    ],
)  # fmt: skip
def test_what_is_said_around_a_request_is_dropped(text):
    assert list_objects(say(text)) == [{("triangle", "green")}]


@pytest.mark.parametrize("text", ["a green triangle, exploding into sparks", "a red circle with my cat on it"])
def test_a_clause_that_may_be_a_part_of_the_wish_is_not_dropped(text):
    outcome = say(text)
    assert not outcome.artifacts and (outcome.declined or outcome.is_question)


def test_a_word_is_taken_back_at_once():
    assert list_objects(say("make it white... no, yellow", RED)) == [{("circle", "yellow")}]
    assert list_objects(say("make it white. sorry, make it yellow", RED)) == [{("circle", "yellow")}]
    assert say("make it white and make it yellow", RED).is_question


def test_what_must_stay_is_not_changed():
    for text in ("remove the circle but leave it there", "turn it white but do not change the colour"):
        assert say(text, RED).is_question, text
    assert list_objects(say("make it white but keep the shape", RED)) == [{("circle", "white")}]


def test_a_change_refers_to_what_the_turn_has_made_before():
    outcome = say("replace the square with a star and make everything green", PAIR)
    assert list_objects(outcome)[-1] == {("circle", "green"), ("star", "green")}
    same = say("make the circle the same colour as the square", PAIR)
    assert list_objects(same) == [{("circle", "blue"), ("square", "blue")}]


def test_several_results_are_named_together():
    assert [artifact.sources for artifact in say("make both of them green", RED, BLUE_STAR).artifacts] == [(1,), (2,)]
    assert [artifact.sources for artifact in say("the other one in white", RED, BLUE_STAR).artifacts] == [(1,)]


def test_a_missing_object_is_added():
    for text in (
        "it needs a green star",
        "there should also be a green star",
        "give me a green star beside the circle",
    ):
        outcome = say(text, RED)
        assert list_objects(outcome) == [{("circle", "red"), ("star", "green")}], text
        assert [artifact.sources for artifact in outcome.artifacts] == [(1,)]


def test_redo_shows_what_was_undone():
    (command,) = say("redo", RED, "make it blue", "undo").commands
    assert (command.name, command.arguments) == ("resend", {"which": 2})


def test_a_file_is_written_of_the_named_result():
    (command,) = say("save the first one as one.png", RED, BLUE_STAR).commands
    assert command.arguments == {"which": 1, "file": "one.png"}


@pytest.mark.parametrize(
    ("text", "shape"), [("a bleu squar", "square"), ("an orenge circle", "circle"), ("draw teh red cirlce", "circle")]
)
def test_misspelt_words_are_read(text, shape):
    assert [shape for objects in list_objects(say(text)) for shape, _ in objects] == [shape]


def test_other_words_are_not_corrected():
    for text in ("a squire", "write a poem", "a red stair"):
        assert not say(text).artifacts, text


def test_objects_are_named_by_place_and_exclusion():
    for text in (
        "everything but the circle in green",
        "make the one on the right green",
        "the rightmost shape in green",
    ):
        assert list_objects(say(text, PAIR)) == [{("circle", "red"), ("square", "green")}], text
    assert list_objects(say("delete whatever is not blue", PAIR)) == [{("square", "blue")}]
    both = say("paint the circle and the square yellow", PAIR)
    assert list_objects(both)[-1] == {("circle", "yellow"), ("square", "yellow")}


def test_a_phrase_is_taken_back_at_once():
    text = "draw a red star, no, hang on, a blue circle, on white"
    assert list_objects(say(text)) == [{("circle", "blue")}]
    assert list_objects(say("a red circle, no, a square")) == [{("square", "red")}]
    assert say("three stars and no stars").is_question


def test_a_list_of_attributes_is_a_request():
    assert list_objects(say("shape=star; colour=red; background=pink")) == [{("star", "red")}]
    assert list_objects(say("colour: blue, background: pink", RED))[-1] == {("circle", "blue")}


def test_the_items_of_a_list_are_actions():
    outcome = say("1. a red circle\n2. make it blue\n3. tell me what colour it is")
    assert list_objects(outcome) == [{("circle", "red")}, {("circle", "blue")}] and outcome.reply


def test_another_number_of_equal_objects_is_drawn_anew():
    (artifact,) = say("now three of them", BLUE_STAR).artifacts
    assert len(artifact.facts.objects) == 3 and artifact.facts.background == "grey" and not artifact.sources


def test_nothing_is_made_if_a_part_is_left_out():
    for text in (
        "purple square instead of the circle and a pink background as it were",
        "three pictures, a red circle",
    ):
        outcome = say(text, RED)
        assert not outcome.artifacts and outcome.is_question, text

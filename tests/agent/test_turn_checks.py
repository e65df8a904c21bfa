"""What the readings of a turn do not account for leads to a question, and never to a wrong result."""

from collections import Counter
from pathlib import Path

import pytest

from omnivideo.agent.small_world.changed_scenes import read_planned_scene
from omnivideo.agent.small_world.lexicon import tokenize
from omnivideo.agent.small_world.scenes import read_scene
from omnivideo.evaluation.phrases.entries import Phrase
from tests.agent.test_more_phrases import BLUE_STAR, PAIR, RED, list_objects, say
from tests.support.planned_conversations import Result, judge_planned, make_artifact

LIST = Path(__file__).with_name("fresh_eyes_phrases.jsonl")
MIN_RIGHT, MAX_WRONG_CLIP = 0.90, 0.03
CLIP = "a clip of a blue square moving right on a white background"
TWO_CIRCLES = "a picture of a green circle and a red circle on a grey background"


def is_question(text, *before):
    outcome = say(text, *before)
    return outcome.is_question and not outcome.artifacts


# ---------------------------------------------------------------- which object


@pytest.mark.parametrize("text", ["make it green", "green", "turn it into a star", "and a third one, orange"])
def test_it_is_asked_for_if_there_are_several_objects(text):
    assert is_question(text, PAIR)


def test_it_is_what_the_request_before_names():
    assert list_objects(say("no, a yellow one", RED, "add a blue star")) == [{("circle", "red"), ("star", "yellow")}]


def test_one_of_two_equal_shapes_is_asked_for():
    assert is_question("make the circle blue", TWO_CIRCLES)
    assert list_objects(say("make the red circle blue", TWO_CIRCLES)) == [{("circle", "green"), ("circle", "blue")}]


def test_the_colour_of_one_of_two_equal_shapes_is_exchanged():
    assert list_objects(say("recolour the red one to blue", TWO_CIRCLES)) == [{("circle", "green"), ("circle", "blue")}]


# ---------------------------------------------------------------- the effect


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("delete the circle and the square", PAIR),
        ("make it red", RED),
        ("make it black", BLUE_STAR.replace("grey", "black")),
        ("make the circle white", "a picture of a red circle and a blue square on a white background"),
        ("a white circle, white background", RED),
    ],
)
def test_changes_that_nobody_would_see_lead_to_a_question(text, before):
    outcome = say(text, before)
    assert not outcome.artifacts and (outcome.is_question or outcome.declined)


def test_what_was_requested_counts_where_the_mllm_sees_less():
    artifacts = [
        make_artifact(1, Result(read_scene(tokenize(PAIR)), "image")),
        make_artifact(2, Result(read_scene(tokenize("make the circle green")), "image", (1,))),
    ]
    artifacts = [
        artifacts[0].model_copy(update={"caption": PAIR}),
        artifacts[1].model_copy(update={"caption": "make the circle green"}),
    ]
    scene = read_planned_scene(artifacts, 2)
    assert [(obj.colour, obj.shape) for obj in scene.objects] == [("green", "circle"), ("blue", "square")]
    unclear = artifacts[1].model_copy(update={"caption": "make it the colour of grass"})
    assert read_planned_scene([artifacts[0], unclear], 2) is None


# ---------------------------------------------------------------- words that are left over


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("make the circle's edge white", (RED,)),
        ("make the blue one disappear slowly", (PAIR,)),
        ("circle too", (PAIR,)),
        ("a blue circle left of itself", ()),
        ("either a circle or a square, in green", ()),
        ("a half red, half blue circle", ()),
        ("the Eiffel tower as a blue triangle", ()),
        ("Times Square in blue", ()),
        ("a yellow circle like the sun on a blue background", ()),
    ],
)
def test_words_that_no_reading_has_lead_to_a_question(text, before):
    outcome = say(text, *before)
    assert not outcome.artifacts and (outcome.is_question or outcome.declined)


# ---------------------------------------------------------------- conditions


def test_a_request_is_done_if_its_condition_holds():
    assert list_objects(say("if it is red, make it blue", RED)) == [{("circle", "blue")}]
    assert list_objects(say("make it blue if it's a circle", RED)) == [{("circle", "blue")}]
    assert list_objects(say("if there is no star, add a green star", RED)) == [{("circle", "red"), ("star", "green")}]
    assert list_objects(say("if it is green, make it blue, otherwise make it white", RED)) == [{("circle", "white")}]


@pytest.mark.parametrize(
    "text",
    [
        "if it is green, make it blue",
        "unless it is red, make it white",
        "if there is a star, remove it",
        "if it looks sad, make it blue",
    ],
)
def test_a_request_is_not_done_if_its_condition_does_not_hold(text):
    assert is_question(text, RED)


# ---------------------------------------------------------------- lists and additions


@pytest.mark.parametrize(
    "text",
    [
        "circle: green, square: yellow", "circle green; square yellow; bg black",
        "changes: circle to green, square to yellow, background black",
    ],
)  # fmt: skip
def test_a_list_of_changes_changes_what_is_there(text):
    outcome = say(text, PAIR)
    assert list_objects(outcome)[-1] == {("circle", "green"), ("square", "yellow")}
    assert all(artifact.sources for artifact in outcome.artifacts)


def test_an_item_of_a_list_may_change_nothing_or_remove():
    assert list_objects(say("circle green, square stays, background black", PAIR))[-1] == {
        ("circle", "green"),
        ("square", "blue"),
    }
    assert list_objects(say("circle green, square gone", PAIR))[-1] == {("circle", "green")}


def test_another_one_stands_next_to_the_first():
    assert list_objects(say("and next to it a blue one", RED)) == [{("circle", "red"), ("circle", "blue")}]
    assert list_objects(say("put a green triangle in and take the circle out", PAIR))[-1] == {
        ("square", "blue"),
        ("triangle", "green"),
    }


def test_a_new_object_keeps_its_place():
    (artifact,) = say("give me also a small green star in the top right", RED).artifacts
    assert artifact.facts.objects[-1].x > artifact.facts.objects[0].x


# ---------------------------------------------------------------- a list that was written without looking at the rules


def test_what_was_written_without_the_rules_is_planned_or_asked():
    phrases = [Phrase.model_validate_json(line) for line in LIST.read_text(encoding="utf-8").splitlines()]
    verdicts = [(phrase, judge_planned(phrase)) for phrase in phrases]
    counts = Counter(verdict.judgement for _, verdict in verdicts)
    failures = [(phrase.id, phrase.text, verdict.reason) for phrase, verdict in verdicts if verdict.reason]
    assert counts["right"] >= MIN_RIGHT * len(phrases), failures
    assert counts["wrong_clip"] <= MAX_WRONG_CLIP * len(phrases), failures

"""A turn that would generate too much leads to a question, which is asked once and costs no further model call."""

import pytest

from omnivideo.agent.turn_plan import build_limit_question
from omnivideo.turns import QuestionAsked
from tests.support.conversations import Conversation

COLOURS = ("red", "blue", "green", "yellow", "orange", "purple")
MANY = " ".join(f"a {colour} circle." for colour in COLOURS)


def ask_for_many() -> Conversation:
    conversation = Conversation()
    asked = conversation.say(MANY)
    assert isinstance(asked, QuestionAsked)
    assert asked.text == build_limit_question(len(COLOURS), 4)
    assert conversation.queue.jobs == []
    return conversation


def test_agreement_generates_the_first_ones():
    conversation = ask_for_many()
    calls_before_reply = len(conversation.mllm.asks)
    turn = conversation.say("yes")
    assert [result.artifact.caption for result in turn.results] == [f"a {colour} circle" for colour in COLOURS[:4]]
    routed = [request.text for request in conversation.mllm.asks[calls_before_reply:]]
    assert len(routed) == len(set(routed)) <= 4, "the turn was not planned again"


def test_another_reply_replaces_the_turn():
    conversation = ask_for_many()
    turn = conversation.say("a white star")
    assert len(conversation.queue.jobs) == 1
    assert "white star" in turn.results[0].artifact.caption


def test_a_reply_that_is_too_long_is_bounded_without_another_question():
    conversation = ask_for_many()
    turn = conversation.say(MANY)
    assert len(turn.results) == len(conversation.queue.jobs) == 4


@pytest.mark.parametrize("text", ["a red circle. a blue circle. a green circle. a yellow circle.", "a red circle"])
def test_a_turn_within_the_limit_is_not_asked_about(text):
    assert not isinstance(Conversation().say(text), QuestionAsked)

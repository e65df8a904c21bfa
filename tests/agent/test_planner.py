"""The planner with in-memory twins: splitting turns, references, questions, forks and recovery."""

import random
import re
import sqlite3

import pytest
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.config import get_config

from omnivideo.agent import english_rules
from omnivideo.agent.thread import Thread
from omnivideo.contracts import StepProgress
from omnivideo.errors import InvalidInput, JobCancelled
from omnivideo.synthetic.chat import make_talk_example
from omnivideo.synthetic.edits import sample_edit
from omnivideo.synthetic.questions import sample_question
from omnivideo.synthetic.requests import make_caption_prompt, make_indirect_prompt
from omnivideo.synthetic.scenes import sample_scene
from omnivideo.turns import ArtifactReady, PromptRewritten, QuestionAsked, ThinkingDelta
from tests.support.conversations import Conversation, attach
from tests.support.twins import ScriptedMLLM


@pytest.mark.parametrize(
    ("text", "actions"),
    [
        ("a red ball bounces in; now make it blue; how many balls are there?",
         ["a red ball bounces in", "make it blue", "how many balls are there?"]),
        ("make a blue square, then turn it green and tell me how many corners it has",
         ["make a blue square", "turn it green", "how many corners it has"]),
        ("a small red circle and a blue square on white", ["a small red circle and a blue square on white"]),
        ("two stars. Make them green! what do you see?", ["two stars", "Make them green", "what do you see?"]),
        ("add a red star and paint the circle green", ["add a red star", "paint the circle green"]),
    ],
)  # fmt: skip
def test_a_turn_is_split_into_its_actions(text, actions):
    assert english_rules.split_actions(text) == actions


@pytest.mark.parametrize(
    "text", ["make it blue", "add a red star", "how many objects are there?", "what colour is the circle?",
             "put it on a pink background", "let the star grow"],
)  # fmt: skip
def test_references_to_existing_artifacts_are_recognised(text):
    assert english_rules.is_reference(text)


@pytest.mark.parametrize(
    "text", ["make a blue square", "draw a star", "what colour is a lemon?", "hello", "three red stars",
             "a shape like a coin, it sleeps like a stone", "i want a red circle"],
)  # fmt: skip
def test_other_texts_are_not_references(text):
    assert not english_rules.is_reference(text)


def test_each_turn_builds_on_the_last():
    conversation = Conversation()
    first = conversation.say("a red ball moving left; now make it blue; how many balls are there?")
    generated, blue, counted = first.results
    assert (generated.goal, blue.goal, counted.goal) == ("generate", "edit", "understand")
    assert blue.artifact.source == generated.artifact.key
    assert counted.answer == "it is make it blue"
    assert conversation.queue.jobs[1].source == generated.artifact
    assert conversation.say("make it green").results[0].artifact.source == blue.artifact.key
    assert [turn.number for turn in conversation.thread.get_turns()] == [1, 2]


def test_progress_and_artifacts_are_streamed():
    conversation = Conversation()
    conversation.say("a red ball")
    assert [(event.step, event.steps) for event in conversation.list_events(StepProgress)] == [(1, 2), (2, 2)]
    assert [event.final for event in conversation.list_events(ArtifactReady)] == [True]


def test_thinking_rewrites_the_prompt():
    conversation = Conversation()
    result = conversation.say("a shape like a coin", think="auto").results[0]
    assert conversation.queue.jobs[0].prompt == "plainly a shape like a coin" == result.trace.rewrite
    assert [event.delta for event in conversation.list_events(ThinkingDelta)] == ["because"]
    assert conversation.list_events(PromptRewritten)[0].trace.reasoning == "because"
    assert conversation.say("a red ball on white", think="auto").results[0].trace is None
    assert conversation.say("a red ball on white", think="on").results[0].trace is not None
    assert conversation.say("a shape like a coin", think="off").results[0].trace is None
    assert conversation.say("how are you?", think="on").results[0].trace is None


def test_ordinals_and_descriptions_find_earlier_clips():
    conversation = Conversation()
    red = conversation.say("a red ball").results[0].artifact
    picture = conversation.say("a picture of a green star").results[0].artifact
    assert conversation.say("make the first clip yellow").results[0].artifact.source == red.key
    assert conversation.say("go back to the green one").results[0].artifact == picture
    assert conversation.say("turn it purple").results[0].artifact.source == picture.key
    assert conversation.say("make the red clip cyan").results[0].artifact.source == red.key


def test_a_missing_reference_is_asked_for():
    conversation = Conversation()
    assert conversation.say("make it blue").text.startswith("There is nothing to change yet")
    assert conversation.thread.get_open_question()
    turn = conversation.say("a red ball")
    assert turn.results[0].goal == "generate" and turn.clarifications[0][1] == "a red ball"
    question = conversation.say("go back to the purple one")
    assert "no purple one" in question.text and "a red ball" in question.text
    assert isinstance(conversation.say("the green one"), QuestionAsked)  # the question is asked again
    assert conversation.say("number 1").results[0].artifact == turn.results[0].artifact


def test_an_uncertain_route_is_asked_for():
    conversation = Conversation()
    conversation.mllm.doubt.add("a red star")
    assert "picture" in conversation.say("a red star").text
    assert conversation.say("a picture, please").results[0].artifact.medium == "image"


def test_check_tries_other_seeds_and_keeps_the_best_clip():
    conversation = Conversation()
    conversation.mllm.agreements = [0.1, 0.4, 0.2]
    result = conversation.say("a red ball", check=3).results[0]
    assert [candidate.agreement for candidate in result.candidates] == [0.1, 0.4, 0.2]
    assert len({candidate.seed for candidate in result.candidates}) == 3
    assert result.artifact == result.candidates[1].artifact
    conversation.mllm.agreements = [0.2, 0.9]
    assert len(conversation.say("a blue ball", check=4).results[0].candidates) == 2
    assert [event.final for event in conversation.list_events(ArtifactReady)] == [False, False, True]


def test_a_fork_is_independent_of_its_thread():
    conversation = Conversation()
    red = conversation.say("a red ball").results[0].artifact
    conversation.say("make it blue")
    branch = conversation.thread.fork(1, "branch")
    artifact = list(branch.send("make it green"))[-1].turn.results[0].artifact
    assert artifact.source == red.key
    assert [turn.text for turn in branch.get_turns()] == ["a red ball", "make it green"]
    assert [turn.text for turn in conversation.thread.get_turns()] == ["a red ball", "make it blue"]
    assert [artifact.caption for artifact in branch.get_lineage()] == ["make it green", "a red ball"]
    assert conversation.thread.fork(0, "empty").get_turns() == []
    with pytest.raises(InvalidInput, match="turn: 5 is not a turn of this thread: 0 to 2"):
        conversation.thread.fork(5, "other")


def test_invalid_input_leaves_the_thread_usable():
    conversation = Conversation()
    for text, options, field in (("", {}, "text"), ("x", {"check": 0}, "check"), ("x", {"think": "hard"}, "think")):
        with pytest.raises(InvalidInput, match=f"^{field}: "):
            conversation.say(text, **options)
    conversation.queue.fails = JobCancelled("the clip was cancelled")
    conversation.say("hello")
    with pytest.raises(JobCancelled):
        conversation.say("a red ball, then make it blue")
    conversation.queue.fails = None
    assert conversation.thread.get_artifacts() == []
    assert conversation.say("a blue ball").number == 2
    with pytest.raises(InvalidInput, match="there is no thread"):
        Thread(conversation.graph, "nobody", attach).require_existing()
    with pytest.raises(InvalidInput, match="is not a thread id"):
        Thread(conversation.graph, "../etc", attach)


def test_an_interrupted_turn_resumes_to_the_same_artifacts(tmp_path):
    """Interrupt the turn after each number of events; a new planner over the same database has the same artifacts."""
    texts = ("a red ball; now make it blue; how many balls are there?", "make it green")
    uninterrupted = Conversation()
    for text in texts:
        uninterrupted.say(text)
    expected = [artifact.key for artifact in uninterrupted.thread.get_artifacts()]
    for event_count in range(10):
        path = tmp_path / f"{event_count}.sqlite"
        conversation = Conversation(SqliteSaver(sqlite3.connect(path, check_same_thread=False)))
        running = conversation.thread.send(texts[0])
        for _ in range(event_count):
            next(running)
        del running
        resumed = Conversation(SqliteSaver(sqlite3.connect(path, check_same_thread=False)))
        if event_count == 0:
            resumed.say(texts[0])
        resumed.say(texts[1])
        assert [artifact.key for artifact in resumed.thread.get_artifacts()] == expected, event_count


async def collect(conversation):
    return [event async for event in conversation.thread.asend("a red ball")]


def test_the_async_interface_yields_the_same_events():
    import asyncio

    conversation = Conversation()
    kinds = [event.kind for event in asyncio.run(collect(conversation))]
    assert kinds == ["plan", "action", "step", "step", "artifact", "done"]


def test_a_turn_refers_to_its_attachment():
    conversation = Conversation()
    results = conversation.say("a red ball; make it blue", attachments=["cat.png"]).results
    assert results[0].artifact.source == "cat.png"
    assert results[1].artifact.source == results[0].artifact.key


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("describe these", ["cat.png", "dog.png"]),
        ("how many circles are there?", ["cat.png", "dog.png"]),
        ("describe the first picture", ["cat.png"]),
        ("make the first picture green", ["cat.png"]),
        ("make it green", ["dog.png"]),
    ],
)
def test_a_turn_refers_to_several_attachments(text, sources):
    results = Conversation().say(text, attachments=["cat.png", "dog.png"]).results
    assert [result.action.source for result in results] == sources


def make_edit_instruction(rng, video):
    kinds = ("recolour", "reshape", "remove", "background", "resize", "replace", "swap", "place")
    return sample_edit(rng, video, kinds=kinds).instruction


def make_question(rng, video):
    return sample_question(rng, sample_scene(rng, video)).text


@pytest.mark.parametrize(
    ("make_text", "is_reference", "is_indirect"),
    [
        (make_edit_instruction, True, None),
        (make_question, True, None),
        (lambda rng, video: make_caption_prompt(rng, video)[0], False, False),
        (lambda rng, video: make_indirect_prompt(rng, video)[0], False, True),
        (lambda rng, video: make_talk_example(rng, video).text, None, None),
    ],
    ids=["edits", "questions", "captions", "riddles", "talk"],
)
def test_kinds_of_requests_are_distinguished(make_text, is_reference, is_indirect):
    """Check that each of 600 texts is one action, names no artifact, and is a reference or indirect as expected."""
    rng = random.Random(11)
    correct_count = 0
    for index in range(600):
        actions = english_rules.split_actions(make_text(rng, index % 2 == 0))
        is_correct = (
            len(actions) == 1
            and english_rules.find_description(actions[0]) is None
            and is_reference in (None, english_rules.is_reference(actions[0]))
        )
        should_think = english_rules.is_indirect(actions[0]) or english_rules.has_other_words(actions[0])
        correct_count += is_correct and is_indirect in (None, should_think)
    assert correct_count >= 594


def test_plain_words_are_those_of_direct_requests():
    """A request in other words is thought about first; nothing in a direct request is an other word."""
    rng = random.Random(12)
    for index in range(2000):
        words = set(re.findall(r"[a-z0-9'-]+", make_caption_prompt(rng, index % 2 == 0)[0].lower()))
        assert words <= english_rules.load_plain_words()
        assert not english_rules.has_other_words(make_edit_instruction(rng, index % 2 == 0))
    assert english_rules.has_other_words("a dragon over the sea")
    assert english_rules.has_other_words("ein roter Kreis")


def test_joined_actions_are_split_where_they_were_joined():
    rng = random.Random(12)
    correct_count = 0
    for index in range(300):
        parts = [
            make_caption_prompt(rng, index % 2 == 0)[0],
            make_edit_instruction(rng, index % 2 == 0),
            make_question(rng, index % 2 == 0),
        ]
        parts = [part for part in parts if part == english_rules.split_actions(part)[0]]
        joined = rng.choice(("; ", ", then ", ". ", ", and then ", "; now ")).join(parts)
        correct_count += english_rules.split_actions(joined) == [part.strip(".!") for part in parts]
    assert correct_count >= 285


class ForgetfulMLLM(ScriptedMLLM):
    """Describes each artifact differently every time, and records the node in which it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def record_call(self) -> None:
        self.calls.append(get_config()["metadata"]["langgraph_node"])

    def route(self, request):
        self.record_call()
        return super().route(request)

    def stream_text(self, request):
        self.record_call()
        if request.text.startswith("describe"):
            yield f"a thing {len(self.calls)}"
        else:
            yield from super().stream_text(request)


def test_a_reply_is_taken_as_the_question_was_asked():
    """A node that interrupts runs again; what a model says before could differ, and the reply be dropped."""
    conversation = Conversation(mllm=ForgetfulMLLM())
    for text in ("a picture of a red ball", "a picture of a blue ball"):
        conversation.say(text)
    question = conversation.say("make the square in the green picture yellow")
    assert isinstance(question, QuestionAsked) and "There is no green here" in question.text
    named = re.search(r"1\) the picture: (a thing \d+)", question.text)
    assert named is not None
    turn = conversation.say(named[1])
    first = conversation.thread.get_artifacts()[0]
    assert turn.results[0].action.source == first.key and turn.clarifications == ((question.text, named[1]),)


def test_no_model_is_called_in_a_node_that_interrupts():
    conversation = Conversation(mllm=ForgetfulMLLM())
    conversation.mllm.doubt.add("a red thing")
    for text in ("make it blue", "a red ball", "a red thing", "a picture, please", "go back to the purple one",
                 "the green one", "number 1"):  # fmt: skip
        conversation.say(text)
    assert len(conversation.thread.get_turns()) == 3 and conversation.mllm.calls
    assert set(conversation.mllm.calls) <= {"plan", "search", "think"}  # "limit", "refer", "route" and "ask" interrupt

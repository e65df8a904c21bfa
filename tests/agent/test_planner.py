"""The planner over in-memory twins: what a turn does, asks, keeps and survives."""

import json
import random
import sqlite3
from collections.abc import Iterator

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver

from omnivideo.agent import english_rules
from omnivideo.agent.graph import Planner, load_prompts
from omnivideo.agent.thread import Thread
from omnivideo.contracts import Artifact, MLLMRequest, StepProgress
from omnivideo.errors import InvalidInput, JobCancelled
from omnivideo.presets import OMNIVIDEO_1_3B, TINY
from omnivideo.synthetic.chat import make_talk_example
from omnivideo.synthetic.edits import sample_edit
from omnivideo.synthetic.questions import sample_question
from omnivideo.synthetic.requests import make_caption_prompt, make_indirect_prompt
from omnivideo.synthetic.scenes import sample_scene
from omnivideo.turns import ArtifactReady, PromptRewritten, QuestionAsked, ThinkingDelta, Turn, TurnCompleted
from tests.support.twins import InstantQueue, ScriptedMLLM


class Talk:
    """A thread over twins, with what it saw."""

    def __init__(self, saver=None, name="talk", mllm=None, preset=TINY):
        self.mllm, self.queue = mllm or ScriptedMLLM(), InstantQueue()
        planner = Planner(self.mllm, self.queue, preset)
        self.graph = planner.build_graph(saver or InMemorySaver())
        self.thread = Thread(self.graph, name, attach)
        self.events: list = []
        if not self.thread.exists():
            self.thread.initialize_state()

    def say(self, text, **options) -> Turn | QuestionAsked:
        self.events = list(self.thread.send(text, **options))
        last = self.events[-1]
        return last.turn if isinstance(last, TurnCompleted) else last

    def seen(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


def attach(path, made_by):
    return Artifact(
        key=str(path), medium="image", width=64, height=64, frames=1, fps=1.0, caption=str(path), created_by=made_by
    )


@pytest.mark.parametrize(
    ("text", "pieces"),
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
def test_a_turn_is_split_into_its_acts(text, pieces):
    assert english_rules.split_actions(text) == pieces


@pytest.mark.parametrize(
    "text", ["make it blue", "add a red star", "how many objects are there?", "what colour is the circle?",
             "put it on a pink background", "let the star grow"],
)  # fmt: skip
def test_some_words_are_about_what_is_there(text):
    assert english_rules.is_reference(text)


@pytest.mark.parametrize(
    "text", ["make a blue square", "draw a star", "what colour is a lemon?", "hello", "three red stars",
             "a shape like a coin, it sleeps like a stone", "i want a red circle"],
)  # fmt: skip
def test_some_words_are_not(text):
    assert not english_rules.is_reference(text)


def test_each_turn_builds_on_the_last():
    talk = Talk()
    first = talk.say("a red ball bounces in; now make it blue; how many balls are there?")
    drawn, blue, counted = first.results
    assert (drawn.goal, blue.goal, counted.goal) == ("generate", "edit", "understand")
    assert blue.artifact.source == drawn.artifact.key
    assert counted.answer == "it is make it blue"
    assert talk.queue.jobs[1].source == drawn.artifact
    assert talk.say("make it green").results[0].artifact.source == blue.artifact.key
    assert [turn.number for turn in talk.thread.get_turns()] == [1, 2]


def test_progress_and_artifacts_are_told_as_they_come():
    talk = Talk()
    talk.say("a red ball")
    assert [(event.step, event.steps) for event in talk.seen(StepProgress)] == [(1, 2), (2, 2)]
    assert [event.final for event in talk.seen(ArtifactReady)] == [True]


def test_thinking_rewrites_what_is_drawn():
    talk = Talk()
    done = talk.say("a shape like a coin", think="auto").results[0]
    assert talk.queue.jobs[0].prompt == "plainly a shape like a coin" == done.trace.rewrite
    assert [event.delta for event in talk.seen(ThinkingDelta)] == ["because"]
    assert talk.seen(PromptRewritten)[0].trace.reasoning == "because"
    assert talk.say("a red ball on white", think="auto").results[0].trace is None
    assert talk.say("a red ball on white", think="on").results[0].trace is not None
    assert talk.say("a shape like a coin", think="off").results[0].trace is None
    assert talk.say("how are you?", think="on").results[0].trace is None


def test_ordinals_and_looks_find_earlier_clips():
    talk = Talk()
    red = talk.say("a red ball").results[0].artifact
    picture = talk.say("a picture of a green star").results[0].artifact
    assert talk.say("make the first clip darker").results[0].artifact.source == red.key
    assert talk.say("go back to the green one").results[0].artifact == picture
    assert talk.say("turn it brown").results[0].artifact.source == picture.key
    assert talk.say("make the red clip slower").results[0].artifact.source == red.key


def test_what_is_not_there_is_asked_for():
    talk = Talk()
    assert talk.say("make it blue").text.startswith("There is nothing to change yet")
    assert talk.thread.get_open_question()
    turn = talk.say("a red ball")
    assert turn.results[0].goal == "generate" and turn.clarifications[0][1] == "a red ball"
    question = talk.say("go back to the purple one")
    assert "no purple one" in question.text and "a red ball" in question.text
    assert isinstance(talk.say("the green one"), QuestionAsked)  # asks again
    assert talk.say("number 1").results[0].artifact == turn.results[0].artifact


def test_a_route_that_is_a_toss_up_is_asked_for():
    talk = Talk()
    talk.mllm.doubt.add("a red thing")
    assert "picture" in talk.say("a red thing").text
    assert talk.say("a picture, please").results[0].artifact.medium == "image"


def test_check_tries_other_seeds_and_keeps_the_best():
    talk = Talk()
    talk.mllm.agreements = [0.1, 0.4, 0.2]
    done = talk.say("a red ball", check=3).results[0]
    assert [one.agreement for one in done.candidates] == [0.1, 0.4, 0.2]
    assert len({one.seed for one in done.candidates}) == 3
    assert done.artifact == done.candidates[1].artifact
    talk.mllm.agreements = [0.2, 0.9]
    assert len(talk.say("a blue ball", check=4).results[0].candidates) == 2
    assert [event.final for event in talk.seen(ArtifactReady)] == [False, False, True]


def test_a_fork_goes_its_own_way():
    talk = Talk()
    red = talk.say("a red ball").results[0].artifact
    talk.say("make it blue")
    branch = talk.thread.fork(1, "branch")
    made = list(branch.send("make it green"))[-1].turn.results[0].artifact
    assert made.source == red.key
    assert [turn.text for turn in branch.get_turns()] == ["a red ball", "make it green"]
    assert [turn.text for turn in talk.thread.get_turns()] == ["a red ball", "make it blue"]
    assert [one.caption for one in branch.get_lineage()] == ["make it green", "a red ball"]
    assert talk.thread.fork(0, "empty").get_turns() == []
    with pytest.raises(InvalidInput, match="turn: 5 is not a turn of this thread: 0 to 2"):
        talk.thread.fork(5, "other")


def test_bad_input_leaves_the_thread_usable():
    talk = Talk()
    for text, options, field in (("", {}, "text"), ("x", {"check": 0}, "check"), ("x", {"think": "hard"}, "think")):
        with pytest.raises(InvalidInput, match=f"^{field}: "):
            talk.say(text, **options)
    talk.queue.fails = JobCancelled("the clip was cancelled")
    talk.say("hello")
    with pytest.raises(JobCancelled):
        talk.say("a red ball, then make it blue")
    talk.queue.fails = None
    assert talk.thread.get_artifacts() == []
    assert talk.say("a blue ball").number == 2
    with pytest.raises(InvalidInput, match="there is no thread"):
        Thread(talk.graph, "nobody", attach).require_existing()
    with pytest.raises(InvalidInput, match="is not a thread id"):
        Thread(talk.graph, "../etc", attach)


def test_a_cut_turn_goes_on_to_the_same_end(tmp_path):
    """Cut after each event in turn; a new process's planner over the same database ends with the same artifacts."""
    said = ("a red ball; now make it blue; how many balls are there?", "make it green")
    whole = Talk()
    for text in said:
        whole.say(text)
    expected = [one.key for one in whole.thread.get_artifacts()]
    for cut in range(10):
        path = tmp_path / f"{cut}.sqlite"
        talk = Talk(SqliteSaver(sqlite3.connect(path, check_same_thread=False)))
        running = talk.thread.send(said[0])
        for _ in range(cut):
            next(running)
        del running
        again = Talk(SqliteSaver(sqlite3.connect(path, check_same_thread=False)))
        if cut == 0:
            again.say(said[0])
        again.say(said[1])
        assert [one.key for one in again.thread.get_artifacts()] == expected, cut


async def collect(talk):
    return [event async for event in talk.thread.asend("a red ball")]


def test_the_async_face_gives_the_same_events():
    import asyncio

    talk = Talk()
    assert [event.kind for event in asyncio.run(collect(talk))] == ["plan", "step", "step", "artifact", "done"]


def test_an_attachment_is_what_the_words_are_about():
    talk = Talk()
    done = talk.say("a red ball; make it blue", attachments=["cat.png"]).results
    assert done[0].artifact.source == "cat.png"
    assert done[1].artifact.source == done[0].artifact.key


def edits(rng, video):
    return sample_edit(rng, video, kinds=("recolour", "reshape", "remove", "background")).instruction


def questions(rng, video):
    return sample_question(rng, sample_scene(rng, video)).text


@pytest.mark.parametrize(
    ("make", "about_something", "indirect"),
    [
        (edits, True, None),
        (questions, True, None),
        (lambda rng, video: make_caption_prompt(rng, video)[0], False, False),
        (lambda rng, video: make_indirect_prompt(rng, video)[0], False, True),
        (lambda rng, video: make_talk_example(rng, video).text, False, None),
    ],
    ids=["edits", "questions", "captions", "riddles", "talk"],
)
def test_the_ways_people_say_it_are_told_apart(make, about_something, indirect):
    """Over 600 wordings of each kind: one act, no artifact named, about what is there or not, plain or indirect."""
    rng = random.Random(11)
    right = 0
    for at in range(600):
        pieces = english_rules.split_actions(make(rng, at % 2 == 0))
        fits = (
            len(pieces) == 1
            and english_rules.find_description(pieces[0]) is None
            and english_rules.is_reference(pieces[0]) == about_something
        )
        right += fits and (indirect is None or english_rules.is_indirect(pieces[0]) == indirect)
    assert right >= 594


def test_joined_acts_are_split_where_they_were_joined():
    rng = random.Random(12)
    right = 0
    for at in range(300):
        parts = [make_caption_prompt(rng, at % 2 == 0)[0], edits(rng, at % 2 == 0), questions(rng, at % 2 == 0)]
        parts = [part for part in parts if part == english_rules.split_actions(part)[0]]
        joined = rng.choice(("; ", ", then ", ". ", ", and then ", "; now ")).join(parts)
        right += english_rules.split_actions(joined) == [part.strip(".!") for part in parts]
    assert right >= 285


# ---------------------------------------------------------------- plans that the model makes


class PlanningMLLM(ScriptedMLLM):
    """A model that can plan: its plan for each turn is written down here."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: dict[str, str] = {}

    def stream_text(self, request: MLLMRequest) -> Iterator[str]:
        said = request.text.rpartition("The user says: ")[2]
        if request.system == PROMPTS.plan:
            self.asks.append(request)
            yield self.plans.get(said, "I would rather talk.")
        else:
            yield from super().stream_text(request)


PROMPTS = load_prompts(OMNIVIDEO_1_3B)
TURNS = {
    "de": ("ein roter Ball; mach ihn blau; wie viele Bälle sind es?", "ein roter Ball", "mach ihn blau"),
    "fr": ("une balle rouge, puis rends-la bleue, combien de balles ?", "une balle rouge", "rends-la bleue"),
    "es": ("una pelota roja y luego hazla azul, ¿cuántas hay?", "una pelota roja", "hazla azul"),
    "zh": ("画一个红球，然后把它变成蓝色，有几个球？", "画一个红球", "把它变成蓝色"),
    "hi": ("एक लाल गेंद, फिर उसे नीला करो, कितनी गेंदें हैं?", "एक लाल गेंद", "उसे नीला करो"),
}


@pytest.mark.parametrize("language", TURNS)
def test_a_model_that_can_plan_splits_and_refers_in_any_language(language):
    text, first, second = TURNS[language]
    mllm = PlanningMLLM()
    entries = [{"do": first, "about": "new"}, {"do": second, "about": "last"}, {"do": "how many?", "about": "last"}]
    mllm.plans = {text: "Here it is: " + json.dumps(entries), "again": '[{"do": "make it green", "about": "1"}]'}
    talk = Talk(mllm=mllm, preset=OMNIVIDEO_1_3B)
    drawn, changed, answered = talk.say(text).results
    assert changed.artifact.source == drawn.artifact.key
    assert answered.action.source == changed.artifact.key and answered.answer
    assert talk.say("again").results[0].artifact.source == drawn.artifact.key
    listed = next(ask.text for ask in mllm.asks if ask.text.endswith("again"))
    assert f"1. video: {first}\n2. video: {second}\n" in listed


@pytest.mark.parametrize(
    "written",
    ["no plan", "[]", "[1]", '[{"do": "x"}]', '[{"do": "", "about": "new"}]', '[{"do": "x", "about": "9"}]', "[[["],
)
def test_an_invalid_plan_makes_the_turn_one_action_about_the_last_artifact(written):
    """The English rules, which would split these turns, are not used for an MLLM that can plan."""
    mllm = PlanningMLLM()
    mllm.plans = {"a red ball; now make it blue": written, "a red star; now make it green": written}
    talk = Talk(mllm=mllm, preset=OMNIVIDEO_1_3B)
    (rendered,) = talk.say("a red ball; now make it blue").results
    assert rendered.action.text == "a red ball; now make it blue" and rendered.artifact.source is None
    (edited,) = talk.say("a red star; now make it green").results
    assert edited.artifact.source == rendered.artifact.key


def test_an_mllm_that_cannot_plan_is_not_asked_for_a_plan():
    mllm = PlanningMLLM()
    mllm.plans = {"a red ball; now make it blue": '[{"do": "something else", "about": "new"}]'}
    talk = Talk(mllm=mllm, preset=OMNIVIDEO_1_3B.model_copy(update={"mllm_can_plan": False}))
    first, second = talk.say("a red ball; now make it blue").results
    assert (first.action.text, second.action.text) == ("a red ball", "make it blue")
    assert second.artifact.source == first.artifact.key and not any(ask.system == PROMPTS.plan for ask in mllm.asks)


def test_an_unclear_reference_is_asked_back():
    mllm = PlanningMLLM()
    mllm.plans = {
        "a red ball": '[{"do": "a red ball", "about": "new"}]',
        "a picture of a star": '[{"do": "a picture of a star", "about": "new"}]',
        "make that one green": '[{"do": "make that one green", "about": "unclear"}]',
    }
    talk = Talk(mllm=mllm, preset=OMNIVIDEO_1_3B)
    ball = talk.say("a red ball").results[0].artifact
    talk.say("a picture of a star")
    assert talk.say("make that one green").text.startswith("Which one do you mean?")
    assert talk.say("the first").results[0].artifact.source == ball.key

"""The planner with in-memory twins: splitting turns, references, questions, forks and recovery."""

import json
import random
import sqlite3
from collections.abc import Iterator
from typing import ClassVar

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver

from omnivideo.agent import english_rules
from omnivideo.agent.capabilities import reconcile_route
from omnivideo.agent.graph import Planner
from omnivideo.agent.mllm_plan import parse_plan
from omnivideo.agent.planner_prompts import load_prompts
from omnivideo.agent.thread import Thread
from omnivideo.contracts import Artifact, MLLMRequest, Route, StepProgress
from omnivideo.errors import InvalidInput, JobCancelled
from omnivideo.presets import OMNIVIDEO2_A14B, OMNIVIDEO_1_3B, TINY
from omnivideo.synthetic.chat import make_talk_example
from omnivideo.synthetic.edits import sample_edit
from omnivideo.synthetic.questions import sample_question
from omnivideo.synthetic.requests import make_caption_prompt, make_indirect_prompt
from omnivideo.synthetic.scenes import sample_scene
from omnivideo.turns import ArtifactReady, PromptRewritten, QuestionAsked, TextDelta, ThinkingDelta, Turn, TurnCompleted
from tests.support.twins import InstantQueue, ScriptedMLLM


class Conversation:
    """A thread over twins; `events` are those of the last turn."""

    def __init__(self, saver=None, name="conversation", mllm=None, preset=TINY):
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

    def list_events(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


def attach(path, made_by):
    return Artifact(
        key=str(path), medium="image", width=64, height=64, frames=1, fps=1.0, caption=str(path), created_by=made_by
    )


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
    first = conversation.say("a red ball bounces in; now make it blue; how many balls are there?")
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
    assert conversation.say("make the first clip darker").results[0].artifact.source == red.key
    assert conversation.say("go back to the green one").results[0].artifact == picture
    assert conversation.say("turn it brown").results[0].artifact.source == picture.key
    assert conversation.say("make the red clip slower").results[0].artifact.source == red.key


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
    conversation.mllm.doubt.add("a red thing")
    assert "picture" in conversation.say("a red thing").text
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
    assert [event.kind for event in asyncio.run(collect(conversation))] == ["plan", "step", "step", "artifact", "done"]


def test_a_turn_refers_to_its_attachment():
    conversation = Conversation()
    results = conversation.say("a red ball; make it blue", attachments=["cat.png"]).results
    assert results[0].artifact.source == "cat.png"
    assert results[1].artifact.source == results[0].artifact.key


def make_edit_instruction(rng, video):
    return sample_edit(rng, video, kinds=("recolour", "reshape", "remove", "background")).instruction


def make_question(rng, video):
    return sample_question(rng, sample_scene(rng, video)).text


@pytest.mark.parametrize(
    ("make_text", "is_reference", "is_indirect"),
    [
        (make_edit_instruction, True, None),
        (make_question, True, None),
        (lambda rng, video: make_caption_prompt(rng, video)[0], False, False),
        (lambda rng, video: make_indirect_prompt(rng, video)[0], False, True),
        (lambda rng, video: make_talk_example(rng, video).text, False, None),
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
            and english_rules.is_reference(actions[0]) == is_reference
        )
        correct_count += is_correct and (is_indirect is None or english_rules.is_indirect(actions[0]) == is_indirect)
    assert correct_count >= 594


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


# ---------------------------------------------------------------- plans of the model


class PlanningMLLM(ScriptedMLLM):
    """A model that can plan; `plans` maps the text of a turn to its plan."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: dict[str, str] = {}

    def stream_text(self, request: MLLMRequest) -> Iterator[str]:
        user_text = request.text.rpartition("The user says: ")[2]
        if request.system == PROMPTS.plan:
            self.asks.append(request)
            yield self.plans.get(user_text, "I would rather talk.")
        else:
            yield from super().stream_text(request)


PLANNING = OMNIVIDEO2_A14B.model_copy(update={"sampling": OMNIVIDEO_1_3B.sampling})
PROMPTS = load_prompts(PLANNING)


def write_plan(*actions: tuple[str, ...]) -> str:
    """Return the plan of actions (goal, text, reference, and message for some), as the engine's schema makes it."""
    names = ("action", "do", "about", "say")
    entries = [dict(zip(names, action, strict=False)) for action in actions]
    for entry in entries:
        if entry["action"] == "decline":
            entry["say"] = entry.pop("about")
    return json.dumps({"actions": entries})


TURNS = {
    "de": ("ein roter Ball; mach ihn blau; wie viele Bälle sind es?", "ein roter Ball", "mach ihn blau"),
    "fr": ("une balle rouge, puis rends-la bleue, combien de balles ?", "une balle rouge", "rends-la bleue"),
    "es": ("una pelota roja y luego hazla azul, ¿cuántas hay?", "una pelota roja", "hazla azul"),
    "zh": ("画一个红球，然后把它变成蓝色，有几个球？", "画一个红球", "把它变成蓝色"),
    "hi": ("एक लाल गेंद, फिर उसे नीला करो, कितनी गेंदें हैं?", "एक लाल गेंद", "उसे नीला करो"),
}


@pytest.mark.parametrize("language", TURNS)
def test_a_model_that_can_plan_splits_turns_in_any_language(language):
    text, first, second = TURNS[language]
    mllm = PlanningMLLM()
    entries = [("generate", first, "new"), ("edit", second, "last"), ("understand", "how many?", "last")]
    mllm.plans = {text: write_plan(*entries), "again": write_plan(("edit", "make it green", "1"))}
    conversation = Conversation(mllm=mllm, preset=PLANNING)
    generated, edited, answered = conversation.say(text).results
    assert edited.artifact.source == generated.artifact.key
    assert answered.action.source == edited.artifact.key and answered.answer
    assert conversation.say("again").results[0].artifact.source == generated.artifact.key
    prompt = next(ask.text for ask in mllm.asks if ask.text.endswith("again"))
    assert f"1. video: {first}\n2. video: {second}\n" in prompt


@pytest.mark.parametrize("plan", ["no plan", "[]", "{}", '{"actions": []}', '{"actions": [{"action": "gen', "[[["])
def test_a_plan_without_a_complete_action_makes_the_turn_one_action_about_the_last_artifact(plan):
    """The English rules, which would split these turns, are not used for an MLLM that can plan."""
    mllm = PlanningMLLM()
    mllm.plans = {"a red ball; now make it blue": plan, "a red star; now make it green": plan}
    conversation = Conversation(mllm=mllm, preset=PLANNING)
    (rendered,) = conversation.say("a red ball; now make it blue").results
    assert rendered.action.text == "a red ball; now make it blue" and rendered.artifact.source is None
    (edited,) = conversation.say("a red star; now make it green").results
    assert edited.artifact.source == rendered.artifact.key


def test_a_plan_that_is_cut_off_keeps_its_complete_actions():
    whole = write_plan(("generate", "a red ball", "new"), ("understand", "how many?", "last"))
    assert [action.do for action in parse_plan(whole, 0)] == ["a red ball", "how many?"]
    assert [action.do for action in parse_plan(whole[:-12], 0)] == ["a red ball"]
    assert parse_plan(write_plan(("understand", "how many?", "1")), 0) == []  # there is no such artifact


def test_the_schema_allows_only_what_exists():
    mllm = PlanningMLLM()
    conversation = Conversation(mllm=mllm, preset=PLANNING)
    conversation.say("a red ball")
    conversation.say("a red star")
    first, second = (json.loads(ask.json_schema)["$defs"] for ask in mllm.asks if ask.json_schema)
    assert first["PlannedAnswer"]["properties"]["about"] == {"enum": ["new", "last"]}
    assert second["PlannedEdit"]["properties"]["about"] == {"enum": ["last", "unclear", "1"]}
    assert second["PlannedGeneration"]["properties"]["about"] == {"enum": ["new"]}


# ---------------------------------------------------------------- asking and declining


def test_a_declined_action_is_answered_in_words_and_nothing_is_rendered():
    mllm = PlanningMLLM()
    mllm.plans = {"book a flight": write_plan(("decline", "book a flight", "I only make clips."))}
    conversation = Conversation(mllm=mllm, preset=PLANNING)
    (result,) = conversation.say("book a flight").results
    assert (result.goal, result.answer, result.artifact) == ("decline", "I only make clips.", None)
    assert [event.delta for event in conversation.list_events(TextDelta)] == ["I only make clips."]
    assert not conversation.queue.jobs and result.route.kind == "decline"


def test_a_question_of_the_plan_interrupts_the_turn_and_the_reply_completes_the_request():
    mllm = PlanningMLLM()
    question = write_plan(("ask", "make something", "new", "What should it show?"), ("edit", "make it blue", "last"))
    mllm.plans = {"make something nice, then make it blue": question}
    conversation = Conversation(mllm=mllm, preset=PLANNING)
    asked = conversation.say("make something nice, then make it blue")
    assert isinstance(asked, QuestionAsked) and asked.text == "What should it show?"
    assert conversation.thread.get_open_question() == "What should it show?" and not conversation.queue.jobs
    turn = conversation.say("a red ball")
    made, edited = turn.results
    assert made.action.text == "make something\na red ball" and made.goal == "generate"
    assert edited.artifact.source == made.artifact.key
    assert turn.clarifications == (("What should it show?", "a red ball"),)


def test_an_mllm_that_routes_to_a_question_or_a_refusal_words_it_itself():
    class RoutingMLLM(PlanningMLLM):
        kinds: ClassVar = {"hm": "ask", "rob a bank": "decline"}

        def route(self, request):
            kind = self.kinds.get(request.text)
            return Route(kind=kind, probability=0.9) if kind else super().route(request)

        def stream_text(self, request):
            if request.system in (PROMPTS.ask, PROMPTS.decline):
                yield "What do you mean?" if request.system == PROMPTS.ask else "No."
            else:
                yield from super().stream_text(request)

    small = PLANNING.model_copy(update={"mllm": PLANNING.mllm.model_copy(update={"can_plan": False})})
    conversation = Conversation(mllm=RoutingMLLM(), preset=small)
    assert conversation.say("hm").text == "What do you mean?"
    assert conversation.say("a red ball").results[0].goal == "generate"
    assert conversation.say("rob a bank").results[0].answer == "No."
    assert len(conversation.queue.jobs) == 1


def test_questions_about_one_request_come_to_an_end():
    class AskingMLLM(ScriptedMLLM):
        def route(self, request):
            return Route(kind="ask", probability=0.9)

    conversation = Conversation(mllm=AskingMLLM(), preset=OMNIVIDEO2_A14B)
    replies = [conversation.say("hm") for _ in range(4)]
    assert [type(reply) for reply in replies] == [QuestionAsked] * 3 + [Turn]
    assert replies[-1].results[0].goal == "understand"


def test_what_the_weights_cannot_do_is_said_before_anything_is_computed():
    mllm = PlanningMLLM()
    mllm.plans = {"a picture of a shape like a coin": write_plan(("generate", "a picture of a coin", "new"))}
    conversation = Conversation(mllm=mllm, preset=OMNIVIDEO2_A14B)
    (result,) = conversation.say("a picture of a shape like a coin", think="on").results
    assert result.answer == "This model cannot make pictures; it can make clips and change clips."
    assert result.goal == "decline" and result.trace is None and not conversation.queue.jobs
    assert not mllm.store.objects


def test_a_plan_that_the_route_contradicts_is_kept_with_the_doubt():
    plan = Route(kind="text", probability=0.9)
    assert reconcile_route(PLANNING, "understand", plan, None) == plan
    doubted = reconcile_route(PLANNING, "generate", plan, None)
    assert doubted.kind == "video" and doubted.probability == pytest.approx(0.1)
    assert reconcile_route(PLANNING, "", plan, None) == plan


def test_an_mllm_that_cannot_plan_is_not_asked_for_a_plan():
    mllm = PlanningMLLM()
    mllm.plans = {"a red ball; now make it blue": write_plan(("generate", "something else", "new"))}
    small = PLANNING.mllm.model_copy(update={"can_plan": False})
    conversation = Conversation(mllm=mllm, preset=PLANNING.model_copy(update={"mllm": small}))
    first, second = conversation.say("a red ball; now make it blue").results
    assert (first.action.text, second.action.text) == ("a red ball", "make it blue")
    assert second.artifact.source == first.artifact.key and not any(ask.system == PROMPTS.plan for ask in mllm.asks)


def test_an_unclear_reference_is_asked_about():
    mllm = PlanningMLLM()
    mllm.plans = {
        "a red ball": write_plan(("generate", "a red ball", "new")),
        "a picture of a star": write_plan(("generate", "a picture of a star", "new")),
        "make that one green": write_plan(("edit", "make that one green", "unclear")),
    }
    conversation = Conversation(mllm=mllm, preset=PLANNING)
    ball = conversation.say("a red ball").results[0].artifact
    conversation.say("a picture of a star")
    assert conversation.say("make that one green").text.startswith("Which one do you mean?")
    assert conversation.say("the first").results[0].artifact.source == ball.key

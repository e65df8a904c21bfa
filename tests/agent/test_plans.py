"""Plans of an MLLM by a schema: splitting turns, asking, declining, and what the weights cannot do."""

import json
from collections.abc import Iterator
from typing import ClassVar

import pytest

from omnivideo.agent.capabilities import reconcile_route
from omnivideo.agent.mllm_plan import build_plan_schema, parse_plan
from omnivideo.agent.planner_prompts import load_prompts
from omnivideo.contracts import MLLMRequest, Route, StepProgress
from omnivideo.errors import JobCancelled
from omnivideo.presets import OMNIVIDEO2_A14B, OMNIVIDEO_1_3B
from omnivideo.turns import QuestionAsked, TextDelta, Turn
from tests.support.conversations import Conversation
from tests.support.twins import ScriptedMLLM

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


# ---------------------------------------------------------------- joining


class JoiningTools:
    """Joins clips without reading them, and calls `read` with the number of each."""

    def __init__(self, read=lambda number: None):
        self.read = read

    def join_clips(self, clips, created_by, on_clip):
        for number in range(1, len(clips) + 1):
            self.read(number)
            on_clip(number)
        caption, frames = " ; ".join(clip.caption for clip in clips), sum(clip.frames for clip in clips)
        update = {"key": "joined.mp4", "caption": caption, "frames": frames, "source": clips[0].key}
        return clips[0].model_copy(update=update)


def write_join(*clips: int) -> str:
    return json.dumps({"actions": [{"action": "join", "do": "put them together", "clips": clips}]})


def test_a_plan_can_join_clips_in_any_order_and_change_the_result():
    mllm = PlanningMLLM()
    join, edit = json.loads(write_join(3, 1))["actions"], json.loads(write_plan(("edit", "make it blue", "last")))
    mllm.plans = {"join both, then blue": json.dumps({"actions": [*join, *edit["actions"]]})}
    conversation = Conversation(mllm=mllm, preset=PLANNING, media_tools=JoiningTools())
    first = conversation.say("a red ball").results[0].artifact
    conversation.say("a yellow star")
    third = conversation.say("a green box").results[0].artifact
    joined, edited = conversation.say("join both, then blue").results
    assert joined.artifact.caption == f"{third.caption} ; {first.caption}" and joined.artifact.source == third.key
    assert edited.artifact.source == joined.artifact.key
    assert len(conversation.queue.jobs) == 4  # nothing is rendered to join clips


def test_a_plan_joins_only_clips_that_exist():
    assert "PlannedJoin" not in build_plan_schema(1)
    schema = json.loads(build_plan_schema(3))["$defs"]["PlannedJoin"]["properties"]["clips"]
    assert (schema["items"], schema["minItems"]) == ({"enum": [1, 2, 3]}, 2)
    (action,) = parse_plan(write_join(2, 1), 2)
    assert action.clips == (2, 1)
    assert parse_plan(write_join(1, 3), 2) == parse_plan(write_join(1), 2) == []


def test_a_join_shows_its_progress_and_can_be_cancelled():
    mllm = PlanningMLLM()
    mllm.plans = {"join them": write_join(1, 2, 3)}
    tools = JoiningTools()
    conversation = Conversation(mllm=mllm, preset=PLANNING, media_tools=tools)
    for text in ("a red ball", "a yellow star", "a green box"):
        conversation.say(text)
    read = []

    def cancel_at_the_second(number):
        read.append(number)
        if number == 2:
            conversation.thread.cancel()

    tools.read = cancel_at_the_second
    with pytest.raises(JobCancelled):
        conversation.say("join them")
    assert read == [1, 2] and len(conversation.thread.get_turns()) == 3
    tools.read = read.append
    assert conversation.say("join them").results[0].artifact.key == "joined.mp4"
    steps = [(event.step, event.steps) for event in conversation.list_events(StepProgress)]
    assert steps[-3:] == [(1, 3), (2, 3), (3, 3)]


def test_pictures_are_not_joined():
    mllm = PlanningMLLM()
    mllm.plans = {"join them": write_join(1, 2)}
    conversation = Conversation(mllm=mllm, preset=PLANNING, media_tools=JoiningTools())
    conversation.say("a red ball")
    (result,) = conversation.say("join them", attachments=["photo.png"]).results
    assert result.artifact is None and "clips only" in result.answer


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

"""Commands about the conversation are executed without the MLLM; an MLLM that plans can give them too."""

import json

import pytest

from omnivideo.agent.commands import find_command
from omnivideo.agent.mllm_plan import build_plan_schema, parse_plan
from omnivideo.contracts import Artifact
from omnivideo.presets import OMNIVIDEO2_A14B
from omnivideo.synthetic.requests import CONTINUATION_TASKS, sample_requests
from omnivideo.turns import ArtifactReady
from tests.agent.test_plans import PLANNING, PlanningMLLM
from tests.support.conversations import Conversation

ARTIFACTS = [
    Artifact(key=name, medium=medium, width=64, height=64, frames=1, fps=8, caption=name, created_by="test")
    for name, medium in (("a", "image"), ("b", "video"), ("c", "image"))
]


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("undo", "undo", {}), ("please take that back", "undo", {}), ("put it back how it was", "undo", {}),
        ("undo the last two changes", "undo", {"count": 2}),
        ("I changed my mind, go back", "undo", {}), ("Let's start over!", "restart", {}),
        ("forget everything, I want a clean slate", "restart", {}), ("HELP", "help", {}),
        ("what can I ask you?", "help", {}), ("what did you just do?", "recap", {}),
        ("list everything we made", "list", {}), ("never mind", "cancel", {}),
        ("send me the first one again", "resend", {"which": 1}),
        ("show me the second picture again", "resend", {"which": 3}),
        ("can I see number 2 once more", "resend", {"which": 2}),
        ("give me three variations of it", "vary", {"count": 3}), ("another one please", "vary", {"count": 1}),
        ("save it as final.mp4", "save", {"file": "final.mp4"}),
        ("could I get it as a GIF?", "export", {"format": "gif"}),
        ("get rid of that last edit", "undo", {}), ("Nooo, I'd rather have it the way it was", "undo", {}),
        ("Undo. Undo. Undo!", "undo", {"count": 3}), ("wipe all of this and begin with nothing", "restart", {}),
        ("what kinds of edits are possible?", "help", {}), ("run me through the steps so far", "recap", {}),
        ("where has the first one gone? show it", "resend", {"which": 1}),
        ("store the second one as two.mp4", "save", {"which": 2, "file": "two.mp4"}),
        ("export it as a GIF called star.gif", "save", {"file": "star.gif"}),
    ],
)  # fmt: skip
def test_commands_in_many_words(text, name, arguments):
    command = find_command(text, ARTIFACTS)
    assert command is not None and (command.name, command.arguments) == (name, arguments)


@pytest.mark.parametrize(
    "text", ["go back to the red one", "show me a red star", "make it green again", "save the star from falling",
             "a picture of a clean slate", "remove the star", "keep it still", "stop moving the star",
             "reverse the clip", "show me a new star", "bring back the star"],
)  # fmt: skip
def test_requests_are_no_commands(text):
    assert find_command(text, ARTIFACTS) is None


@pytest.mark.parametrize(
    "task", ["text-to-image", "text-to-video", "image-editing", "video-editing", *CONTINUATION_TASKS]
)
def test_no_request_of_the_world_is_a_command(task):
    assert not [request.text for request in sample_requests(5, task, 400) if find_command(request.text, ARTIFACTS)]


def test_a_reason_beside_a_command_is_allowed_but_another_request_is_not():
    assert find_command("I changed my mind, go back", ARTIFACTS).name == "undo"
    assert find_command("I changed my mind, go back", ARTIFACTS, is_strict=True) is None  # for an MLLM that plans
    assert find_command("go back, the star should be red", ARTIFACTS) is None


# ---------------------------------------------------------------- what they do


def start_conversation(**options):
    conversation = Conversation(**options)
    red = conversation.say("a red ball").results[0].artifact
    blue = conversation.say("make it blue").results[0].artifact
    return conversation, red, blue


def test_undo_returns_to_what_was_before_the_change():
    conversation, red, _ = start_conversation()
    (result,) = conversation.say("undo that").results
    assert (result.goal, result.artifact) == ("command", red)
    assert conversation.say("make it green").results[0].artifact.source == red.key
    conversation.say("undo")
    assert conversation.say("undo").results[0].artifact is None
    assert conversation.thread.get_current_key() is None
    assert conversation.say("make it green").text.startswith("There is nothing to change yet")


def test_start_over_forgets_what_it_refers_to():
    conversation, red, _ = start_conversation()
    conversation.say("let's start over")
    assert conversation.thread.get_current_key() is None
    assert conversation.say("send me the first one again").results[0].artifact == red


def test_commands_in_one_turn_with_edits():
    conversation, red, _ = start_conversation()
    undone, edited = conversation.say("undo that and make it purple instead").results
    assert undone.command.name == "undo" and edited.artifact.source == red.key


@pytest.mark.parametrize("options", [{}, {"seed": 7}])
def test_variations_differ_in_their_seeds_only(options):
    conversation, red, blue = start_conversation()
    command, *variations = conversation.say("give me three variations of it", **options).results
    assert command.command.arguments == {"count": 3} and [result.goal for result in variations] == ["edit"] * 3
    assert {result.artifact.source for result in variations} == {red.key}
    assert {result.action.text for result in variations} == {"make it blue"}
    seeds = [result.candidates[0].seed for result in variations]
    assert len({*seeds, blue.key}) == 4


def test_recap_and_list_say_what_was_made():
    conversation, *_ = start_conversation()
    assert "make it blue" in conversation.say("what did you just do?").results[0].answer
    assert conversation.say("list everything").results[0].answer == "1) clip: a red ball; 2) clip: make it blue"


def test_a_file_format_that_cannot_be_written_is_declined():
    conversation, *_ = start_conversation()
    (result,) = conversation.say("save it as final.webm").results
    assert (result.goal, result.command) == ("decline", None) and "mp4 or gif" in result.answer
    (result,) = conversation.say("save it as final.mp4").results
    assert result.command.arguments == {"file": "final.mp4"}
    assert conversation.list_events(ArtifactReady)[-1].artifact == result.artifact


def test_the_model_is_not_asked_for_a_command():
    conversation, *_ = start_conversation()
    asked = len(conversation.mllm.asks)
    for text in ("undo", "what did you just do?", "help", "start over"):
        conversation.say(text)
    assert len(conversation.mllm.asks) == asked


# ---------------------------------------------------------------- in the plan of an MLLM


def test_a_planned_command_is_executed():
    mllm = PlanningMLLM()
    plan = {"actions": [{"action": "command", "do": "mach das rückgängig", "command": "undo", "which": None}]}
    new = {"actions": [{"action": "generate", "do": "ein Ball", "about": "new"}]}
    mllm.plans = {"mach das rückgängig": json.dumps(plan), "ein Ball": json.dumps(new)}
    conversation = Conversation(mllm=mllm, preset=PLANNING)
    conversation.say("ein Ball")
    (result,) = conversation.say("mach das rückgängig").results
    assert result.command.name == "undo" and conversation.thread.get_current_key() is None


def test_english_commands_need_no_plan():
    conversation = Conversation(mllm=PlanningMLLM(), preset=PLANNING)
    assert conversation.say("help").results[0].command.name == "help"
    assert not conversation.mllm.asks


def test_the_schema_of_plans_has_the_commands():
    assert OMNIVIDEO2_A14B.mllm.can_plan and '"command"' in build_plan_schema(1)
    text = '{"actions": [{"action": "command", "do": "x", "command": "vary", "count": 3}]}'
    (action,) = parse_plan(text, 1)
    assert action.to_command().arguments == {"count": 3}
    assert parse_plan(text.replace("vary", "explode"), 1) == []

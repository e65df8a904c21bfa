"""Reading requests by the words of the world: what is passed on, rewritten, asked, declined and executed."""

import random
from typing import get_args

import pytest

from omnivideo.agent.small_world.facts import answer_fact
from omnivideo.agent.small_world.lexicon import tokenize
from omnivideo.agent.small_world.readings import Context
from omnivideo.agent.small_world.scenes import read_scene
from omnivideo.agent.small_world.turn_reading import read_turn, resolve_reply
from omnivideo.contracts import Artifact
from omnivideo.presets import TINY, EditKind, Task
from omnivideo.synthetic.captions import describe_scene, sample_caption
from omnivideo.synthetic.chat import SMALL_TALK
from omnivideo.synthetic.knowledge import sample_knowledge_question
from omnivideo.synthetic.questions import QUESTION_WEIGHTS, sample_question
from omnivideo.synthetic.requests import (
    CONTINUATION_TASKS,
    make_indirect_prompt,
    phrase_scene_request,
    sample_requests,
)
from omnivideo.synthetic.scenes import sample_scene

# What the world's grammar can say is possible for a preset that declares all of it.
EVERYTHING = TINY.model_copy(
    update={
        "edits": get_args(EditKind),
        "sampling": TINY.sampling | dict.fromkeys(CONTINUATION_TASKS, TINY.sampling["text-to-video"]),
    }
)


def make_artifact(medium):
    frames = 9 if medium == "video" else 1
    return Artifact(
        key=f"{medium}", medium=medium, width=64, height=64, frames=frames, fps=8, caption="it", created_by="test"
    )


def build_context(medium=None, preset=TINY, description="a red circle and a blue star on a white background", last=""):
    artifacts = [make_artifact(medium)] * 2 if medium else []
    return Context(preset, artifacts, medium, last, len(artifacts), lambda: description)


def list_readings(text, medium=None, **context):
    return [(reading.kind, reading.text) for reading in read_turn(text, build_context(medium, **context))]


# ---------------------------------------------------------------- the grammar of the world is never refused


@pytest.mark.parametrize("task", get_args(Task))
def test_what_the_grammar_can_say_is_neither_refused_nor_asked_about(task):
    refused = []
    for request in sample_requests(11, task, 250):
        medium = request.source and ("video" if request.source.is_video else "image")
        description = describe_scene(request.source) if request.source else ""
        readings = read_turn(request.text, build_context(medium, EVERYTHING, description))
        refused += [request.text for reading in readings if reading.kind != "do"]
    # A correction of which object was meant ("no, the blue dot") is the only form that is asked about.
    assert all(", the " in text for text in refused) and len(refused) <= 4


def test_indirect_requests_and_questions_are_passed_on_as_they_are():
    rng = random.Random(5)
    for index in range(150):
        text = make_indirect_prompt(rng, index % 2 == 0)[0]
        (reading,) = read_turn(text, build_context())
        assert reading.kind == "do" and text.endswith(reading.text)
        question = sample_knowledge_question(rng)[0]
        assert all(reading.kind == "do" for reading in read_turn(question, build_context()))
        scene = sample_scene(rng, index % 2 == 0, composed_share=0.3)
        question = sample_question(rng, scene, QUESTION_WEIGHTS).text
        medium = "video" if scene.is_video else "image"
        readings = read_turn(question, build_context(medium))
        assert all(reading.kind == "do" or reading.fact == "presence" for reading in readings), question


@pytest.mark.parametrize("text", SMALL_TALK)
def test_small_talk_is_answered(text):
    assert [reading.kind in ("do", "command", "say") for reading in read_turn(text, build_context("image"))] == [True]


def test_the_facts_of_captions_are_read():
    """Every object, background and relation of a caption in any wording; nothing is left over or unknown."""
    rng = random.Random(3)
    for index in range(400):
        scene = sample_scene(rng, index % 2 == 0, composed_share=0.7)
        caption = sample_caption(rng, scene, is_composed=True)
        read = read_scene(tokenize(phrase_scene_request(rng, caption.text, scene)))
        objects = [obj for obj in read.objects for _ in range(obj.count or 1)]
        facts = [
            (obj.shape, obj.colour, obj.size, obj.motion or "still", obj.second_motion, obj.speed) for obj in objects
        ]
        assert facts == [
            (spec.shape, spec.colour, spec.size, spec.motion or "still", spec.second_motion, spec.speed)
            for spec in caption.scene_spec.objects
        ]
        assert read.background == caption.scene_spec.background
        assert (read.relation and read.relation[1]) == caption.scene_spec.relation
        assert not (read.conflicts or read.unknown or read.leftovers)


# ---------------------------------------------------------------- in other words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gimme a tiny blue ball", "draw a picture of a small blue circle"),
        ("a clip where a yellow triangle falls", "draw a video of a yellow triangle moving down"),
        ("Picture of a ball. Cyan. Pink background.", "draw a picture of a cyan circle on a pink background"),
        ("a small circle and a large star, both red", "draw a picture of a small red circle and a large red star"),
        ("three teeny stars next please", "draw a picture of three small red stars".replace(" red", "")),
    ],
)
def test_a_request_in_other_words_becomes_one_in_the_models_words(text, expected):
    assert list_readings(text) == [("do", expected)]


@pytest.mark.parametrize(
    ("text", "medium", "expected"),
    [
        ("how about blue?", "image", ["make it blue"]),
        ("could you take the star out of the picture", "image", ["remove the star"]),
        ("the circle should rather be a square", "image", ["turn the circle into a square"]),
        ("everything in green", "image", ["make the circle green", "make the star green"]),
        ("let's try brown for the background", "image", ["change the background to brown"]),
        ("I'd like the thing to stay put", "video", ["make it stay still"]),
        ("make the circle red and the star green", "image", ["make the circle red", "make the star green"]),
        ("not green, blue!", "image", ["make it blue"]),
        ("and then make it green", "image", ["make it green"]),
        ("2 versions: one in blue and another in red", "image", ["make it blue", "make it red"]),
    ],
)
def test_changes_in_other_words(text, medium, expected):
    assert list_readings(text, medium) == [("do", change) for change in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("which way's the star heading?", "how does the star move?"),
        ("hm, is the ball red or blue?", "what colour is the circle?"),
        ("any triangles in there?", "how many triangles are there?"),
        ("which one's the blue one?", "what shape is the blue object?"),
        ("And the background?", "what colour is the background?"),
    ],
)
def test_questions_in_other_words(text, expected):
    assert list_readings(text, "video") == [("do", expected)]


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("how long is it?", "length"),
        ("how many pixels does it have?", "size"),
        ("is this a clip or a picture?", "medium"),
        ("how many corners has it got?", "corners"),
        ("what was it before?", "earlier"),
    ],
)
def test_facts_of_the_file_need_no_model(text, fact):
    assert [reading.fact for reading in read_turn(text, build_context("video"))] == [fact]


# ---------------------------------------------------------------- what is not possible or not clear


@pytest.mark.parametrize(
    ("text", "medium", "word"),
    [
        ("a dragon over Paris", None, "circles"),
        ("make it loop", "video", "loop"),
        ("make the background transparent", "image", "transparent"),
        ("add text saying SALE", "image", "add objects"),
        ("rotate it by 45 degrees", "image", "colours"),
        ("draw seven stars", None, "at most four"),
        ("a black star", None, "no colour of my shapes"),
        ("a star on a green background", None, "black, grey, white, pink or brown"),
        ("make it pink", "image", "no colour of my shapes"),
        ("longer", "video", "longer"),
        ("bigger", "image", "sizes"),
        ("let it move left", "image", "animate"),
        ("swap the colours", "video", "swap colours"),
        ("a 4-second clip of a green star", None, "`seconds`"),
        ("a 10 second video of a red circle moving left", "video", "`seconds`"),
        ("make it last five seconds", "video", "`seconds`"),
        ("why is the star red?", None, "nothing to look at"),
    ],
)
def test_what_is_impossible_is_declined_and_what_is_possible_named(text, medium, word):
    (reading,) = read_turn(text, build_context(medium))
    assert reading.kind in ("decline", "ask") and word in reading.message


@pytest.mark.parametrize(
    ("text", "medium", "question"),
    [
        ("a red circle that is completely blue", None, "red or blue"),
        ("a still circle moving right", None, "still or right"),
        ("make it small and large", "image", "small or large"),
        ("change the background to pink but leave the background as it is", "image", "stay as it is"),
        ("remove the star, then make the star green", "image", "the star"),
        ("two circles, in total exactly one circle", None, "two or one"),
        ("a picture of a star moving left", None, "does not move"),
        ("a triangle with four corners", None, "three corners"),
    ],
)
def test_a_contradiction_leads_to_a_question(text, medium, question):
    (reading,) = read_turn(text, build_context(medium))
    assert reading.kind == "ask" and question in reading.message


@pytest.mark.parametrize(
    "text",
    ["Zeichne einen roten Kreis", "画一个红色的圆", "нарисуй красный круг", "rends-le rouge s'il te plaît", "größer",
     "un círculo rojo", "teken een rode cirkel", "赤い丸を描いて"],
)  # fmt: skip
def test_other_languages_are_told_which_one_is_known(text):
    (reading,) = read_turn(text, build_context("image"))
    assert reading.kind == "decline" and "English" in reading.message


@pytest.mark.parametrize("medium", [None, "video"])
@pytest.mark.parametrize(
    ("text", "request_text"),
    [
        ("draw a blue square and a red star next to it", "draw a picture of a blue square and a red star"),
        ("a red circle with a green square beside it", "draw a picture of a red circle and a green square"),
        ("a blue star and a red circle above it", "draw a picture of a red circle above a blue star"),
    ],
)
def test_it_may_be_another_object_of_the_same_request(text, medium, request_text):
    assert list_readings(text, medium) == [("do", request_text)]
    assert list_readings("put a red star next to it", "video") == [("do", "add a red star")]


def test_a_second_object_is_no_duration():
    assert list_readings("add a second circle", "video") == [("do", "add a circle")]


def test_one_unclear_action_holds_back_the_whole_turn():
    (reading,) = read_turn("draw a red circle, then make it sparkle", build_context())
    assert reading.kind == "decline" and "'sparkle'" in reading.message


def test_an_edit_that_the_preset_learns_is_passed_on():
    assert list_readings("a bit bigger please", "image", preset=EVERYTHING) == [("do", "make it bigger")]
    assert list_readings("longer", "video", preset=EVERYTHING) == [("do", "longer")]


def test_a_reply_chooses_one_of_two_values():
    question = "Do you mean red or blue?"
    assert resolve_reply("a red circle that is completely blue", question, "blue please") == (
        "a circle that is completely blue"
    )
    assert resolve_reply("a red circle that is completely blue", question, "draw a star") == "draw a star"


# ---------------------------------------------------------------- what is seen


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("circle yellow, star green", ["make the circle yellow", "make the star green"]),
        ("keep only the star", ["remove the circle"]),
        ("remove everything except the circle", ["remove the star"]),
        ("change red to orange", ["make the circle orange"]),
        ("switch the white for black", ["change the background to black"]),
        ("there should be no star", ["remove the star"]),
        ("the circle ought to be green", ["make the circle green"]),
        ("i don't want the circle anymore", ["remove the circle"]),
    ],
)
def test_changes_of_what_is_seen(text, expected):
    assert list_readings(text, "image") == [("do", change) for change in expected]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("make the triangle green", "triangle"),
        ("remove the square", "square"),
        ("make one of them green", "Which one"),
        ("a square moving left and right at the same time", "left or right"),
    ],
)
def test_what_is_not_there_leads_to_a_question(text, word):
    ((kind, _),) = list_readings(text, "image")
    assert kind == "ask" and word in read_turn(text, build_context("image"))[0].message


def test_only_what_is_left_can_be_changed_after_a_removal():
    assert list_readings("remove the circle and make it blue", "image", description="a red circle")[0][0] == "ask"
    assert list_readings("remove the circle and make the star green", "image") == [
        ("do", "remove the circle"), ("do", "make the star green"),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["make it go the other way", "other direction please", "wrong way"])
def test_the_other_way_is_the_opposite_of_the_motion_that_is_seen(text):
    assert list_readings(text, "video", description="a red circle moving right") == [("do", "make it move left")]
    ((kind, _),) = list_readings(text, "video", description="a red circle")
    assert kind == "ask"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two pictures: one of a star and one of a dot", ["a picture of a star", "a picture of a dot"]),
        ("a picture and a video of a red star", ["a picture of a red star", "a video of a red star"]),
        ("a red circle, and separately a green square", ["a red circle", "a green square"]),
        ("can i have two circles, one red and one blue", ["draw a picture of a red circle and a blue circle"]),
        ("a short clip where a blue square slides to the left", ["draw a video of a blue square moving left"]),
        ("make a gif of a red circle moving left", ["draw a video of a red circle moving left"]),
    ],
)  # fmt: skip
def test_several_results_and_other_wordings_of_one(text, expected):
    assert [words for kind, words in list_readings(text) if kind == "do"] == expected


@pytest.mark.parametrize("text", ["a circle moving right and then down", "a square inside a circle", "a blue diamond"])
def test_what_is_made_of_known_words_and_not_in_the_world_is_declined(text):
    assert [kind for kind, _ in list_readings(text)] == ["decline"]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("do you see a star?", "Yes"), ("is there a red circle?", "Yes"),
        ("is there a blue circle in it?", "No"), ("anything red in there?", "Yes"),
        ("can you see any triangles?", "No"),
    ],
)  # fmt: skip
def test_whether_something_is_there_is_read_from_the_description(question, answer):
    seen = "a red circle and a blue star on a white background"
    (reading,) = read_turn(question, build_context("image"))
    assert reading.fact == "presence"
    artifact = make_artifact("image")
    assert answer_fact(reading.fact, artifact, [artifact], lambda _: seen, reading.text) == f"{answer}: I see {seen}."


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a star that is not red", "instead"),
        ("a circle going around", "Which way"),
        ("a circle and a square moving towards each other", "Which way"),
        ("three pictures of red stars", "How many"),
    ],
)
def test_a_scene_that_leaves_something_open_leads_to_a_question(text, word):
    (reading,) = read_turn(text, build_context())
    assert reading.kind == "ask" and word in reading.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("not a circle but a star", "draw a picture of a star"),
        ("draw two things: a red circle and a blue square", "draw a picture of a red circle and a blue square"),
        ("a circle that moves from the bottom to the top", "draw a video of a circle moving up"),
    ],
)
def test_only_what_is_wanted_is_drawn(text, expected):
    assert list_readings(text) == [("do", expected)]


@pytest.mark.parametrize("text", ["get rid of that star", "no star please", "make the star disappear"])
def test_an_object_that_is_pointed_at_is_the_one_that_is_removed(text):
    assert list_readings(text, "image") == [("do", "remove the star")]


@pytest.mark.parametrize("text", ["so it's a red circle", "i see a star", "the circle is red and the star is blue"])
def test_a_statement_changes_nothing(text):
    assert [kind for kind, _ in list_readings(text, "image")] == ["ask"]
    assert list_readings(f"{text}. make the star green", "image") == [("do", "make the star green")]


@pytest.mark.parametrize("text", ["that's a beautiful star", "nice circle!", "i like the star", "the red is pretty"])
def test_praise_that_names_what_is_seen_is_small_talk(text):
    assert list_readings(text, "image") == [("do", "perfect")]


@pytest.mark.parametrize("medium", [None, "image"])
@pytest.mark.parametrize(
    "text", ["!!!", "...", "and", "and then", "?", "1", "a picture of", "{}", "\U0001f534", "\U0001f534?"]
)
def test_a_text_without_words_of_the_world_is_asked_about(text, medium):
    assert {kind for kind, _ in list_readings(text, medium)} == {"ask"}


@pytest.mark.parametrize(
    "text",
    ["how many are there?", "what colour is it?", "how does it move?", "is it red?", "which shape is the left one?",
     "what do you see?", "is there a circle in the top right corner?", "How many balls?"],
)  # fmt: skip
def test_a_question_about_what_is_not_there_is_not_answered(text):
    """Before, the MLLM made an answer up: "two", "purple" or "i am fine, thank"."""
    (reading,) = read_turn(text, build_context())
    assert reading.kind == "ask" and "nothing to look at" in reading.message, reading


@pytest.mark.parametrize("text", ["what is two plus one?", "how many corners does a star have?", "how big is a giant?"])
def test_a_question_that_needs_no_result_is_passed_on(text):
    assert list_readings(text) == [("do", text)]

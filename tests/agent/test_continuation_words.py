"""Words that ask for a clip which begins with what there is: read as a task where the preset declares it."""

import pytest

from omnivideo.agent.capabilities import build_refusal, get_task
from omnivideo.agent.media_words import is_extension_request
from omnivideo.agent.small_world.readings import Context
from omnivideo.agent.small_world.turn_reading import read_turn
from omnivideo.contracts import Artifact, Route
from omnivideo.presets import TINY
from omnivideo.synthetic.captions import describe_scene
from omnivideo.synthetic.requests import CONTINUATION_TASKS, sample_requests
from tests.support.continuations import PRESET


def make_artifact(medium: str, key: str = "a") -> Artifact:
    frames = 9 if medium == "video" else 1
    return Artifact(key=key, medium=medium, width=64, height=64, frames=frames, fps=8, caption="it", created_by="test")


def read(text: str, media: list[str], preset=PRESET, description="a red circle and a blue star on a white background"):
    artifacts = [make_artifact(medium, str(index)) for index, medium in enumerate(media)]
    medium = media[-1] if media else None
    return read_turn(text, Context(preset, artifacts, medium, "", len(artifacts), lambda: description))


def describe(readings) -> list[tuple]:
    return [(reading.kind, reading.task, reading.reference) for reading in readings]


@pytest.mark.parametrize("text", [
    "make it longer", "continue it", "extend it", "keep going", "what happens next?", "go on", "add another second",
    "longer please", "let it go on", "extend the clip", "show what happens next",
])  # fmt: skip
def test_a_clip_is_made_longer(text):
    (reading,) = read(text, ["image", "video"])
    assert (reading.kind, reading.task, reading.reference, reading.medium) == (
        "do", "video-extension", "current", "video"
    )  # fmt: skip
    (refusal,) = read(text, ["image", "video"], TINY)
    assert refusal.kind == "decline" and "I cannot make clips longer. I can make clips" in refusal.message


@pytest.mark.parametrize("text", [
    "animate it", "bring it to life", "make it a video", "make the circle move right", "animate it: the circle should "
    "move left", "a clip of it where the star should grow", "let the circle slide to the right",
])  # fmt: skip
def test_a_picture_is_animated(text):
    (reading,) = read(text, ["image"])
    assert (reading.kind, reading.task, reading.reference) == ("do", "image-to-video", "current")
    (refusal,) = read(text, ["image"], TINY)
    assert refusal.kind == "decline" and "I cannot animate pictures" in refusal.message


@pytest.mark.parametrize("text", [
    "then make it move left", "now let it bounce", "let it bounce", "make it slide to the right", "please animate it",
    "make it move", "can you make it move?", "let it roll", "let the circle move", "move it around",
])  # fmt: skip
def test_a_still_that_is_to_move_is_animated_or_the_answer_says_that_it_cannot_be(text):
    """Also where the words say no direction, or name a motion that the world has no word for."""
    (reading,) = read(text, ["video", "image"])
    assert (reading.kind, reading.task, reading.reference) == ("do", "image-to-video", "current"), reading
    (refusal,) = read(text, ["video", "image"], TINY)
    assert refusal.kind == "decline" and "I cannot animate pictures" in refusal.message, refusal


def test_a_motion_that_the_world_lacks_is_declined():
    (refusal,) = read("make it spin", ["image"])
    assert refusal.kind == "decline" and "I do not know 'spin'" in refusal.message
    assert "I cannot animate pictures" in read("make it spin", ["image"], TINY)[0].message
    assert read("let it bounce", ["video"])[0].kind == "decline"


@pytest.mark.parametrize("media", [[], ["image"], ["video"]])
@pytest.mark.parametrize("text", [
    "draw a picture of a red circle, then make it move left", "a picture of a red circle; animate it",
    "make a picture of a red circle and let it slide to the right", "draw a red circle. then let it bounce",
])  # fmt: skip
def test_a_picture_of_the_same_turn_is_animated(text, media):
    """Whatever the thread has shown before."""
    made, animated = read(text, media)
    assert (made.kind, made.task) == ("do", None)
    assert (animated.kind, animated.task, animated.reference) == ("do", "image-to-video", "current"), animated
    (refusal,) = read(text, media, TINY)
    assert refusal.kind == "decline" and "I cannot animate pictures" in refusal.message


def test_an_animated_picture_is_the_one_that_is_named():
    assert describe(read("animate the first picture", ["image", "image"])) == [("do", "image-to-video", "1")]
    assert describe(read("make the second clip longer", ["video", "video", "video"])) == [
        ("do", "video-extension", "2")
    ]


@pytest.mark.parametrize(("text", "medium", "expected"), [
    ("make it longer and make the circle green", "video", [("video-extension", "current"), (None, "")]),
    ("make the circle green and make it move right", "image", [(None, "current"), ("image-to-video", "current")]),
    ("animate it and then make it longer", "image", [("image-to-video", "current"), ("video-extension", "current")]),
])  # fmt: skip
def test_several_changes_are_made_in_an_order_that_works(text, medium, expected):
    readings = read(text, [medium], description="a red circle on a white background")
    assert [(reading.task, reading.reference) for reading in readings] == expected, readings


def test_two_pictures_are_the_first_and_the_last_frame():
    (reading,) = read("start with the first picture and end with the second", ["video", "image", "image"])
    assert (reading.task, reading.reference, reading.last_frame) == ("keyframes-to-video", "2", 3)
    (question,) = read("a clip from the first picture to the second", ["image"])
    assert question.kind == "ask" and "two pictures" in question.message


@pytest.mark.parametrize(("text", "seconds"), [
    ("make it two seconds longer", 2), ("extend it by 1.5 seconds", 1.5), ("add another second", 1),
    ("add 3 more seconds", 3), ("continue it for ten seconds", 10), ("make it longer", 0),
])  # fmt: skip
def test_the_seconds_that_are_added_are_read(text, seconds):
    (reading,) = read(text, ["video"])
    assert (reading.kind, reading.task, reading.seconds) == ("do", "video-extension", seconds)
    assert read(text, ["video"], TINY)[0].kind != "do"


def test_a_length_that_nothing_is_added_to_is_answered():
    assert "`seconds` of a request" in read("it should last 5 seconds", ["video"])[0].message


@pytest.mark.parametrize(("text", "joined"), [
    ("put the two clips together", (3, 4)), ("join all the clips", (1, 3, 4)), ("merge the three clips", (1, 3, 4)),
    ("join the first and the third clip", (1, 4)), ("put the second in front of the first", (3, 1)),
    ("attach the second clip to the first", (1, 3)), ("stitch them into one clip", (3, 4)),
])  # fmt: skip
@pytest.mark.parametrize("preset", [PRESET, TINY])
def test_clips_are_joined_by_every_preset(text, joined, preset):
    """It takes no weights."""
    (reading,) = read(text, ["video", "image", "video", "video"], preset)
    assert (reading.kind, reading.goal, reading.joined, reading.reference) == ("do", "edit", joined, str(joined[0]))
    assert read(text, ["image", "video"], preset)[0].kind == "ask"


def test_a_picture_has_no_length():
    (question,) = read("make it longer", ["image"])
    assert question.kind == "ask" and "A picture has no length" in question.message
    (refusal,) = read("make it shorter", ["video"])
    assert refusal.kind == "decline"


@pytest.mark.parametrize("task", CONTINUATION_TASKS)
def test_what_the_grammar_says_is_read_as_its_task(task):
    """Some words say two things: "then make it move left" and, of a picture, "make it shrink" are also changes."""
    wrong = []
    for request in sample_requests(21, task, 200):
        media = ["video"] if task == "video-extension" else ["image", "image"]
        readings = read(request.text, media, description=describe_scene(request.source))
        if [reading.task for reading in readings] != [task] and "video of" not in request.text:
            wrong.append(request.text)
    is_ambiguous = [text for text in wrong if any(word in text for word in ("then", "next", "shrink", "grow"))]
    assert wrong == is_ambiguous, wrong[:5]


@pytest.mark.parametrize(("kind", "media", "requested", "task"), [
    ("video", "image", None, "image-to-video"), ("video", "video", None, "video-editing"),
    ("video", "video", "video-extension", "video-extension"), ("video", None, "video-extension", "text-to-video"),
    ("image", "image", "video-extension", "image-editing"), ("image", "video", None, None),
    ("video", "image", "keyframes-to-video", "keyframes-to-video"),
])  # fmt: skip
def test_the_task_of_a_route(kind, media, requested, task):
    source = media and make_artifact(media)
    route = Route(kind=kind, probability=1.0)
    assert get_task(PRESET, route, source, requested) == task
    assert build_refusal(PRESET, route, source) is None


def test_a_preset_that_animates_by_editing_does_so():
    preset = TINY.model_copy(update={"animates_pictures": True})
    route, still = Route(kind="video", probability=1.0), make_artifact("image")
    assert get_task(preset, route, still) == "video-editing" and build_refusal(preset, route, still) is None
    assert "cannot set a picture in motion; it can make clips" in build_refusal(TINY, route, still)


@pytest.mark.parametrize(("text", "is_extension"), [
    ("make it longer", True), ("Please continue.", True), ("extend the clip, it should rain", True),
    ("what happens next?", True), ("make the nose longer than the hat", False), ("make her hair longer", False),
    ("continue the story of the cat", True), ("make her hair red", False), ("let it go on", True),
    ("a longer beard", False), ("can you make this longer?", True), ("longer please", True),
])  # fmt: skip
def test_requests_for_more_of_a_clip_in_the_words_of_open_worlds(text, is_extension):
    assert is_extension_request(text) == is_extension

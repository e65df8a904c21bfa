"""What a scene shows after changes in the MLLM's words."""

import pytest

from omnivideo.agent.small_world.changed_scenes import change_scene, describe_changed_scene, read_planned_scene
from omnivideo.agent.small_world.changes import WordedChange
from omnivideo.agent.small_world.lexicon import tokenize
from omnivideo.agent.small_world.scenes import read_scene
from omnivideo.contracts import Artifact

SCENE = "a small red circle on the left moving right and a large blue square on the right on a white background"


@pytest.mark.parametrize(("kind", "text", "target", "expected"), [
    ("replace", "replace the circle with a green star", "the circle",
     "a small green star on the left moving right and a large blue square on the right"),
    ("resize", "make the circle bigger", "the circle",
     "a large red circle on the left moving right and a large blue square on the right"),
    ("speed", "make the circle slower", "the circle",
     "a small red circle on the left moving slowly right and a large blue square on the right"),
    ("path", "make the circle move up then move left", "the circle",
     "a small red circle on the left moving up then left and a large blue square on the right"),
    ("place", "put the square in the middle", "the square",
     "a small red circle on the left moving right and a large blue square in the middle"),
    ("place", "put the square in the top left", "the square",
     "a small red circle on the left moving right and a large blue square in the top left"),
    ("swap", "swap their colours", "them",
     "a small blue circle on the left moving right and a large red square on the right"),
    ("swap", "swap the shapes of the circle and the square", "the circle and the square",
     "a small red square on the left moving right and a large blue circle on the right"),
    ("swap", "swap their places", "them",
     "a small red circle on the right moving right and a large blue square on the left"),
    ("blur", "blur it", "it", "a small red circle on the left moving right and a large blue square on the right"),
])  # fmt: skip
def test_every_kind_of_change_is_known(kind, text, target, expected):
    scene = change_scene(read_scene(tokenize(f"a video of {SCENE}")), [WordedChange(kind, text, target)])
    assert scene.to_text() == f"draw a video of {expected} on a white background"


def test_a_swap_needs_two_objects():
    scene = read_scene(tokenize("a picture of a red circle, a blue square and a green star"))
    assert change_scene(scene, [WordedChange("swap", "swap their colours", "them")]) == scene


def test_a_speed_has_ends():
    scene = read_scene(tokenize("a video of a red circle moving right"))
    for change in ("slower", "slower", "faster", "faster", "faster"):
        scene = change_scene(scene, [WordedChange("speed", f"make it {change}", "it")])
    assert scene.objects[0].speed == "fast"


def test_a_result_is_known_by_the_requests_for_it():
    requests = ("draw a picture of a red circle on a pink background", "make it bigger", "replace it with a blue star")
    artifacts = [
        Artifact(key=str(index), medium="image", width=64, height=64, frames=1, fps=1, caption=text,
                 source=str(index - 1) if index else None, created_by="test")
        for index, text in enumerate(requests)
    ]  # fmt: skip
    scene = read_planned_scene(artifacts, len(artifacts))
    assert scene is not None and scene.to_text() == "draw a picture of a large blue star on a pink background"
    assert describe_changed_scene("a red circle on a pink background", "make it blue", "image") == (
        "a blue circle on a pink background"
    )

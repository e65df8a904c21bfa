"""The shipped weights are small, and correct for the examples of the README."""

import pytest
from rich.console import Console

from omnivideo.cli.demo import DEMO_TURNS, run_demo
from omnivideo.models.weights.shipped import SHIPPED_WEIGHTS_FOLDER
from omnivideo.sdk.studio import Studio
from omnivideo.synthetic.facts import ObjectSpec, SceneSpec
from omnivideo.synthetic.scorer import detect_scene

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Studio:
    return Studio(home=tmp_path_factory.mktemp("home"), device="cpu")


def test_the_weights_are_small_and_have_a_model_card():
    files = [path for path in (SHIPPED_WEIGHTS_FOLDER / "tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    card = (SHIPPED_WEIGHTS_FOLDER / "tiny" / "README.md").read_text()
    assert "| `stage3` |" in card and "| routing |" in card


def test_the_readmes_clip_shows_its_prompt(studio, tmp_path):
    clip = studio.generate("a small red circle moving right", seed=1)
    assert SceneSpec((ObjectSpec("circle", "red", "small", "right"),)).is_met_by(detect_scene(clip.frames))
    path = clip.save(tmp_path / "clip.mp4")
    assert studio.understand(path, "how does the circle move?") == "it moves right"


def test_the_demos_conversation_is_mostly_correct(studio, tmp_path, capsys):
    """The seeds are fixed, but other processors round differently, so a turn or two may fail."""
    run_demo(tmp_path, Console(width=200), studio)
    output = capsys.readouterr().out
    turns_right = int(output.rsplit(" of ", 1)[0].split()[-1])
    assert turns_right >= len(DEMO_TURNS) - 2 and (tmp_path / "contact-sheet.png").exists(), output
